"""A token through a model: norms left to linear maps, and linear maps added where they are made, change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from everstate.core.op import Op
from everstate.mixers import MIXERS, build_mixer
from everstate.mixers.base import ChannelMixer
from everstate.mixers.mamba2 import Mamba2
from everstate.mixers.mlp import MLPConfig
from everstate.mixers.modules import Linear, RMSNorm
from everstate.models import LM, ModelConfig
from everstate.ops import Normed, linear, linear_activate, use


def side_by_side(*mixers: str | dict[str, Any]) -> dict[str, Any]:
    tables = [{"type": mixer} if isinstance(mixer, str) else mixer for mixer in mixers]
    return {"type": "parallel", "mixers": {f"part{i}": table for i, table in enumerate(tables)}}


LAYOUTS: dict[str, dict[str, Any]] = {
    "mamba2": {"residual_multiplier": 0.4},
    "mamba1 mlp": {"norm": "rms1p"},
    "mamba3 attention": {"residual_multiplier": 0.4, "logit_multiplier": 0.5, "embedding_multiplier": 3.0},
    "mamba2 moe mamba2": {"tie_embeddings": False},
    "late mamba2": {"post_norm": ("late",), "mixers": {"late": {"type": "mlp"}}},
    "mamba2 mlp": {"norm": "layer"},
    "mamba2 2 * (both) mamba2": {
        "residual_multiplier": 0.4,
        "mixers": {"both": side_by_side("mamba2", "attention", "mlp")},
    },
    "mamba2 both mlp": {"mixers": {"both": side_by_side("mamba2", "s4d")}},
    "both mamba2 both": {"mixers": {"both": side_by_side("mlp", side_by_side("mamba2", "mlp"))}},
    "mamba2 2 * (experts) mamba2": {"mixers": {"experts": {"type": "moe", "nexperts": 4, "d_shared": 128}}},
    "2 * (moe) mamba2": {
        "residual_multiplier": 0.4,
        "norm_eps": 0.5,
        "mixers": {"moe": {"type": "moe", "nexperts": 4, "d_shared": 128, "activation": "relu2", "gated": False}},
    },
    "mamba2 2 * (moe) mamba2": {"mixers": {"moe": {"type": "moe", "nexperts": 4, "d_shared": 128, "d_latent": 64}}},
    "2 * (mamba2 moe) mamba2": {
        "mixers": {"moe": {"type": "moe", "nexperts": 4, "d_shared": 128, "shared_gate": True}}
    },
    "loose loose": {"norm_eps": 0.5, "mixers": {"loose": {"type": "mamba2", "norm_eps": 0.5}}},
}


EXACT = {layout for layout in LAYOUTS if "moe" in layout}
"""In bfloat16 two experts may be so close that rounding decides which of them reads a token; those called `experts` are
far enough apart in what is drawn here."""


def built(layout: str, device: torch.device, dtype: torch.dtype = torch.float32, **settings: Any) -> LM:
    return LM(ModelConfig(d_model=128, vocab_size=70, layout=layout, **settings), device=device, dtype=dtype)


def drawn(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(70, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def stepped(model: LM, ids: Tensor) -> Tensor:
    state = model.init_state(len(ids), context=8)
    return torch.stack([model.step_(now, state) for now in ids.unbind(1)], 1)


@torch.no_grad()
def read(model: LM, ids: Tensor) -> Tensor:
    return model(ids, model.init_state(len(ids), context=8))[0]


def off(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize(("layout", "settings"), LAYOUTS.items(), ids=LAYOUTS)
def test_kernels_step_as_pytorch_does(
    layout: str, settings: dict[str, Any], rows: int, kernel_device: torch.device
) -> None:
    dtype, tolerance = (torch.float32, 1e-4) if layout in EXACT else (torch.bfloat16, 2e-2)
    model, ids = built(layout, kernel_device, dtype, **settings), drawn(rows, 2, kernel_device)
    got = stepped(model, ids)
    with use("torch", "reference"):
        assert off(got, stepped(model, ids)) <= tolerance
        assert off(got, read(model, ids)) <= tolerance


@pytest.mark.parametrize("rows", [2, 6])
def test_a_shared_expert_of_8_bits(rows: int, kernel_device: torch.device) -> None:
    mixers = {"moe": {"type": "moe", "nexperts": 4, "d_shared": 128}}
    model = built("mamba2 2 * (moe) mamba2", kernel_device, mixers=mixers).quantize_()
    ids = drawn(rows, 2, kernel_device)
    got = stepped(model, ids)
    with use("torch", "reference"):
        assert off(got, stepped(model, ids)) <= 1e-4


@pytest.mark.parametrize("layout", ["mamba2 mlp", "mamba3 attention"])
def test_numbers_that_may_overflow_have_kernels_too(layout: str, kernel_device: torch.device) -> None:
    model, ids = built(layout, kernel_device, torch.float16), drawn(2, 2, kernel_device)
    with use("triton"):
        got = stepped(model, ids)
    assert off(got, read(model, ids)) <= 5e-3


def test_a_norm_is_left_to_the_next_linear_map(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    seen: list[bool] = []

    def look(op: Op[..., Any]) -> None:
        accepts = op.implementations[0].accepts

        def looks(x: Tensor | Normed, *args: Any, **settings: Any) -> str | None:
            seen.append(isinstance(x, Normed) and x.squares is not None)
            return accepts(x, *args, **settings)

        monkeypatch.setattr(op.implementations[0], "accepts", looks)

    look(linear_activate)
    look(linear)
    stepped(built("mlp mlp", kernel_device, torch.bfloat16), drawn(1, 1, kernel_device))
    assert seen == [False, True, True]  # of the first norm; of the second layer; of the head


def read_doubled(model: LM) -> None:
    mixer = model.layers[1].mixer
    mixer.__class__ = type("Own", (type(mixer),), {"read": lambda self, x: 2 * type(self).__mro__[1].read(self, x)})


class Doubled(Mamba2):
    """A layer of one's own that does more in its step, and as much in its forward."""

    def forward(self, *args: Any) -> Any:
        y, state = super().forward(*args)
        return 2 * y, state

    def step_(self, *args: Any) -> Tensor:
        return 2 * super().step_(*args)


