"""Arguments of the short convolution for the laws and the benchmarks."""

from __future__ import annotations

from everstate.ops.conv1d import causal_conv1d_step_
from everstate.ops.example import Draw, Example, Variants


def _silu(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(
        timed={"x": draw.normal(batch, length, 6)},
        state=draw.normal(sequences, 6, 3),
        fixed={"weight": draw.normal(6, 4), "bias": draw.normal(6), "activation": "silu"},
        step=causal_conv1d_step_,
    )


def _plain(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _silu(draw, batch, length, sequences)
    return example._replace(fixed={"weight": example.fixed["weight"], "bias": None})


causal_conv1d: Variants = {"silu": _silu, "plain": _plain}
