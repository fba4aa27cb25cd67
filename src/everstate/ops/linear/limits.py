"""What the Triton kernels of linear maps cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.core.kernels import capability
from everstate.core.state import Slots
from everstate.ops.conv1d.limits import accepts_step
from everstate.ops.limits import step_refusal
from everstate.ops.norm.normed import Normed

FEW = 4
"""Rows of x up to which numbers can be multiplied one by one: matrix units would wait for memory just as long."""
ROWS = 64
"""Rows of x up to which the kernels are faster than the library's products, and than widening weights of 8 bits."""
BLOCK_K = 128
"""What a width must be a multiple of for matrix products: a program takes so many numbers, or half or twice."""
LEAST = 32
"""Outputs of a program of matrix products, or twice as many."""
PARTS = 16_384
"""Most sums of squares of all rows together: every program reads them all."""


def accepts_linear(
    x: Tensor | Normed, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None
) -> str | None:
    """Why the kernels of `linear` do not serve these arguments, or None."""
    x, squares = (x.x, x.squares) if isinstance(x, Normed) else (x, None)
    rows = x.numel() // max(x.shape[-1], 1)
    if not 0 < rows <= ROWS:
        return f"takes 1 to {ROWS} rows, not {rows}"
    if weight.dtype not in (x.dtype, torch.int8):
        return f"takes x and weights of one dtype, not {x.dtype} and {weight.dtype}"
    if not weight.is_contiguous():
        return "takes weights that lie row by row in memory"
    if squares is not None and squares.numel() > PARTS:
        return f"takes up to {PARTS} sums of squares, not {squares.numel()}"
    refused = step_refusal(x, weight, bias, scale, squares)
    return refused or (refusal_of_tiles(x.dtype, x.shape[-1], x.device) if rows > FEW else None)


def refusal_of_tiles(dtype: torch.dtype, width: int, device: torch.device) -> str | None:
    """Why rows of this dtype and width are not for the kernel of matrix products."""
    if dtype.itemsize != 2:
        return f"takes more than {FEW} rows in 16 bits, not {dtype}"
    if width % BLOCK_K:
        return f"takes more than {FEW} rows of a multiple of {BLOCK_K} numbers, not {width}"
    if capability(device) < (9, 0):
        return f"needs a GPU of compute capability 9.0 or newer for more than {FEW} rows"
    return None


def refusal_to_leave(x: Tensor, width: int, parts: int) -> str | None:
    """Why the division of a norm is not to be left to the linear map behind it, or None: of as many rows as x has, of
    its dtype, but of this width, and of so many sums of squares each."""
    rows = len(x)
    if x.dtype == torch.float16:
        return "leaves no norm undivided in torch.float16, which may overflow"
    if not 0 < rows <= ROWS or rows * parts > PARTS:
        return f"leaves up to {ROWS} rows and {PARTS} sums of squares undivided, not {rows} and {rows * parts}"
    why = refusal_of_tiles(x.dtype, width, x.device) if rows > FEW else None
    return None if why is None else f"leaves a norm undivided to a linear map that {why}"


def accepts_conv_step(
    x: Tensor | Normed,
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
    rows = x.x if isinstance(x, Normed) else x
    return accepts_linear(x, weight, bias, scale=scale) or accepts_step(rows, conv_weight, conv_bias, state, slots)


def accepts_add(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    *,
    scale: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `linear_add_rms_norm` do not serve these arguments, or None."""
    rows, outputs = x.x if isinstance(x, Normed) else x, len(weight)
    parts = outputs if len(rows) <= FEW else -(-outputs // LEAST)  # of a few rows a program may have one output
    return (
        accepts_linear(x, weight, bias, scale=scale)
        or step_refusal(residual, norm)
        or refusal_to_leave(rows, outputs, parts)
    )