class Tripled(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)

    def add(self, x: Tensor, y: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        summed, normed = super().add(x, y, multiplier)
        return summed, 3 * normed


class Wrapped(nn.Module):
    """What an adapter puts around a linear map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.bias = torch.zeros(1)  # says that this is more than a matrix

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Quartered(LM):
    def logits(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return super().logits(hidden / 4)


def tripled(model: LM) -> None:
    for owner in (model.layers[1], model):
        norm = Tripled(128, owner.norm.eps).to(model.device)
        norm.load_state_dict(owner.norm.state_dict())
        owner.norm = norm


def wrapped(name: str) -> Callable[[LM], None]:
    return lambda model: setattr(model.layers[1].mixer, name, Wrapped(getattr(model.layers[1].mixer, name)))


def shared_wrapped(model: LM) -> None:
    shared = model.layers[1].mixer.shared
    shared.in_proj = Wrapped(shared.in_proj)


def shared_of_its_own(model: LM) -> None:
    table = {"type": "mlp", "d_hidden": 128, "bias": True, "activation": "relu2", "out_multiplier": 3.0}
    model.layers[1].mixer.shared = build_mixer(table, 128, device=model.device)


def hooked(model: LM) -> None:
    model.layers[1].mixer.out_proj.register_forward_hook(lambda part, args, y: 2 * y)


def headed(model: LM) -> None:
    model.head = nn.Linear(128, 70, device=model.device)


def quartered(model: LM) -> None:
    model.__class__ = Quartered


def patched(part: nn.Module, *names: str) -> None:
    """Puts functions in the place of methods, as adapters and profilers do."""
    for name in names:
        own = getattr(part, name)
        setattr(part, name, lambda *args, own=own: 2 * own(*args))


def logits_patched(model: LM) -> None:
    own = model.logits
    model.logits = lambda hidden: own(hidden / 4)


def out_proj_patched(model: LM) -> None:
    patched(model.layers[1].mixer.out_proj, "forward")


def norm_patched(model: LM) -> None:
    norm = model.layers[1].norm
    add = norm.add
    norm.add = lambda *args: (lambda summed, normed: (summed, 3 * normed))(*add(*args))


def head_patched(model: LM) -> None:
    model.head = Linear(128, 70, bias=False).to(model.device)
    nn.init.normal_(model.head.weight, generator=torch.Generator(model.device).manual_seed(0))
    patched(model.head, "forward")


def block_patched(model: LM) -> None:
    patched(model.layers[0], "give")


def stepping_twice(model: LM) -> None:
    """Puts functions in the place of a layer's, as a profiler does."""
    mixer = model.layers[1].mixer
    forward, step_ = mixer.forward, mixer.step_
    mixer.forward = lambda *args: (lambda y, state: (2 * y, state))(*forward(*args))
    mixer.step_ = lambda *args: 2 * step_(*args)


@pytest.mark.parametrize(
    ("layout", "replace"),
    [
        ("mamba2 mamba2", stepping_twice),
        ("mamba2 mamba2", tripled),
        ("mamba2 mamba2", quartered),
        ("mamba2 mamba2", headed),
        ("mamba1 mamba1", hooked),
        ("mamba1 mamba1", wrapped("out_proj")),
        ("mamba3 mamba3", wrapped("out_proj")),
        ("mamba3 mamba3", wrapped("in_proj")),
        ("mamba1 mamba1", out_proj_patched),
        ("mamba2 mamba2", logits_patched),
        ("mamba2 mamba2", norm_patched),
        ("mamba2 mamba2", head_patched),
        ("mamba2 mamba2", block_patched),
        ("mamba2 mlp", wrapped("in_proj")),
        ("mamba2 mlp", read_doubled),
        ("mamba2 shared", read_doubled),
        ("mamba2 shared", shared_wrapped),
        ("mamba2 shared", shared_of_its_own),
    ],
)
def test_parts_that_were_replaced_are_not_passed_over(
    layout: str, replace: Callable[[LM], None], kernel_device: torch.device
) -> None:
    mixers = {"shared": {"type": "moe", "nexperts": 4, "d_shared": 128}} if "shared" in layout else {}
    model, ids = built(layout, kernel_device, mixers=mixers), drawn(2, 3, kernel_device)
    before = stepped(model, ids)
    replace(model)
    after = stepped(model, ids)
    assert off(after, read(model, ids)) <= 1e-3 < 1e-2 < off(after, before)


class Own(ChannelMixer):
    """A layer of one's own of which only `read` is written."""

    Config = MLPConfig

    def __init__(self, d_model: int, config: MLPConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))

    def init_(self, generator: torch.Generator) -> None:
        nn.init.constant_(self.weight, 0.5)

    def read(self, x: Tensor) -> Tensor:
        return x * self.weight

    def flops_per_token(self, context: int) -> int:
        return self.weight.numel()


