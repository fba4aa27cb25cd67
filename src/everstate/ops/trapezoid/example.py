"""Arguments of the trapezoid ops for the laws and the benchmarks."""

from __future__ import annotations

import math

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.trapezoid import TrapezoidState, trapezoid_step_

HEADS, HEADDIM, D_STATE = 4, 3, 6


def _example(
    draw: Draw, batch: int, length: int, sequences: int, rank: int, groups: int, pairs: int, heads: int = HEADS
) -> Example:
    return Example(
        timed={
            "x": draw.normal(batch, length, heads, HEADDIM),
            "dt": draw.uniform(batch, length, heads, low=0.1),
            "A": -draw.uniform(batch, length, heads, low=0.01, high=2.0),
            "lam": draw.uniform(batch, length, heads),
            "omega": draw.uniform(batch, length, pairs, low=-math.pi, high=math.pi),
            "B": draw.normal(batch, length, rank, groups, D_STATE),
            "C": draw.normal(batch, length, rank, groups, D_STATE),
        },
        state=TrapezoidState(
            ssm=draw.normal(sequences, heads, HEADDIM, D_STATE),
            k=draw.normal(sequences, rank, heads, D_STATE),
            x=draw.normal(sequences, heads, HEADDIM),
            angle=draw.uniform(sequences, heads, pairs, low=-math.pi, high=math.pi),
        ),
        fixed={
            "B_bias": draw.normal(heads, rank, D_STATE),
            "C_bias": draw.normal(heads, rank, D_STATE),
            "D": draw.normal(heads),
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


def _gated(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _example(draw, batch, length, sequences, rank=2, groups=1, pairs=1, heads=2)
    gate = draw.normal(batch, length, 2, 2, HEADDIM)
    return example._replace(timed={**example.timed, "z": gate}, fixed={"D": example.fixed["D"]}, step=None)


trapezoid_scan: Variants = {"siso": _siso, "mimo": _mimo, "no bias, no factors": _bare, "gate": _gated}
