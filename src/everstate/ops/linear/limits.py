"""What the Triton kernels of linear maps cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.core.kernels import capability
from everstate.core.state import Slots
from everstate.ops.conv1d.limits import accepts_step
from everstate.ops.limits import refusal_of_matrices, refusal_of_strides, step_refusal
from everstate.ops.norm.limits import accepts_norm
from everstate.ops.norm.normed import Normed, as_normed

FEW = 4
"""Rows of x up to which numbers can be multiplied one by one: matrix units would wait for memory just as long."""
ROWS = 64
"""Rows of x up to which the kernels are faster than the library's products, and than widening weights of 8 bits."""
BLOCK_K = 128
"""What a width must be a multiple of for matrix products: a program takes so many numbers, or half or twice."""
SQUARES = 16_384
"""Most sums of squares that a program holds beside its product: rows times sums, each rounded up to a power of two."""


def accepts_linear(
    x: Tensor | Normed, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None
) -> str | None:
    """Why the kernels of `linear` do not serve these arguments, or None."""
    x, squares, _ = as_normed(x)
    rows = x.numel() // max(x.shape[-1], 1)
    if not 0 < rows <= ROWS:
        return f"takes 1 to {ROWS} rows, not {rows}"
    if weight.dtype not in (x.dtype, torch.int8):
        return f"takes x and weights of one dtype, not {x.dtype} and {weight.dtype}"
    refused = refusal_of_matrices(weight) or step_refusal(x, weight, bias, scale, squares)
    refused = refused or refusal_of_strides(bias, scale, squares)
    if refused is None and squares is not None:
        refused = _refusal_of_squares(rows, squares.shape[-1])
    return refused or (refusal_of_tiles(x.dtype, x.shape[-1], x.device) if rows > FEW else None)


def accepts_activate(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    gated: bool = False,
    **settings: Any,
) -> str | None:
    """Why the kernels of `linear_activate` do not serve these arguments, or None."""
    if gated and len(weight) % 2:
        return f"takes as many gates as up projections, not {len(weight)} rows of weights in all"
    return accepts_linear(x, weight, bias, scale=scale)


def refusal_of_tiles(dtype: torch.dtype, width: int, device: torch.device) -> str | None:
    """Why rows of this dtype and width are not for the kernel of matrix products."""
    if dtype.itemsize != 2:
        return f"takes more than {FEW} rows in 16 bits, not {dtype}"
    if width % BLOCK_K:
        return f"takes more than {FEW} rows of a multiple of {BLOCK_K} numbers, not {width}"
    if capability(device) < (9, 0):
        return f"needs a GPU of compute capability 9.0 or newer for more than {FEW} rows"
    return None


def _refusal_of_squares(rows: int, parts: int) -> str | None:
    """Why so many rows are not divided by so many sums of squares each."""
    # By comparisons, so that a compiler need not fix the number of rows.
    filled = 1 if rows == 1 else 16 if rows <= 16 else 32 if rows <= 32 else 64
    held = filled * (1 << max(parts - 1, 0).bit_length())
    return f"holds up to {SQUARES} sums of squares, not {held}" if held > SQUARES else None


def divides(rows: int, width: int, parts: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the division of a norm is best left to what reads it: of so many rows of this width, with so many sums
    of squares each. Numbers of float16 might overflow before."""
    if dtype == torch.float16 or not 0 < rows <= ROWS or _refusal_of_squares(rows, parts) is not None:
        return False
    return rows <= FEW or refusal_of_tiles(dtype, width, device) is None


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
    refused = accepts_linear(x, weight, bias, scale=scale)
    return refused or accepts_step(as_normed(x).x, conv_weight, conv_bias, state, slots)


def accepts_add(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor,
    *,
    scale: Tensor | None = None,
    addend: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `linear_add_rms_norm` do not serve these arguments, or None."""
    refused = accepts_linear(x, weight, bias, scale=scale) or step_refusal(residual, norm, addend)
    if refused is not None:
        return refused
    shape = (as_normed(x).x.shape[0], weight.shape[0])
    if any(t is not None and t.shape != shape for t in (residual, addend)):
        return "takes a residual stream and an addend of the shape of the outputs"
    return accepts_norm(residual, norm)
