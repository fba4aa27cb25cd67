"""Arguments of the loss for the laws and the benchmarks."""

from __future__ import annotations

from everstate.ops.cross_entropy import IGNORE
from everstate.ops.example import Draw, Example, Variants

VOCABULARY = 11


def _plain(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    targets = draw.integers(batch, length, high=VOCABULARY)
    return Example(
        timed={"x": draw.normal(batch, length, 6), "targets": targets.masked_fill(targets == 0, IGNORE)},
        fixed={"weight": draw.normal(VOCABULARY, 6)},
        packs=False,
    )


def _bias_softcap_chunks(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _plain(draw, batch, length, sequences)
    return example._replace(fixed={**example.fixed, "bias": draw.normal(VOCABULARY), "softcap": 3.0, "chunk_size": 7})


linear_cross_entropy: Variants = {"plain": _plain, "bias, softcap, chunks": _bias_softcap_chunks}
