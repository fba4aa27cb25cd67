"""Arguments of the gated delta rule for the laws and the benchmarks."""

from __future__ import annotations

from torch.nn.functional import normalize

from everstate.ops.delta import gated_delta_step_
from everstate.ops.example import Draw, Example, Variants


def _heads(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    groups, heads, width_k, width_v = 2, 4, 5, 3
    return Example(
        timed={
            "q": draw.normal(batch, length, groups, width_k),
            "k": normalize(draw.normal(batch, length, groups, width_k), dim=-1),
            "v": draw.normal(batch, length, heads, width_v),
            "a": -draw.uniform(batch, length, heads, low=0.01, high=2.0),
            "beta": draw.uniform(batch, length, heads, high=2.0),
        },
        state=draw.normal(sequences, heads, width_k, width_v),
        step=gated_delta_step_,
    )


def _channels(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _heads(draw, batch, length, sequences)
    return example._replace(timed={**example.timed, "a": -draw.uniform(batch, length, 4, 5, low=0.01, high=2.0)})


def _forgetful(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    """A decay whose inverse over a chunk no float holds."""
    example = _channels(draw, batch, length, sequences)
    return example._replace(timed={**example.timed, "a": -draw.uniform(batch, length, 4, 5, high=100.0)})


gated_delta_scan: Variants = {"heads": _heads, "channels": _channels, "forgetful": _forgetful}
