"""What the Triton kernels of linear maps cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.state import Slots
from everstate.ops.conv1d.limits import accepts_step
from everstate.ops.limits import step_refusal

ROWS = 4
"""Rows of x up to which the kernels are faster than a product of matrices."""


def accepts_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `linear` do not serve these arguments, or None."""
    rows = x.numel() // max(x.shape[-1], 1)
    if not 0 < rows <= ROWS:
        return f"takes 1 to {ROWS} rows, not {rows}"
    if scale is None and weight.dtype != x.dtype:
        return f"takes x and weights of one dtype, not {x.dtype} and {weight.dtype}"
    if not weight.is_contiguous():
        return "takes weights that lie row by row in memory"
    return step_refusal(x, weight, bias, scale, norm)


def accepts_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    state: Tensor,
    slots: Slots = None,
    *,
    scale: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `linear_conv_step_` do not serve these arguments, or None."""
    return accepts_linear(x, weight, bias, scale=scale) or accepts_step(x, conv_weight, conv_bias, state, slots)
