"""The kernels of a Mamba-3 layer between its projections at sizes of real layers: on a GPU, or in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.bench.kernels import norm_error
from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.ops import Mamba3Layer, TrapezoidState, mamba3_scan, use
from everstate.ops.mamba3.ends import enter
from everstate.ops.norm import rms_norm
from tests.ops.upstream import upstream_of

pytest.importorskip("triton")
HEADDIM, INNER = 2, 64
OUTPUTS = ("dt", "A", "lam", "omega", "B", "C")


def draw(device: torch.device, tokens: int, d_state: int, vectors: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of 32 heads: what `in_proj` gives, and the parameters."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    heads, pairs = INNER // HEADDIM, d_state // 4
    drawn = {
        "projected": normal(2, tokens, 2 * INNER + 2 * vectors * d_state + 3 * heads + pairs).to(dtype),
        "dt_bias": torch.rand(heads, generator=generator) * 3 - 4,
        "B_norm": (normal(d_state) + 1).to(dtype),
        "C_norm": (normal(d_state) + 1).to(dtype),
    }
    return {name: value.to(device) for name, value in drawn.items()}


def layer_of(given: dict[str, Tensor], vectors: int, **settings: Any) -> tuple[Mamba3Layer, TrapezoidState]:
    """A layer and a state of which only shapes are read here."""
    heads, d_state = len(given["dt_bias"]), len(given["B_norm"])
    empty = lambda *shape: given["dt_bias"].new_zeros(shape)
    bias, parameters = empty(heads, 1, d_state), {name: given[name] for name in ("dt_bias", "B_norm", "C_norm")}
    layer = Mamba3Layer(**parameters, B_bias=bias, C_bias=bias, D=empty(heads), ngroups=vectors, **settings)
    state = TrapezoidState(
        empty(2, heads, HEADDIM, d_state), empty(2, 1, heads, d_state), empty(2, heads, HEADDIM),
        empty(2, heads, d_state // 4),
    )  # fmt: skip
    return layer, state


def by_kernel(layer: Mamba3Layer, state: TrapezoidState, projected: Tensor) -> list[Tensor]:
    from everstate.ops.mamba3.triton import _enter

    heavy = layer.A_activation == "heavy_tail"
    settings = (state.angle.shape[-1], heavy, layer.A_floor, layer.norm_eps)
    return list(_enter(projected[..., 2 * INNER :], layer.dt_bias, layer.B_norm, layer.C_norm, *settings))


def by_torch(layer: Mamba3Layer, state: TrapezoidState, projected: Tensor) -> list[Tensor]:
    with use("torch", REFERENCE):
        _, made = enter(projected, None, layer, state, rms_norm)
    return [getattr(made, name).flatten(2) for name in OUTPUTS]


def outcome(function: Any, given: dict[str, Tensor], vectors: int, **settings: Any) -> list[Tensor]:
    """Outputs, and the gradients of everything."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    outputs = function(*layer_of(leaves, vectors, **settings), leaves["projected"])
    upstream = upstream_of(outputs)
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("dtype", "vectors"), [(torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 1)], ids=str)
def test_errors_are_those_of_pytorch(
    dtype: torch.dtype, vectors: int, heavy: bool, kernel_device: torch.device
) -> None:
    given = draw(kernel_device, 9, 128, vectors, dtype)
    settings = {"A_activation": "heavy_tail" if heavy else "softplus", "A_floor": 0.4}
    exact = outcome(by_torch, {name: t.double() for name, t in given.items()}, vectors, **settings)
    ours, theirs = (outcome(f, given, vectors, **settings) for f in (by_kernel, by_torch))
    # The interpreter cuts where a GPU rounds to bfloat16, which is twice the error.
    more = 2.4 if dtype == torch.bfloat16 and kernel_device.type == "cpu" else 1.2
    for name, mine, other, true in zip((*OUTPUTS, *given), ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape, name
        assert norm_error(mine, true) <= more * norm_error(other, true) + 1e-6, name


def test_rows_that_are_not_filled(kernel_device: torch.device) -> None:
    """Sizes that are no powers of two, tokens that no tile divides, and rows that lie apart."""
    given = draw(kernel_device, 5, 12, 3, torch.float32)
    wide = torch.cat([given["projected"], given["projected"]], -1)
    cut = {**given, "projected": wide[..., : given["projected"].shape[-1]]}
    exact = outcome(by_torch, {name: t.double() for name, t in given.items()}, 3)
    for mine, true in zip(outcome(by_kernel, cut, 3), exact, strict=True):
        assert norm_error(mine, true) <= 1e-6


def test_what_is_refused(kernel_device: torch.device) -> None:
    given = draw(kernel_device, 3, 16, 1, torch.float32)
    layer, state = layer_of(given, 1)
    explain = lambda t: mamba3_scan.explain(t, state, layer=layer)["triton"]
    assert explain(given["projected"]) == "accepts"
    assert "float64" in explain(given["projected"].double())
    assert "no tokens" in explain(given["projected"][:, :0])


def layer_outcome(function: Any, given: dict[str, Tensor], packing: Packing | None, **settings: Any) -> list[Tensor]:
    """Outputs, states and gradients of everything, of a whole layer."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    parts = dict(leaves)
    state = TrapezoidState(*(parts.pop(name) for name in TrapezoidState._fields))
    projected, out_proj = parts.pop("projected"), parts.pop("out_proj", None)
    y, after = function(projected, state, layer=Mamba3Layer(**parts, **settings), out_proj=out_proj, packing=packing)
    outputs = [y, *after]
    upstream = upstream_of(outputs)
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)]


def draw_layer(
    device: torch.device, batch: int, length: int, d_state: int, dtype: torch.dtype, **more: tuple[int, ...]
) -> dict[str, Tensor]:
    """Four heads of 64 and two sequences."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    heads, headdim, pairs = 4, 64, d_state // 4
    width = 2 * heads * headdim + 2 * d_state + 3 * heads + pairs
    low = {"projected": normal(batch, length, width), **{name: normal(*shape) for name, shape in more.items()}}
    low |= {"B_norm": normal(d_state) + 1, "C_norm": normal(d_state) + 1}
    full = {
        "dt_bias": torch.rand(heads, generator=generator) * 3 - 4, "D": normal(heads),
        "B_bias": normal(heads, 1, d_state), "C_bias": normal(heads, 1, d_state),
        "ssm": normal(2, heads, headdim, d_state), "k": normal(2, 1, heads, d_state),
        "x": normal(2, heads, headdim), "angle": normal(2, heads, pairs),
    }  # fmt: skip
    return {name: t.to(device, dtype) for name, t in low.items()} | {name: t.to(device) for name, t in full.items()}


@pytest.mark.parametrize(
    ("dtype", "more", "settings", "ends"),
    [
        (torch.bfloat16, {"out_proj": (24, 256)}, {"A_activation": "heavy_tail"}, None),
        (torch.bfloat16, {"norm": (256,), "out_proj": (24, 256)}, {"interleaved": False}, [0, 64, 128]),
        (torch.float32, {}, {}, None),
    ],
    ids=["gate and projection", "norm, packed", "float32"],
)
def test_one_operator_gives_what_its_parts_give(
    dtype: torch.dtype, more: dict[str, tuple[int, ...]], settings: dict[str, Any], ends: list[int] | None,
    hopper: torch.device,
) -> None:  # fmt: skip
    from everstate.ops.mamba3.triton import _in_parts, mamba3_scan

    packing = None if ends is None else Packing(ends)
    batch, length = (2, 70 if dtype == torch.bfloat16 else 9) if ends is None else (1, ends[-1])
    given = draw_layer(hopper, batch, length, 64, dtype, **more)
    in_parts = lambda projected, state, *, layer, out_proj, packing: _in_parts(
        projected, state, None, layer, out_proj, packing, 64
    )
    with use("triton"):
        got, expected = (layer_outcome(f, given, packing, **settings) for f in (mamba3_scan, in_parts))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert norm_error(one, other.double()) <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_numbers_of_a_token_may_lie_apart(kernel_device: torch.device) -> None:
    given = draw_layer(kernel_device, 2, 5, 16, torch.float32)
    apart = lambda projected, *rest, **more: mamba3_scan(torch.stack([projected] * 2, -1)[..., 0], *rest, **more)
    with use("triton"):
        for got, expected in zip(*(layer_outcome(f, given, None) for f in (apart, mamba3_scan)), strict=True):
            assert norm_error(got, expected.double()) <= 1e-6


def test_heads_that_the_scan_does_not_take(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU has little shared memory: the scan is then PyTorch's."""
    from everstate.ops.trapezoid import limits

    given = draw_layer(kernel_device, 2, 5, 16, torch.float32)
    with use("triton"):
        expected = layer_outcome(mamba3_scan, given, None)
    monkeypatch.setattr(limits, "shared_memory", lambda device: 64 * 1024)
    for got, other in zip(layer_outcome(mamba3_scan, given, None), expected, strict=True):
        assert norm_error(got, other.double()) <= 1e-5
    with use("triton"), pytest.raises(BackendError, match="needs a GPU with 101,376 bytes"):
        layer_outcome(mamba3_scan, given, None)
