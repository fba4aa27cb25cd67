"""Arguments of the rotations for the laws and the benchmarks."""

from __future__ import annotations

import torch

from everstate.ops.example import Draw, Example, Variants


def _all_pairs(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _pairs(draw, batch, length, 4)


def _some_adjacent_pairs(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _pairs(draw, batch, length, 3)._replace(fixed={"interleaved": True})


def _pairs(draw: Draw, batch: int, length: int, count: int) -> Example:
    angles = draw.uniform(batch, length, 1, count, high=6.0)
    timed = {"x": draw.normal(batch, length, 3, 8), "cos": torch.cos(angles), "sin": torch.sin(angles)}
    return Example(timed=timed, packs=False)


def _half_split(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    timed = {"x": draw.normal(batch, length, 3, 8), "positions": draw.integers(batch, length, high=2**20)}
    return Example(timed=timed, packs=False)


def _interleaved(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _half_split(draw, batch, length, sequences)._replace(fixed={"interleaved": True, "theta": 500.0})


def _partial(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _half_split(draw, batch, length, sequences)._replace(fixed={"rotary_dim": 4})


rotate: Variants = {"all pairs": _all_pairs, "some adjacent pairs": _some_adjacent_pairs}
rotary: Variants = {"half-split": _half_split, "interleaved": _interleaved, "partial": _partial}
