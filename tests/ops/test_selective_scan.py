"""What the laws cannot say of the selective scan: blocks of time that are shorter than the input."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from everstate.core.packing import Packing
from everstate.ops import selective_scan, use
from everstate.ops.example import Draw
from everstate.ops.selective_scan.example import selective_scan as variants

# By its full name: `everstate.ops.selective_scan` is also the op.
blocked = importlib.import_module("everstate.ops.selective_scan.blocked")


def results(backend: str, batch: int, length: int, packing: Packing | None = None) -> list[Tensor]:
    """Outputs, final state and the gradients of every argument."""
    example = variants["mamba1"](Draw(), batch, length, len(packing) if packing is not None else batch)
    arguments = {**example.timed, **example.fixed, "state": example.state}
    arguments = {key: value.detach().requires_grad_() for key, value in arguments.items()}
    with use(backend):
        y, after = selective_scan(**arguments, packing=packing)
    weights = torch.linspace(0.5, 2, length, dtype=torch.float64)[:, None]
    total = (y * weights).square().sum() + after.sin().sum()
    return [y, after, *torch.autograd.grad(total, list(arguments.values()))]


@pytest.mark.parametrize("numbers", [1, 40, 120, 280, 2**19])
@pytest.mark.parametrize("packing", [None, Packing.of_lengths([3, 1, 10])])
def test_any_length_of_block_gives_the_same(
    numbers: int, packing: Packing | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "BLOCK_NUMBERS", numbers)
    batch, length = (2, 13) if packing is None else (1, packing.total)
    for got, expected in zip(
        results("torch", batch, length, packing), results("reference", batch, length, packing), strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_one_channel_by_hand() -> None:
    one = torch.ones(1, 2, 1, dtype=torch.float64)
    A, start = -torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1, 1), 4.0, dtype=torch.float64)
    y, state = selective_scan(3 * one, 0.5 * one, A, 2 * one, 10 * one, start, D=torch.full((1,), 7.0).double())
    first = math.exp(-0.5) * 4 + 0.5 * 3 * 2
    second = math.exp(-0.5) * first + 0.5 * 3 * 2
    assert y.flatten().tolist() == pytest.approx([10 * first + 21, 10 * second + 21])
    assert state.item() == pytest.approx(second)
