"""Arguments of the long convolution for the laws and the benchmarks."""

from __future__ import annotations

from everstate.ops.example import Draw, Example, Variants


def _long(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(
        timed={"u": draw.normal(batch, length, 3)},
        state=draw.normal(sequences, 3, 39),
        fixed={"K": draw.normal(3, 40, scale=0.3)},
    )


def _short(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    """A kernel so short that the input is cut into frames."""
    return Example(
        timed={"u": draw.normal(batch, length, 3)}, state=draw.normal(sequences, 3, 2), fixed={"K": draw.normal(3, 3)}
    )


lti_conv: Variants = {"long": _long, "short": _short}
