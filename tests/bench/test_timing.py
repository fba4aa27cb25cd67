"""Gates and turns."""

from __future__ import annotations

import math

import pytest
import torch

from everstate.bench.timing import Gate, Timing, interleave, relative_error, with_threads


def test_candidates_take_turns_and_the_first_is_not_counted() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, Gate(0.0, 1e-10), 3)
    assert "".join(calls) == "abababab"
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("error", [2e-10, math.inf, math.nan])
def test_nothing_runs_behind_a_closed_gate(error: float) -> None:
    calls: list[str] = []
    assert interleave({"a": lambda: calls.append("a")}, Gate(error, 1e-10), 3) == {}
    assert calls == []


def test_a_disturbed_turn_is_outvoted() -> None:
    ours, theirs = Timing((1.0, 2.0, 1.0, 50.0, 1.0)), Timing((4.0, 8.0, 4.0, 4.0, 4.0))
    assert ours.median == 1.0
    assert ours.spread == (1.0, 2.0)
    assert theirs.ratio(ours) == 4.0


def test_relative_error() -> None:
    expected = (torch.tensor([1.0, -4.0]), torch.zeros(0))
    assert relative_error((torch.tensor([1.0, -3.0]), torch.zeros(0)), expected) == 0.25
    assert relative_error((torch.tensor([math.nan, -4.0]), torch.zeros(0)), expected) == math.inf


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with with_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
