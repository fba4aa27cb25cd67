"""Arguments of the ops of a Mamba-3 layer for the laws and the benchmarks."""

from __future__ import annotations

import math
from typing import Any

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.mamba3 import mamba3_step_
from everstate.ops.mamba3.ends import Mamba3Layer
from everstate.ops.trapezoid import TrapezoidState

HEADS, HEADDIM, D_STATE = 2, 3, 6


def _example(
    draw: Draw, batch: int, length: int, sequences: int, rank: int, pairs: int, ngroups: int, heads: int = HEADS,
    **more: Any,
) -> Example:  # fmt: skip
    width = heads * (2 * HEADDIM + 3) + 2 * rank * ngroups * D_STATE + pairs
    return Example(
        timed={
            "projected": draw.normal(batch, length, width),
            "delta_t": draw.uniform(batch, length, low=0.5, high=2.0),
        },
        state=TrapezoidState(
            ssm=draw.normal(sequences, heads, HEADDIM, D_STATE),
            k=draw.normal(sequences, rank, heads, D_STATE),
            x=draw.normal(sequences, heads, HEADDIM),
            angle=draw.uniform(sequences, heads, pairs, low=-math.pi, high=math.pi),
        ),
        fixed={
            "layer": Mamba3Layer(
                dt_bias=draw.uniform(heads, low=-4.0, high=-1.0),
                B_norm=draw.normal(D_STATE),
                C_norm=draw.normal(D_STATE),
                B_bias=draw.normal(heads, rank, D_STATE),
                C_bias=draw.normal(heads, rank, D_STATE),
                D=draw.normal(heads),
                ngroups=ngroups,
                **more,
            )
        },
        step=mamba3_step_,
    )


def _siso(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _example(draw, batch, length, sequences, rank=1, pairs=2, ngroups=2, heads=4, A_floor=0.5)
    return example._replace(timed={"projected": example.timed["projected"]})


def _siso_norm(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    factors = {name: draw.normal(HEADS, 1, HEADDIM) for name in ("mimo_z", "mimo_o")}
    more: dict[str, Any] = {"norm": draw.normal(HEADS * HEADDIM), "interleaved": False, **factors}
    return _example(draw, batch, length, sequences, rank=1, pairs=3, ngroups=1, **more)


def _mimo(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    factors = {name: draw.normal(HEADS, 3, HEADDIM) for name in ("mimo_x", "mimo_z", "mimo_o")}
    more: dict[str, Any] = {"interleaved": False, "A_activation": "heavy_tail", **factors}
    return _example(draw, batch, length, sequences, rank=3, pairs=3, ngroups=1, **more)


def _mimo_norm(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    factors = {name: draw.normal(HEADS, 2, HEADDIM) for name in ("mimo_x", "mimo_z", "mimo_o")}
    more: dict[str, Any] = {"norm": draw.normal(HEADS * HEADDIM), **factors}
    return _example(draw, batch, length, sequences, rank=2, pairs=1, ngroups=2, **more)


mamba3_scan: Variants = {"siso": _siso, "siso, norm": _siso_norm, "mimo": _mimo, "mimo, norm": _mimo_norm}
