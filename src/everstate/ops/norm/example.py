"""Arguments of the norms for the laws and the benchmarks."""

from __future__ import annotations

from everstate.ops.example import Draw, Example, Variants


def _norm(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(
        timed={"x": draw.normal(batch, length, 8)}, fixed={"weight": draw.normal(8), "groups": 2}, packs=False
    )


def _gated(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _norm(draw, batch, length, sequences)
    return example._replace(timed={**example.timed, "z": draw.normal(batch, length, 8)})


def _norm_before_gate(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _gated(draw, batch, length, sequences)
    return example._replace(fixed={**example.fixed, "norm_before_gate": True})


def _add(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    timed = {"x": draw.normal(batch, length, 12), "y": draw.normal(batch, length, 12)}
    return Example(timed=timed, fixed={"weight": draw.normal(12)}, packs=False)


def _add_some(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _add(draw, batch, length, sequences)
    return example._replace(fixed={**example.fixed, "multiplier": 0.3})


rms_norm: Variants = {"groups": _norm}
gated_rms_norm: Variants = {"norm after gate": _gated, "norm before gate": _norm_before_gate}
add_rms_norm: Variants = {"residual": _add, "multiplier": _add_some}
