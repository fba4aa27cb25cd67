"""Arguments of the selective scan for the laws and the benchmarks."""

from __future__ import annotations

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.selective_scan import selective_step_


def _mamba1(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    channels, d_state = 5, 4
    return Example(
        timed={
            "x": draw.normal(batch, length, channels),
            "dt": draw.uniform(batch, length, channels, low=0.01, high=0.5),
            "B": draw.normal(batch, length, d_state),
            "C": draw.normal(batch, length, d_state),
        },
        state=draw.normal(sequences, channels, d_state),
        fixed={"A": -draw.uniform(channels, d_state, low=0.5, high=4.0), "D": draw.normal(channels)},
        step=selective_step_,
    )


def _no_skip(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _mamba1(draw, batch, length, sequences)
    return example._replace(fixed={"A": example.fixed["A"]})


def _gated(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _mamba1(draw, batch, length, sequences)
    channels = example.timed["x"].shape[2]
    low_rank = draw.normal(batch, length, channels, scale=2.0)
    return example._replace(
        timed={**example.timed, "dt": low_rank, "z": draw.normal(batch, length, channels)},
        fixed={**example.fixed, "dt_bias": draw.normal(channels)},
    )


selective_scan: Variants = {"mamba1": _mamba1, "no skip": _no_skip, "gate and bias": _gated}
