"""Arguments of the gated activation for the laws and the benchmarks."""

from __future__ import annotations

from everstate.ops.activations import Activation
from everstate.ops.example import Draw, Example, Variants


def _of(activation: Activation) -> Variants:
    def example(draw: Draw, batch: int, length: int, sequences: int) -> Example:
        return Example(timed={"h": draw.normal(batch, length, 12)}, fixed={"activation": activation}, packs=False)

    return {activation: example}


glu: Variants = _of("silu") | _of("relu2") | _of("gelu") | _of("gelu_tanh")


def _gated(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(timed={name: draw.normal(batch, length, 12) for name in "yz"}, packs=False)


gated: Variants = {"silu": _gated}
