"""Sums over what many programs have found, each for its part, and always in the same order."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.ops.triton_launch import cdiv, launch, power_of_2

ROWS, COLUMNS = 128, 16
"""Parts that a program loads at once, and numbers of each that it sums: 64 bytes, so that programs fill a GPU."""


def total(parts: Float[Tensor, "parts *n"], dtype: torch.dtype) -> Float[Tensor, "*n"]:
    """The sum of all parts, summed in float32."""
    out, width = parts.new_empty(parts.shape[1:], dtype=dtype), parts[0].numel()
    _launch(parts, out, width, COLUMNS, False)
    return out


def total_of_heads(parts: Float[Tensor, "parts h p"], dtype: torch.dtype) -> Float[Tensor, " h"]:
    """The sum of all parts and of the numbers of each head."""
    out = parts.new_empty(parts.shape[1], dtype=dtype)
    _launch(parts, out, parts.shape[2], power_of_2(parts.shape[2]), True)
    return out


def _launch(parts: Tensor, out: Tensor, width: int, columns: int, joined: bool) -> None:
    programs = len(out) if joined else cdiv(width, columns)
    launch(
        _total_kernel, (programs,),
        parts, out, len(parts), parts.stride(0), width if joined else columns, width,
        JOINED=joined, ROWS=min(ROWS, power_of_2(len(parts))), COLUMNS=columns,
    )  # fmt: skip


@triton.jit
def _total_kernel(
    parts, out, count, stride, step, width, JOINED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program per head, or per few numbers."""
    row, at = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    columns = tl.program_id(0) * step + at
    inside = at < width if JOINED else columns < width
    summed = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        place = (first + row).to(tl.int64)[:, None] * stride + columns[None, :]
        summed += tl.load(parts + place, mask=(first + row < count)[:, None] & inside[None, :], other=0.0)
    sums = tl.sum(summed, 0)
    if JOINED:
        tl.store(out + tl.program_id(0), tl.sum(sums, 0).to(out.dtype.element_ty))
    else:
        tl.store(out + columns, sums.to(out.dtype.element_ty), mask=inside)
