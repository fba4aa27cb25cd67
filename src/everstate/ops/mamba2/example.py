"""Arguments of the scan of a Mamba-2 layer for the laws and the benchmarks."""

from __future__ import annotations

from typing import Any

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.mamba2.ends import Mamba2Layer, Mamba2State

HEADS, HEADDIM, D_STATE, GROUPS, TAPS = 4, 3, 5, 2, 4


def _example(draw: Draw, batch: int, length: int, sequences: int, **more: Any) -> Example:
    channels = HEADS * HEADDIM + 2 * GROUPS * D_STATE
    settings: dict[str, Any] = {"norm": draw.normal(HEADS * HEADDIM), "D": draw.normal(HEADS), **more}
    return Example(
        timed={"projected": draw.normal(batch, length, HEADS * HEADDIM + channels + HEADS)},
        state=Mamba2State(
            conv=draw.normal(sequences, channels, TAPS - 1), ssm=draw.normal(sequences, HEADS, HEADDIM, D_STATE)
        ),
        fixed={
            "layer": Mamba2Layer(
                conv_weight=draw.normal(channels, TAPS, scale=0.5),
                conv_bias=settings.pop("conv_bias", draw.normal(channels)),
                dt_bias=draw.uniform(HEADS, low=-4.0, high=-1.0),
                A_log=draw.uniform(HEADS, high=1.0),
                ngroups=GROUPS,
                norm_eps=0.1,
                **settings,
            )
        },
    )


def _default(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences)


def _norm_before_gate(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    D = draw.normal(HEADS, HEADDIM)
    return _example(draw, batch, length, sequences, norm_before_gate=True, D=D, conv_bias=None)


def _gate_alone(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, norm=None, dt_limit=(0.05, 0.3))


def _projected(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _example(draw, batch, length, sequences)
    return example._replace(fixed={**example.fixed, "out_proj": draw.normal(7, HEADS * HEADDIM)})


def _elapsed(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _example(draw, batch, length, sequences)
    delta_t = draw.uniform(batch, length, low=0.5, high=2.0)
    return example._replace(timed={**example.timed, "delta_t": delta_t})


mamba2_scan: Variants = {
    "default": _default,
    "norm before gate": _norm_before_gate,
    "gate alone": _gate_alone,
    "projected": _projected,
    "elapsed": _elapsed,
}
