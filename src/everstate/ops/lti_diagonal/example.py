"""Arguments of the diagonal system and its kernel for the laws and the benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.lti_conv import Mode
from everstate.ops.lti_diagonal import lti_diagonal_step_

CHANNELS, PAIRS = 4, 3


def _system(draw: Draw, groups: int, **settings: Any) -> dict[str, Tensor | Any]:
    real, imag = -draw.uniform(groups, PAIRS, low=0.1), draw.uniform(groups, PAIRS, high=6.0)
    B, C = draw.complex(groups, PAIRS), draw.complex(groups, PAIRS)
    return {"A": torch.complex(real, imag), "B": B, "C": C, "dt": draw.uniform(groups, low=0.1), **settings}


def _convolution(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(
        timed={"u": draw.normal(batch, length, CHANNELS)},
        state=draw.complex(sequences, CHANNELS, PAIRS),
        fixed=_system(draw, CHANNELS),
        step=lti_diagonal_step_,
    )


def _bilinear_convolution(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    """Two channels share each system."""
    example = _convolution(draw, batch, length, sequences)
    return example._replace(fixed=_system(draw, CHANNELS // 2, discretization="bilinear"))


def _scan(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _in_mode("scan", _convolution(draw, batch, length, sequences))


def _recurrence(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _in_mode("recurrence", _convolution(draw, batch, length, sequences))


def _in_mode(mode: Mode, example: Example) -> Example:
    return example._replace(fixed={**example.fixed, "mode": mode}, step=None)


def _irregular(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _bilinear_convolution(draw, batch, length, sequences)
    return example._replace(timed={**example.timed, "delta_t": draw.uniform(batch, length, low=0.5, high=2.0)})


lti_diagonal: Variants = {
    "convolution": _convolution,
    "bilinear convolution": _bilinear_convolution,
    "scan": _scan,
    "recurrence": _recurrence,
    "irregular": _irregular,
}


def _kernel_zoh(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(timed={}, fixed=_system(draw, CHANNELS, length=length), packs=False)


def _kernel_bilinear(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    system = _system(draw, CHANNELS, length=length, discretization="bilinear")
    return Example(timed={}, fixed=system, packs=False)


lti_kernel_diagonal: Variants = {"zoh": _kernel_zoh, "bilinear": _kernel_bilinear}
