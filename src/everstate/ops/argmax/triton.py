"""The largest of each row on a GPU: a program reads a row in pieces that it asks for all at once."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.ops.triton_launch import launch, power_of_2
from everstate.ops.triton_rows import dense, follow_last, launch_options

BLOCK = 8192


def argmax(x: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
    """See `everstate.ops.argmax`."""
    return _argmax(x)


@kernel_op("argmax")
def _argmax(x: Tensor) -> Tensor:
    x, found = dense(x), x.new_empty(len(x), dtype=torch.int64)
    block = min(power_of_2(x.shape[1]), BLOCK)
    launch(
        _argmax_kernel, (len(x),),
        x, found, x.stride(0), SIZE=x.shape[1], BLOCK=block, num_warps=min(max(block // 512, 1), 16),
        **launch_options(x.device),
    )  # fmt: skip
    return found


@_argmax.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(len(x), dtype=torch.int64)


@triton.jit
def _argmax_kernel(x, found, x_row, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program per row; each place of a block keeps the first of the largest that it has seen."""
    follow_last(OVERLAP)
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    best, where = tl.full((BLOCK,), float("-inf"), tl.float32), at
    for first in tl.static_range(0, SIZE, BLOCK):
        now = tl.load(x + row * x_row + first + at, mask=first + at < SIZE, other=float("-inf")).to(tl.float32)
        where = tl.where(now > best, first + at, where)
        best = tl.maximum(best, now)
    first_best = tl.min(tl.where(best == tl.max(best, 0), where, SIZE - 1), 0)
    tl.store(found + row, tl.minimum(first_best, SIZE - 1).to(tl.int64))
