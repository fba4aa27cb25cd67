"""The Triton kernels of the rotations at sizes that the laws do not draw: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from decimal import Decimal, localcontext
from math import cos, sin

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.ops import rotary, rotate, use

Shape = tuple[int, ...]


def normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def compare(backend: str, inputs: list[Tensor], *, interleaved: bool) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with use(backend):
        y = rotate(*leaves, interleaved=interleaved)
    return [y, *torch.autograd.grad(y, leaves, normal(y.device, *y.shape, seed=1).to(y))]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("x", "angles"),
    [
        ((2, 5, 3, 64), (2, 5, 1, 16)),  # heads share the angles
        ((2, 5, 3, 12), (5, 1, 6)),  # so do rows
        ((2, 1, 3, 64), (2, 5, 3, 32)),  # each x by several angles
        ((3, 1, 2, 1, 4, 8), (3, 2, 1, 2, 1, 3)),  # nothing can be merged
        ((70, 2), (70, 1)),
        ((8,), (4,)),
    ],
)
def test_shapes_and_gradients(x: Shape, angles: Shape, interleaved: bool, kernel_device: torch.device) -> None:
    inputs = [normal(kernel_device, *x), normal(kernel_device, *angles, seed=2), normal(kernel_device, *angles, seed=3)]
    expected = compare(REFERENCE, [t.double() for t in inputs], interleaved=interleaved)
    for got, want in zip(compare("triton", inputs, interleaved=interleaved), expected, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.filterwarnings("ignore")  # of the interpreter, about products that are dropped
def test_pairs_that_stay_keep_infinities(kernel_device: torch.device) -> None:
    x = torch.full((1, 8), float("inf"), device=kernel_device)
    with use("triton"):
        y = rotate(x, torch.ones(1, 2, device=kernel_device), torch.zeros(1, 2, device=kernel_device))
    assert y[0, [2, 3, 6, 7]].isinf().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("headdim", "rotary_dim"), [(128, None), (80, 20), (64, 32), (6, 6)])
def test_positions_and_gradients(
    headdim: int, rotary_dim: int | None, interleaved: bool, kernel_device: torch.device
) -> None:
    """Inputs cut out of a projection, positions that rows share."""
    x = normal(kernel_device, 2, 9, 5 * headdim + 8)[..., 8:].unflatten(-1, (5, headdim))
    positions = torch.randint(2**20, (1, 9), generator=torch.Generator().manual_seed(0)).to(kernel_device)
    settings = {"interleaved": interleaved, "rotary_dim": rotary_dim, "theta": 500_000.0}

    def outcome(backend: str, x: Tensor) -> list[Tensor]:
        leaf = x.requires_grad_()
        with use(backend):
            y = rotary(leaf, positions, **settings)
        return [y, *torch.autograd.grad(y, leaf, normal(y.device, *y.shape, seed=1).to(y))]

    for got, want in zip(outcome("triton", x), outcome(REFERENCE, x.detach().double()), strict=True):
        assert (got - want).norm() <= 2e-7 * want.norm()


@pytest.mark.parametrize("position", [1_000_000, 2**31 - 1])
def test_far_angles_are_right(position: int, kernel_device: torch.device) -> None:
    """Against 40 decimal digits."""
    x = torch.zeros(1, 1, 1, 64, device=kernel_device)
    x[..., :32] = 1.0
    with use("triton"):
        y = rotary(x, torch.tensor([[position]], device=kernel_device))[0, 0, 0].tolist()
    with localcontext(prec=40):
        for j in range(32):
            angle = Decimal(position) * Decimal(10000) ** (Decimal(-2 * j) / Decimal(64))
            exact = float(angle % Decimal("6.283185307179586476925286766559005768394"))
            allowed = 1.5e-7 + position * 2.0**-52
            assert [y[j], y[j + 32]] == pytest.approx([cos(exact), sin(exact)], abs=allowed)


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_can_trace_them(kernel_device: torch.device) -> None:
    rotate.load()
    rotary.load()
    x, angles = (normal(kernel_device, 1, 7, 2, n).requires_grad_() for n in (16, 8))
    positions = torch.arange(7, device=kernel_device).unsqueeze(0)

    def both(x: Tensor, angles: Tensor) -> Tensor:
        return rotate(rotary(x, positions), angles.cos(), angles.sin())

    with use("triton"):
        expected = both(x, angles)
        got = torch.compile(both, fullgraph=True, backend="aot_eager")(x, angles)
    assert torch.equal(got, expected)
    pairs = zip(*(torch.autograd.grad(y.sum(), (x, angles)) for y in (got, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_does_not_fit_is_refused(kernel_device: torch.device) -> None:
    wide = torch.zeros(1, 1, 1, 16384, device=kernel_device)
    positions = torch.zeros(1, 1, dtype=torch.int64, device=kernel_device)
    with use("triton"), pytest.raises(BackendError, match="up to 8192 numbers"):
        rotary(wide, positions)
    with use("triton"), pytest.raises(BackendError, match="nothing to turn"):
        rotary(wide[:, :0], positions[:, :0])
