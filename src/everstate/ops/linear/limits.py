"""What the Triton kernels of linear maps cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.core.kernels import capability
from everstate.core.state import Slots
from everstate.ops.conv1d.limits import accepts_step
from everstate.ops.limits import step_refusal
from everstate.ops.norm.limits import accepts_norm

FEW = 4
"""Rows of x up to which numbers are multiplied one by one: matrix units would wait for memory just as long."""
ROWS = 64
"""Rows of x up to which the kernels are faster than the library's products, and than widening weights of 8 bits."""
NORMED = 16
"""Rows up to which a norm is made in the launch of the product; with more it costs less in its own, before that."""
BLOCK_K = 128
"""What a width must be a multiple of for more than a few rows: a program takes so many numbers, or half or twice."""


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
    if weight.dtype not in (x.dtype, torch.int8):
        return f"takes x and weights of one dtype, not {x.dtype} and {weight.dtype}"
    if not weight.is_contiguous():
        return "takes weights that lie row by row in memory"
    refused = step_refusal(x, weight, bias, scale, norm)
    if refused is None and norm is not None and norm_is_apart(x):
        refused, norm = accepts_norm(x, norm), None
    return refused or (_refusal_of_tiles(x, norm) if rows > FEW else None)


def norm_is_apart(x: Tensor) -> bool:
    """Whether the norm of these rows is made before the product, in its own launch."""
    return x.numel() > NORMED * x.shape[-1]


def _refusal_of_tiles(x: Tensor, norm: Tensor | None) -> str | None:
    """Why these are not for the kernel of matrix products."""
    if x.dtype.itemsize != 2 or (norm is not None and x.dtype == torch.float16):
        # Numbers of float16 may overflow before they are normalised.
        return f"takes more than {FEW} rows in 16 bits, not {x.dtype}, and before a norm in bfloat16"
    if x.shape[-1] % BLOCK_K:
        return f"takes more than {FEW} rows of a multiple of {BLOCK_K} numbers, not {x.shape[-1]}"
    if capability(x.device) < (9, 0):
        return f"needs a GPU of compute capability 9.0 or newer for more than {FEW} rows"
    return None


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