@pytest.mark.parametrize("layout", ["mamba2 own mamba2", "both mamba2 both"])
def test_a_layer_of_ones_own_needs_no_step(
    layout: str, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    monkeypatch.setitem(MIXERS._targets, "own", f"{__name__}:Own")
    mixers = {"own": {"type": "own"}} if "own" in layout else {"both": side_by_side("mamba2", "own")}
    model, ids = built(layout, kernel_device, mixers=mixers), drawn(2, 3, kernel_device)
    assert off(stepped(model, ids), read(model, ids)) <= 1e-4


def test_a_step_of_ones_own_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    monkeypatch.setitem(MIXERS._targets, "doubled", f"{__name__}:Doubled")
    model = built("mamba2 2 * (doubled)", kernel_device, mixers={"doubled": {"type": "doubled"}})
    ids = drawn(2, 3, kernel_device)
    assert off(stepped(model, ids), read(model, ids)) <= 1e-3


def test_hooks_of_all_modules_see_tensors(kernel_device: torch.device) -> None:
    model, ids, seen = built("mamba1 mamba1", kernel_device), drawn(2, 1, kernel_device), list[tuple[nn.Module, Any]]()
    hook = register_module_forward_hook(lambda part, args, y: seen.append((part, args[0])))
    try:
        stepped(model, ids)
    finally:
        hook.remove()
    assert {block.mixer.out_proj for block in model.layers} <= {part for part, _ in seen}
    assert all(isinstance(given, Tensor) for _, given in seen)
