"""The kernels of `trapezoid_scan` with several ranks for Hopper GPUs: on one, or imitated."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from everstate.core.packing import Packing
from everstate.ops import trapezoid_scan, use
from everstate.ops.example import Draw, Example
from tests import imitation
from tests.ops.test_trapezoid_hopper import agree, call
from tests.ops.test_trapezoid_triton import draw, outcome


def mimo(
    device: torch.device, batch: int, length: int, heads: int, rank: int, d_state: int = 64, groups: int = 1,
    dtype: torch.dtype = torch.bfloat16, sequences: int | None = None,
) -> Example:  # fmt: skip
    return draw(device, batch, length, heads, 64, groups, d_state, rank, d_state // 2, dtype, sequences)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "rank", "d_state", "groups", "dtype"),
    [
        (1, 37, 2, 4, 128, 1, torch.bfloat16), (2, 33, 4, 2, 64, 2, torch.bfloat16),
        (2, 7, 2, 8, 128, 1, torch.float16), (4, 1, 4, 4, 64, 1, torch.bfloat16),
    ],
)  # fmt: skip
def test_any_length(
    batch: int, length: int, heads: int, rank: int, d_state: int, groups: int, dtype: torch.dtype, hopper: torch.device
) -> None:
    agree(mimo(hopper, batch, length, heads, rank, d_state, groups, dtype))


def test_neighbours_that_turn_and_no_biases_and_factors(hopper: torch.device) -> None:
    agree(mimo(hopper, 1, 20, 2, 4)._replace(fixed={}))


@pytest.mark.parametrize("name", ["B_bias", "C_bias"])
def test_one_bias(name: str, hopper: torch.device) -> None:
    example = mimo(hopper, 1, 20, 2, 4)
    agree(example._replace(fixed={name: example.fixed[name]}))


def test_rows_that_are_part_of_wider_ones(hopper: torch.device) -> None:
    example = mimo(hopper, 2, 20, 2, 4)
    wide = Draw(dtype=torch.bfloat16, device=hopper).normal(2, 20, 256)
    agree(example._replace(timed={**example.timed, "x": wide[..., 64:192].unflatten(-1, (2, 64))}))


@pytest.mark.parametrize("programs", [2, 8])
def test_segments_and_parts_of_the_heads(programs: int, hopper: torch.device, fill: Callable[[int], None]) -> None:
    fill(programs)
    example = mimo(hopper, 1, 50, 4, 4)
    assert len(call(example).plan.segments) == (1 if programs == 2 else 4)
    agree(example)


def test_packed_sequences_of_whole_chunks(hopper: torch.device, fill: Callable[[int], None]) -> None:
    fill(4)
    agree(mimo(hopper, 1, 48, 2, 4, sequences=2), packing=Packing([0, 16, 48]))


def test_others_are_left_to_the_other_kernels(hopper: torch.device) -> None:
    assert call(mimo(hopper, 1, 20, 2, 4)).hopper is not None
    assert call(mimo(hopper, 1, 20, 2, 3)).hopper is None
    assert call(mimo(hopper, 1, 20, 3, 4)).hopper is None
    assert call(mimo(hopper, 1, 20, 2, 4, dtype=torch.float32)).hopper is None
    assert call(draw(hopper, 1, 20, 2, 64, 1, 64, 4, 16, torch.bfloat16)).hopper is None
    assert call(mimo(hopper, 1, 48, 2, 4, sequences=2), Packing([0, 15, 48])).hopper is None


def test_sequences_do_not_meet(hopper: torch.device) -> None:
    example = mimo(hopper, 2, 20, 2, 4)
    before = outcome("triton", example)
    for name in ("x", "A", "lam", "B", "C"):
        example.timed[name][1] = torch.nan
    after = outcome("triton", example)
    shared = [5 + len(example.timed) + i for i in range(4)]  # gradients of biases, factors and D
    for at, (a, b) in enumerate(zip(before, after, strict=True)):
        assert at in shared or torch.equal(a[0], b[0]), at


def test_an_output_does_not_depend_on_what_comes_later(hopper: torch.device) -> None:
    example = mimo(hopper, 1, 40, 2, 4)
    with use("triton"):
        before, _ = trapezoid_scan(**example.timed, state=example.state, **example.fixed)
        for value in example.timed.values():
            value[:, 21:] *= 0.5
        after, _ = trapezoid_scan(**example.timed, state=example.state, **example.fixed)
    # Token 20 adds with the next one, but nothing to its own output.
    assert torch.equal(before[:, :21], after[:, :21]) and not torch.equal(before, after)


def test_copies_may_come_late(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch, fill: Callable[[int], None]
) -> None:
    """Copies come in any order, and heads take turns in the same rooms: nobody may take another's turn for its own."""
    if hopper.type == "cuda":
        pytest.skip("on a GPU they come when they come")
    fill(1)
    example = mimo(hopper, 1, 64, 2, 4)
    expected, at_once, count = outcome("triton", example), imitation._copy_in, itertools.count()

    def late(*copy: Any) -> None:
        with torch.no_grad():
            at_once(*copy)

    def sometimes_late(*copy: Any) -> None:
        if next(count) % 7 == 1:
            threading.Timer(0.1, late, copy).start()
        else:
            at_once(*copy)

    monkeypatch.setattr(imitation, "_copy_in", sometimes_late)
    assert all(torch.equal(a, b) for a, b in zip(outcome("triton", example), expected, strict=True))


def test_the_same_call_gives_the_same_bits(hopper: torch.device) -> None:
    cuda = hopper.type == "cuda"
    example = mimo(hopper, *((8, 530, 32) if cuda else (1, 40, 2)), 4)
    first, *others = (outcome("triton", example) for _ in range(20 if cuda else 2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
