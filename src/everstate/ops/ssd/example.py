"""Arguments of the SSD ops for the laws and the benchmarks."""

from __future__ import annotations

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.ssd import ssd_step_


def _mamba2(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    heads, headdim, groups, d_state = 4, 3, 2, 5
    return Example(
        timed={
            "x": draw.normal(batch, length, heads, headdim),
            "a": -draw.uniform(batch, length, heads, low=0.01, high=2.0),
            "s": draw.uniform(batch, length, heads, low=0.1),
            "B": draw.normal(batch, length, groups, d_state),
            "C": draw.normal(batch, length, groups, d_state),
        },
        state=draw.normal(sequences, heads, headdim, d_state),
        fixed={"D": draw.normal(heads)},
        step=ssd_step_,
    )


def _given_diagonal(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _mamba2(draw, batch, length, sequences)
    diagonal = draw.normal(batch, length, 4, 1)
    return example._replace(timed={**example.timed, "diagonal": diagonal}, step=None)


def _gated(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _mamba2(draw, batch, length, sequences)
    return example._replace(timed={**example.timed, "z": draw.normal(batch, length, 4, 3)}, step=None)


ssd_scan: Variants = {"mamba2": _mamba2, "given diagonal": _given_diagonal, "gate": _gated}
