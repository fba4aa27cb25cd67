"""Arguments of ops as one layer of a published model has them, at any width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from everstate.ops import Mamba3Layer, TrapezoidState
from everstate.ops.example import Draw, Example

HEADDIM, D_STATE = 64, 128


def _ssd_scan(draw: Draw, d_inner: int, length: int) -> Example:
    heads = d_inner // HEADDIM
    dt = draw.uniform(1, length, heads, low=0.001, high=0.1)
    return Example(
        timed={
            "x": draw.normal(1, length, heads, HEADDIM),
            "a": -dt * draw.uniform(heads, low=1.0, high=16.0),
            "s": dt,
            "B": draw.normal(1, length, 1, D_STATE),
            "C": draw.normal(1, length, 1, D_STATE),
        },
        state=draw.normal(1, heads, HEADDIM, D_STATE),
        fixed={"D": draw.normal(heads)},
    )


def _trapezoid_scan(draw: Draw, d_inner: int, length: int, *, rank: int = 1) -> Example:
    heads, pairs = d_inner // HEADDIM, _pairs(rank)
    several = {"mimo_x": draw.normal(heads, rank, HEADDIM), "interleaved": False} if rank > 1 else {}
    return Example(
        timed={
            "x": draw.normal(1, length, heads, HEADDIM),
            "dt": draw.uniform(1, length, heads, low=0.001, high=0.1),
            "A": -draw.uniform(1, length, heads, low=0.01, high=2.0),
            "lam": draw.uniform(1, length, heads),
            "omega": draw.uniform(1, length, pairs, low=-math.pi, high=math.pi),
            "B": draw.normal(1, length, rank, 1, D_STATE),
            "C": draw.normal(1, length, rank, 1, D_STATE),
        },
        state=TrapezoidState(
            ssm=draw.normal(1, heads, HEADDIM, D_STATE),
            k=draw.normal(1, rank, heads, D_STATE),
            x=draw.normal(1, heads, HEADDIM),
            angle=draw.uniform(1, heads, pairs, low=-math.pi, high=math.pi),
        ),
        fixed={
            "B_bias": draw.normal(heads, rank, D_STATE),
            "C_bias": draw.normal(heads, rank, D_STATE),
            "D": draw.normal(heads),
            **several,
        },
    )


def _pairs(rank: int) -> int:
    """How many pairs turn, as published: of one rank half of the entries, adjacent ones together; else all of them."""
    return D_STATE // 4 if rank == 1 else D_STATE // 2


def _mamba3_scan(draw: Draw, d_inner: int, length: int, *, rank: int) -> Example:
    heads, pairs = d_inner // HEADDIM, _pairs(rank)
    names = ("mimo_x", "mimo_z", "mimo_o") if rank > 1 else ()
    factors: dict[str, Any] = {name: draw.normal(heads, rank, HEADDIM) for name in names}
    layer = Mamba3Layer(
        dt_bias=draw.uniform(heads, low=-7.0, high=-2.0),
        B_norm=draw.normal(D_STATE),
        C_norm=draw.normal(D_STATE),
        B_bias=draw.normal(heads, rank, D_STATE),
        C_bias=draw.normal(heads, rank, D_STATE),
        D=draw.normal(heads),
        interleaved=rank == 1,
        **factors,
    )
    return Example(
        timed={"projected": draw.normal(1, length, 2 * d_inner + 2 * rank * D_STATE + 3 * heads + pairs)},
        state=TrapezoidState(
            ssm=draw.normal(1, heads, HEADDIM, D_STATE),
            k=draw.normal(1, rank, heads, D_STATE),
            x=draw.normal(1, heads, HEADDIM),
            angle=draw.uniform(1, heads, pairs, low=-math.pi, high=math.pi),
        ),
        fixed={"layer": layer},
    )


def _selective_scan(draw: Draw, d_inner: int, length: int) -> Example:
    return Example(
        timed={
            "x": draw.normal(1, length, d_inner),
            "dt": draw.normal(1, length, d_inner),
            "B": draw.normal(1, length, 16),
            "C": draw.normal(1, length, 16),
            "z": draw.normal(1, length, d_inner),
        },
        state=draw.normal(1, d_inner, 16),
        fixed={
            "A": -draw.uniform(d_inner, 16, low=1.0, high=16.0),
            "D": draw.normal(d_inner),
            "dt_bias": draw.uniform(d_inner, low=-7.0, high=-2.0),  # steps of about 0.001 to 0.1
        },
    )


def _linear_scan(draw: Draw, d_inner: int, length: int) -> Example:
    return Example(
        timed={"a": draw.uniform(1, length, d_inner), "b": draw.normal(1, length, d_inner)},
        state=draw.normal(1, d_inner),
    )


def _causal_conv1d(draw: Draw, d_inner: int, length: int) -> Example:
    channels = d_inner + 2 * D_STATE
    return Example(
        timed={"x": draw.normal(1, length, channels)},
        state=draw.normal(1, channels, 3),
        fixed={"weight": draw.normal(channels, 4), "bias": draw.normal(channels), "activation": "silu"},
    )


def _gated_rms_norm(draw: Draw, d_inner: int, length: int) -> Example:
    return Example(
        timed={"x": draw.normal(1, length, d_inner), "z": draw.normal(1, length, d_inner)},
        fixed={"weight": draw.normal(d_inner)},
    )


def _rotary(draw: Draw, d_inner: int, length: int) -> Example:
    positions = draw.integers(1, length, high=2**20)
    return Example(timed={"x": draw.normal(1, length, max(d_inner // 128, 1), 128), "positions": positions})


def _linear_cross_entropy(draw: Draw, d_inner: int, length: int) -> Example:
    d_model, vocabulary = d_inner // 2, 12 * d_inner
    return Example(
        timed={"x": draw.normal(1, length, d_model), "targets": draw.integers(1, length, high=vocabulary)},
        fixed={"weight": draw.normal(vocabulary, d_model, scale=d_model**-0.5), "reduction": "sum"},
    )


Shape = Callable[[Draw, int, int], Example]
"""`(draw, d_inner, length) -> Example`."""

SHAPES: dict[str, Shape] = {
    "ssd_scan": _ssd_scan,
    "trapezoid_scan": _trapezoid_scan,
    "selective_scan": _selective_scan,
    "linear_scan": _linear_scan,
    "causal_conv1d": _causal_conv1d,
    "gated_rms_norm": _gated_rms_norm,
}
"""By op."""

GPU_SHAPES: dict[str, Shape] = {
    **SHAPES,
    "trapezoid_scan, 4 ranks": partial(_trapezoid_scan, rank=4),
    "rotary": _rotary,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""Those, and what only a GPU has its own implementation of, or the memory for."""

STEPS: dict[str, Shape] = {
    "ssd_step_": _ssd_scan,
    "selective_step_": _selective_scan,
    "mamba3_step_": partial(_mamba3_scan, rank=1),
    "mamba3_step_, 4 ranks": partial(_mamba3_scan, rank=4),
}
"""Ops that read one token, with the shapes of the scans that they belong to."""


def op_of(name: str) -> str:
    """The op that is measured under a name: what stands before a comma."""
    return name.partition(",")[0]
