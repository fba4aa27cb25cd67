"""Arguments of the normal-plus-low-rank system and its kernel for the laws and the benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.lti_conv import Mode
from everstate.ops.lti_dplr import lti_dplr_step_

CHANNELS, PAIRS = 3, 2


def _system(draw: Draw, **settings: Any) -> dict[str, Any]:
    real, imag = -draw.uniform(CHANNELS, PAIRS, low=0.1), draw.uniform(CHANNELS, PAIRS, high=6.0)
    P, B, C = (draw.complex(CHANNELS, PAIRS, scale=0.7) for _ in range(3))
    dt = draw.uniform(CHANNELS, low=0.1, high=0.5)
    return {"A": torch.complex(real, imag), "P": P, "B": B, "C": C, "dt": dt, **settings}


def _convolution(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(
        timed={"u": draw.normal(batch, length, CHANNELS)},
        state=draw.complex(sequences, CHANNELS, PAIRS),
        fixed=_system(draw),
        step=lti_dplr_step_,
    )


def _scan(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _in_mode("scan", _convolution(draw, batch, length, sequences))


def _recurrence(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _in_mode("recurrence", _convolution(draw, batch, length, sequences))


def _in_mode(mode: Mode, example: Example) -> Example:
    return example._replace(fixed={**example.fixed, "mode": mode}, step=None)


def _irregular(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _convolution(draw, batch, length, sequences)
    return example._replace(timed={**example.timed, "delta_t": draw.uniform(batch, length, low=0.5, high=2.0)})


lti_dplr: Variants = {
    "convolution": _convolution,
    "scan": _scan,
    "recurrence": _recurrence,
    "irregular": _irregular,
}


def _kernel(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(timed={}, fixed=_system(draw, length=length), packs=False)


lti_kernel_dplr: Variants = {"kernel": _kernel}
