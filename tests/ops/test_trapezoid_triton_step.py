"""The Triton kernels of one Mamba-3 token at sizes that the laws do not draw: on the GPU or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.core.state import clone, map_state
from everstate.mixers import build_mixer
from everstate.ops import Mamba3Layer, TrapezoidState, mamba3_step_, trapezoid_step_, use
from everstate.ops.mamba3.ends import enter
from everstate.ops.norm import rms_norm

HEADS = 2
FACTORS = ("mimo_x", "mimo_z", "mimo_o")


def draw(
    device: torch.device, headdim: int, d_state: int, rank: int, pairs: int, *, dtype: torch.dtype = torch.float32,
    pool: torch.dtype = torch.float32, norm: bool = False, mimo: bool = True, batch: int = 2, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    shapes = (HEADS, headdim, d_state), (rank, HEADS, d_state), (HEADS, headdim), (HEADS, pairs)
    ssm, k, x, angle = (normal(2 * batch, *shape) for shape in shapes)
    layer = Mamba3Layer(
        dt_bias=normal(HEADS) - 2,
        B_norm=1 + 0.1 * normal(d_state),
        C_norm=1 + 0.1 * normal(d_state),
        B_bias=normal(HEADS, rank, d_state),
        C_bias=normal(HEADS, rank, d_state),
        D=normal(HEADS),
        norm=normal(HEADS * headdim) if norm else None,
        **{name: normal(HEADS, rank, headdim) for name in FACTORS if rank > 1 and mimo},
        **settings,
    )
    return {
        "projected": normal(batch, HEADS * (2 * headdim + 3) + 2 * rank * d_state + pairs).to(dtype),
        "state": TrapezoidState(ssm.to(pool), k.to(pool), x.to(pool), angle),
        "slots": torch.arange(batch, device=device) * 2 + 1,
        "layer": layer,
    }


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def exact(given: dict[str, Any]) -> dict[str, Any]:
    layer = Mamba3Layer(*(widened(part) for part in given["layer"]))
    state = map_state(Tensor.double, given["state"])
    return {**given, "projected": given["projected"].double(), "state": state, "layer": layer}


def step(backend: str, given: dict[str, Any]) -> tuple[Tensor, TrapezoidState]:
    """The outputs and the pool after one token."""
    pool = clone(given["state"])
    with use(backend):
        return mamba3_step_(**{**given, "state": pool}), pool


def errors(given: dict[str, Any], backend: str) -> dict[str, float]:
    """Norms of the differences to the float64 reference, relative to its norms."""
    y, after = step(REFERENCE, exact(given))
    got, pool = step(backend, given)
    relative = lambda one, other: ((one.double() - other).norm() / other.norm()).item()
    each = {name: relative(*both) for name, *both in zip(after._fields, pool, after, strict=True)}
    return {"y": relative(got, y), **each}


@pytest.mark.parametrize(
    ("headdim", "d_state", "rank", "pairs", "more"),
    [
        (64, 128, 1, 32, {}),
        (64, 128, 4, 64, {"interleaved": False}),
        (128, 64, 1, 16, {"norm": True, "A_activation": "heavy_tail"}),
        (80, 96, 3, 24, {"norm": True}),
        (16, 10, 8, 5, {"interleaved": False, "mimo": False}),
    ],
)
def test_sizes_of_real_layers(
    headdim: int, d_state: int, rank: int, pairs: int, more: dict[str, Any], kernel_device: torch.device
) -> None:
    found = errors(draw(kernel_device, headdim, d_state, rank, pairs, **more), "triton")
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4])
def test_half_precision_errs_no_more_than_pytorch_does(
    rank: int, pool: torch.dtype, kernel_device: torch.device
) -> None:
    given = draw(kernel_device, 32, 64, rank, 16, dtype=torch.bfloat16, pool=pool)
    ours, theirs = errors(given, "triton"), errors(given, "torch")
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    ratio = 1.2 if kernel_device.type == "cuda" else 2.4
    for name in ours:
        assert ours[name] <= ratio * theirs[name] + 1e-6, name
    assert theirs["y"] < 1e-2


def test_the_step_without_its_ends(kernel_device: torch.device) -> None:
    given = draw(kernel_device, 64, 128, 4, 32, pool=torch.bfloat16)
    layer, exactly = given["layer"], exact(given)
    settings = {"interleaved": True}
    outcomes = []
    for one, backend in ((exactly, REFERENCE), (given, "triton")):
        pool, layer = clone(one["state"]), one["layer"]
        _, inputs = enter(one["projected"], None, layer, pool, rms_norm.reference)
        named = {name: getattr(layer, name) for name in ("B_bias", "C_bias", "mimo_x", "D")}
        with use(backend):
            outcomes.append((trapezoid_step_(*inputs, pool, one["slots"], **named, **settings), *pool))
    for (expected, got), allowed in zip(zip(*outcomes, strict=True), (1e-5, 5e-3, 5e-3, 5e-3, 1e-5), strict=True):
        assert (got.double() - expected).norm() <= allowed * expected.norm()


def test_angles_stay_right_over_many_turns(kernel_device: torch.device) -> None:
    """Tokens of up to 6 rad each: the error is that of rounding, not of 2 pi."""
    given = draw(kernel_device, 2, 4, 1, 2)
    given["layer"] = given["layer"]._replace(dt_bias=torch.full_like(given["layer"].dt_bias, 2.0))
    wide = exact(given)
    count = 2000 if kernel_device.type == "cuda" else 12
    for _ in range(count):
        _, given["state"] = step("triton", given)
        _, wide["state"] = step(REFERENCE, wide)
    apart = given["state"].angle.double() - wide["state"].angle
    assert given["state"].angle.abs().max() <= 3.1416
    # The same token each time: what rounding its step and its 6 rad does adds up.
    assert torch.sin(apart / 2).abs().max() < count * 12 * 2**-24


def test_small_steps_keep_their_digits(kernel_device: torch.device) -> None:
    """softplus(-14) is 8e-7: log(1 + exp(-14)) in float32 is off by 7 %."""
    given = draw(kernel_device, 4, 4, 1, 2)
    given["layer"] = given["layer"]._replace(dt_bias=torch.full_like(given["layer"].dt_bias, -14.0))
    given["state"] = map_state(torch.zeros_like, given["state"])
    found = errors(given, "triton")
    assert found["ssm"] < 1e-5
    assert found["angle"] < 1e-5


@pytest.mark.parametrize("mimo", [False, True])
def test_a_layer_decodes_what_it_reads(mimo: bool, kernel_device: torch.device) -> None:
    table = {"type": "mamba3", "d_state": 16, "headdim": 8, "is_mimo": mimo, "mimo_rank": 4, "out_norm": mimo}
    mixer = build_mixer(table, 16, device=kernel_device).requires_grad_(False)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    expected, after = mixer(x, mixer.init_state(2))
    state = mixer.init_state(2)
    now = mixer.in_proj(x[:, 0])
    assert mamba3_step_.explain(now, state, layer=mixer._layer())["triton"] == "accepts"
    got = torch.stack([mixer.step_(token, state) for token in x.unbind(1)], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    for one, other in zip(state, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    """Programs whose warps overwrote what others still read would give other bits now and then."""
    given = draw(kernel_device, 64, 128, 4, 32, batch=1024 if kernel_device.type == "cuda" else 5)
    (y, pool), *others = (step("triton", given) for _ in range(50 if kernel_device.type == "cuda" else 2))
    for again, after in others:
        assert torch.equal(again, y)
        assert all(torch.equal(one, other) for one, other in zip(after, pool, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_can_trace_it(kernel_device: torch.device) -> None:
    given = draw(kernel_device, 8, 8, 2, 2)
    mamba3_step_.load()
    expected, after = step("triton", given)
    pool = clone(given["state"])
    with use("triton"):
        got = torch.compile(mamba3_step_, fullgraph=True, backend="aot_eager")(**{**given, "state": pool})
    assert torch.equal(got, expected)
    assert all(torch.equal(one, other) for one, other in zip(pool, after, strict=True))


@pytest.mark.parametrize(
    ("sizes", "change", "sentence"),
    [
        ((2, 2048, 1, 4), lambda s: s, r"up to 1024 x 1024 numbers .* not 2 x 2048"),
        ((4, 4, 9, 2), lambda s: s, r"up to 8 ranks, not 9"),
        ((4, 4, 1, 2), lambda s: s._replace(angle=s.angle.bfloat16()), r"angles in float32, not in bfloat16"),
        ((4, 4, 1, 2), lambda s: s._replace(ssm=s.ssm.transpose(2, 3)), r"last dimensions are dense"),
        ((4, 4, 1, 2), lambda s: s._replace(ssm=s.ssm.double()), r"not float64"),
        ((4, 4, 1, 2), lambda s: s._replace(x=s.x.requires_grad_()), r"no gradient for a single token"),
    ],
)
def test_what_does_not_fit_is_refused(
    sizes: tuple[int, int, int, int], change: Any, sentence: str, kernel_device: torch.device
) -> None:
    given = draw(kernel_device, *sizes)
    given["state"] = change(given["state"])
    with use("triton"), pytest.raises(BackendError, match=sentence):
        mamba3_step_(**given)
