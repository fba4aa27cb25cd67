"""Arguments of the trapezoid ops for the laws and the benchmarks."""

from __future__ import annotations

import math

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.trapezoid import TrapezoidState, trapezoid_step_

HEADS, HEADDIM, D_STATE = 4, 3, 6


def _example(draw: Draw, batch: int, length: int, sequences: int, rank: int, groups: int, pairs: int) -> Example:
    return Example(
        timed={
            "x": draw.normal(batch, length, HEADS, HEADDIM),
            "dt": draw.uniform(batch, length, HEADS, low=0.1),
            "A": -draw.uniform(batch, length, HEADS, low=0.01, high=2.0),
            "lam": draw.uniform(batch, length, HEADS),
            "omega": draw.uniform(batch, length, pairs, low=-math.pi, high=math.pi),
            "B": draw.normal(batch, length, rank, groups, D_STATE),
            "C": draw.normal(batch, length, rank, groups, D_STATE),
        },
        state=TrapezoidState(
            ssm=draw.normal(sequences, HEADS, HEADDIM, D_STATE),
            k=draw.normal(sequences, rank, HEADS, D_STATE),
            x=draw.normal(sequences, HEADS, HEADDIM),
            angle=draw.uniform(sequences, HEADS, pairs, low=-math.pi, high=math.pi),
        ),
        fixed={
            "B_bias": draw.normal(HEADS, rank, D_STATE),
            "C_bias": draw.normal(HEADS, rank, D_STATE),
            "D": draw.normal(HEADS),
        },
        step=trapezoid_step_,
    )


def _siso(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, rank=1, groups=2, pairs=2)


def _mimo(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _example(draw, batch, length, sequences, rank=3, groups=1, pairs=3)
    return example._replace(fixed={**example.fixed, "mimo_x": draw.normal(HEADS, 3, HEADDIM), "interleaved": False})


def _bare(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, rank=2, groups=4, pairs=1)._replace(fixed={})


trapezoid_scan: Variants = {"siso": _siso, "mimo": _mimo, "no bias, no factors": _bare}
