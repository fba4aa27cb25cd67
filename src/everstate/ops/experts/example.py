"""Arguments of the experts for the laws and the benchmarks."""

from __future__ import annotations

from everstate.ops.example import Draw, Example, Variants


def _gated(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    count, top_k, d_model, d_hidden = 5, 2, 6, 4
    return Example(
        timed={
            "x": draw.normal(batch, length, d_model),
            "weights": draw.uniform(batch, length, top_k),
            "indices": draw.integers(batch, length, top_k, high=count),
        },
        fixed={"w_in": draw.normal(count, 2 * d_hidden, d_model), "w_out": draw.normal(count, d_model, d_hidden)},
        packs=False,
    )


def _relu2(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _gated(draw, batch, length, sequences)
    w_in = example.fixed["w_in"][:, :4]
    return example._replace(fixed={**example.fixed, "w_in": w_in, "gated": False, "activation": "relu2"})


experts: Variants = {"gated": _gated, "relu2": _relu2}
