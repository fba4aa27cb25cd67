"""Arguments of ops as one layer of a published model has them, at any width."""

from __future__ import annotations

import math
from collections.abc import Callable

from everstate.ops import TrapezoidState
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


def _trapezoid_scan(draw: Draw, d_inner: int, length: int) -> Example:
    heads, pairs = d_inner // HEADDIM, D_STATE // 4
    return Example(
        timed={
            "x": draw.normal(1, length, heads, HEADDIM),
            "dt": draw.uniform(1, length, heads, low=0.001, high=0.1),
            "A": -draw.uniform(1, length, heads, low=0.01, high=2.0),
            "lam": draw.uniform(1, length, heads),
            "omega": draw.uniform(1, length, pairs, low=-math.pi, high=math.pi),
            "B": draw.normal(1, length, 1, 1, D_STATE),
            "C": draw.normal(1, length, 1, 1, D_STATE),
        },
        state=TrapezoidState(
            ssm=draw.normal(1, heads, HEADDIM, D_STATE),
            k=draw.normal(1, 1, heads, D_STATE),
            x=draw.normal(1, heads, HEADDIM),
            angle=draw.uniform(1, heads, pairs, low=-math.pi, high=math.pi),
        ),
        fixed={
            "B_bias": draw.normal(heads, 1, D_STATE),
            "C_bias": draw.normal(heads, 1, D_STATE),
            "D": draw.normal(heads),
        },
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
    return Example(
        timed={"x": draw.normal(1, length, d_inner)},
        state=draw.normal(1, d_inner, 3),
        fixed={"weight": draw.normal(d_inner, 4), "bias": draw.normal(d_inner), "activation": "silu"},
    )


def _gated_rms_norm(draw: Draw, d_inner: int, length: int) -> Example:
    return Example(
        timed={"x": draw.normal(1, length, d_inner), "z": draw.normal(1, length, d_inner)},
        fixed={"weight": draw.normal(d_inner)},
    )


SHAPES: dict[str, Callable[[Draw, int, int], Example]] = {
    "ssd_scan": _ssd_scan,
    "trapezoid_scan": _trapezoid_scan,
    "selective_scan": _selective_scan,
    "linear_scan": _linear_scan,
    "causal_conv1d": _causal_conv1d,
    "gated_rms_norm": _gated_rms_norm,
}
"""Op -> `(draw, d_inner, length) -> Example`."""
