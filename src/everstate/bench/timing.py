"""How a figure is made: first the gate, then every candidate in turn, and the medians of many turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from everstate.core.state import tensors

HEAD_START = 10_000_000
"""Cycles that a GPU waits before it is timed: some milliseconds."""


@dataclass(frozen=True)
class Gate:
    """What must hold before anything is timed: the largest relative error found, and the largest allowed."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is as small as it must be."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Timing:
    """Seconds of each call of one candidate, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls were faster."""
        return median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles: half of the calls lie between them."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def ratio(self, other: Timing) -> float:
        """How many times as long as `other` this took: the median of the ratios of each turn."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    gate: Gate,
    repeats: int,
    device: torch.device | str = "cpu",
    *,
    on_device: bool = False,
    settle: bool = False,
) -> dict[str, Timing]:
    """Time all candidates in turn, `repeats` times over, after a call of each that is not timed.

    What else the machine does then disturbs all alike, and ratios hold where absolute times do not. Behind a gate that
    did not pass nothing is timed, and the result is empty. With `on_device` only the work of the GPU counts, without
    the time that Python takes to ask for it. With `settle` each is called once more before it is timed, when what the
    others hold of a GPU's memory in reserve was given back: large models would pay for each other's.
    """
    if not gate.passed:
        return {}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, candidate in candidates.items():
            if settle:
                torch.cuda.empty_cache()
                _seconds(candidate, torch.device(device))
            taken = _seconds_of_gpu(candidate) if on_device else _seconds(candidate, torch.device(device))
            if turn > 0:
                seconds[name].append(taken)
    return {name: Timing(tuple(each)) for name, each in seconds.items()}


def _seconds(candidate: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    candidate()
    _wait_for(device)
    return time.perf_counter() - start


def _seconds_of_gpu(candidate: Callable[[], object]) -> float:
    """Between two marks in the queue of the GPU, which sleeps until the host has filled it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    start.record()
    candidate()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def relative_error(got: Any, expected: Any) -> float:
    """The largest difference between corresponding tensors, relative to the largest value of the expected one.

    Infinite where a difference is not a number.
    """
    errors = [0.0]
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        if other.numel() > 0:
            scale = max(other.abs().max().item(), torch.finfo(torch.float32).tiny)
            error = (one - other).abs().max().item() / scale
            errors.append(math.inf if math.isnan(error) else error)
    return max(errors)


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
