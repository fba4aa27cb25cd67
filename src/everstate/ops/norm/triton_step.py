"""The residual stream between two layers of one token: sum and norm in one launch."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.ops.triton_rows import dense, launch_options, start_next, wait_for_last


def add_rms_norm(
    x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"], weight: Float[Tensor, " d"], *, eps: float = 1e-5
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """See `everstate.ops.add_rms_norm`."""
    return _add(x, y, weight, eps)


@torch.library.custom_op("everstate::add_rms_norm", mutates_args=())
def _add(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    left, right = (dense(t.reshape(-1, width)) for t in (x, y))
    summed, normed = _results(x, y)
    block = triton.next_power_of_2(width)
    _add_kernel[(len(left),)](
        left, right, weight, summed, normed, left.stride(0), right.stride(0), eps,
        WIDTH=width, BLOCK=block, num_warps=min(max(block // 256, 1), 16), **launch_options(x.device),
    )  # fmt: skip
    return summed, normed


@_add.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _results(x, y)


def _results(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype)), y.new_empty(y.shape)


@triton.jit
def _add_kernel(
    x, y, weight, summed, normed, x_row, y_row, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """One program per row."""
    start_next(OVERLAP)
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < WIDTH
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(OVERLAP)
    u = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    u += tl.load(y + row * y_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(summed + row * WIDTH + at, u.to(summed.dtype.element_ty), mask=inside)
    out = u * tl.rsqrt(tl.sum(u * u, 0) / WIDTH + eps) * scale
    tl.store(normed + row * WIDTH + at, out.to(normed.dtype.element_ty), mask=inside)
