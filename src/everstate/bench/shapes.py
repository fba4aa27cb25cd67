"""Arguments of ops as one layer of a published model has them, at any width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from everstate.core.packing import Packing
from everstate.ops import AttentionState, Mamba3Layer, TrapezoidState, route
from everstate.ops.example import Draw, Example

HEADDIM, D_STATE = 64, 128
PAGE = 64
"""Tokens of a block of keys and values."""


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


def _attention(draw: Draw, d_inner: int, length: int) -> Example:
    """One packed sequence, which `examples.cut` makes several of; nothing is remembered, as in training."""
    heads = max(d_inner // 128, 1)
    groups = max(heads // 4, 1)
    return Example(
        timed={
            "q": draw.normal(1, length, heads, 128),
            "k": draw.normal(1, length, groups, 128),
            "v": draw.normal(1, length, groups, 128),
        },
        state=AttentionState(
            k=draw.normal(1, 0, groups, 128),
            v=draw.normal(1, 0, groups, 128),
            pos=torch.zeros(1, dtype=torch.int64, device=draw.device),
        ),
        fixed={"packing": Packing.of_lengths([length])},
    )


def _attention_step(draw: Draw, d_inner: int, length: int) -> Example:
    """A token of each of `length` sequences, which together have read 2^20 tokens where a layer has 32 heads.

    Their blocks lie in no order, and each has one more for the tokens that it will write.
    """
    timed = _attention(draw, d_inner, length).timed
    read, groups = 256 * d_inner // length, timed["k"].shape[2]
    blocks = -(-read // PAGE) + 1
    return Example(
        timed=timed,
        state=AttentionState(
            k=draw.normal(blocks, PAGE, groups, 128),
            v=draw.normal(blocks, PAGE, groups, 128),
            pos=torch.full((1,), read, device=draw.device),
        ),
        fixed={"pages": draw.uniform(length * blocks).argsort().view(length, blocks)},
    )


def experts(draw: Draw, d_inner: int, length: int, *, count: int = 64, top_k: int = 8) -> Example:
    """So many, of which a token goes through `top_k`; those of OLMoE by default."""
    d_model, d_hidden = d_inner // 2, d_inner // 4
    weights, indices = route(draw.normal(1, length, count), top_k=top_k)
    return Example(
        timed={"x": draw.normal(1, length, d_model), "weights": weights, "indices": indices},
        fixed={
            "w_in": draw.normal(count, 2 * d_hidden, d_model, scale=d_model**-0.5),
            "w_out": draw.normal(count, d_model, d_hidden, scale=d_hidden**-0.5),
        },
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
    "attention, packed": _attention,
    "experts": experts,
}
"""Those, and what only a GPU has its own implementation of, or the memory for."""

STEPS: dict[str, Shape] = {
    "ssd_step_": _ssd_scan,
    "selective_step_": _selective_scan,
    "mamba3_step_": partial(_mamba3_scan, rank=1),
    "mamba3_step_, 4 ranks": partial(_mamba3_scan, rank=4),
    "attention_step_, paged": _attention_step,
}
"""Ops that read one token of each of `length` sequences, in the shapes of a scan whose state they step."""


def op_of(name: str) -> str:
    """The op that is measured under a name: what stands before a comma."""
    return name.partition(",")[0]
