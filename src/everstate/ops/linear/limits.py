"""What the Triton kernels of linear maps cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.core.state import Slots
from everstate.ops.conv1d.limits import accepts_step
from everstate.ops.limits import step_refusal

ROWS, EXACT_ROWS = 64, 8
"""Rows of x up to which reading the weights takes longest; and those that need no matrix products."""


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
    limit = EXACT_ROWS if torch.float32 in (x.dtype, weight.dtype) else ROWS
    if not 0 < rows <= limit:
        return f"takes 1 to {limit} rows of {str(x.dtype).removeprefix('torch.')}, not {rows}"
    if norm is not None and rows > EXACT_ROWS and x.dtype is torch.float16:
        return f"takes a norm of float16, which might overflow, of up to {EXACT_ROWS} rows, not {rows}"
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
