"""Rotations: golden values, and that far positions are as right as near ones."""

from __future__ import annotations

from decimal import Decimal, localcontext
from math import cos, sin

import pytest
import torch

from everstate.core.errors import BackendError, RequestError
from everstate.ops import rotary, rotate, use


@pytest.mark.parametrize(("interleaved", "pairs"), [(False, [(0, 2), (1, 3)]), (True, [(0, 1), (2, 3)])])
def test_golden_values_at_position_2(interleaved: bool, pairs: list[tuple[int, int]]) -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    expected = [0.0] * 4
    for (i, j), angle in zip(pairs, [2.0, 2.0 / 100], strict=True):
        expected[i] = x[i] * cos(angle) - x[j] * sin(angle)
        expected[j] = x[i] * sin(angle) + x[j] * cos(angle)
    row = torch.tensor(x, dtype=torch.float64).view(1, 1, 1, 4)
    y = rotary(row, torch.tensor([[2]]), theta=10000.0, interleaved=interleaved)
    assert y.flatten().tolist() == pytest.approx(expected, rel=1e-14)


def test_rotary_dim_takes_its_frequencies_from_itself_and_leaves_the_rest() -> None:
    x = torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.tensor([[5, 6, 900]])
    y = rotary(x, positions, rotary_dim=4)
    assert torch.equal(y[..., :4], rotary(x[..., :4], positions))
    assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("rotary_dim", [7, 0, -2, 10])
def test_only_an_even_number_of_what_is_there_can_be_turned(
    rotary_dim: int, backend: str, kernel_device: torch.device
) -> None:
    x, positions = torch.ones(1, 3, 2, 8, device=kernel_device), torch.arange(3, device=kernel_device)[None]
    error = BackendError if backend == "triton" else RequestError
    with use(backend), pytest.raises(error, match=f"an even number of a head's 8 numbers, not {rotary_dim}"):
        rotary(x, positions, rotary_dim=rotary_dim)


def test_rotate_pairs_over_the_whole_width_whatever_is_turned() -> None:
    """Mamba-3 turns the first s of all p / 2 pairs, so half-split partners lie p / 2 apart, not s."""
    x = torch.arange(8.0, dtype=torch.float64)
    quarter = torch.tensor([0.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert rotate(x, *quarter).tolist() == [-4, -5, 2, 3, 0, 1, 6, 7]
    assert rotate(x, *quarter, interleaved=True).tolist() == [-1, 0, -3, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("position", [0, 4095, 1_000_000, 2**30])
def test_scores_depend_on_the_distance_alone_at_any_position(position: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    near = (rotary(q, torch.tensor([[3]])) * rotary(k, torch.tensor([[0]]))).sum()
    far = (rotary(q, torch.tensor([[position + 3]])) * rotary(k, torch.tensor([[position]]))).sum()
    torch.testing.assert_close(far, near, rtol=2e-6, atol=1e-5)


def test_the_angle_at_a_million_is_right() -> None:
    """Against 40 decimal digits, in float32 inputs; with float32 frequencies the sine would be off by 0.015."""
    with localcontext(prec=40):
        angle = Decimal(1_000_000) * Decimal(10000) ** (Decimal(-2) / Decimal(64))
        exact = float(angle % Decimal("6.283185307179586476925286766559005768394"))
    x = torch.zeros(1, 1, 1, 64)
    x[..., 1] = 1.0
    y = rotary(x, torch.tensor([[1_000_000]]))[0, 0, 0]
    assert [y[1].item(), y[33].item()] == pytest.approx([cos(exact), sin(exact)], abs=1e-7)
