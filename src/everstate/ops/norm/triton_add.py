"""A residual stream on a GPU: what a layer gave is added and the sum normalised, in one pass forward and one backward.

A program takes several rows at once, so that enough loads are in flight. Backward, it sums the gradient of the weight
over its rows; the sums of the programs are added at the end, always in the same order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_rows import dense_rows, launch_options, start_next, wait_for_last
from everstate.ops.triton_sums import total

NUMBERS = 2048
"""Of one program at a time, if a row is not longer."""

PROGRAMS = 16
"""Per multiprocessor, backwards."""


def add_rms_norm(
    x: Float[Tensor, "*b d"],
    y: Float[Tensor, "*b d"],
    weight: Float[Tensor, " d"],
    *,
    eps: float = 1e-5,
    multiplier: float = 1.0,
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """See `everstate.ops.add_rms_norm`."""
    return _add(x, y, weight, eps, multiplier)


@kernel_op("residual_norm")
@replayed
def _add(x: Tensor, y: Tensor, weight: Tensor, eps: float, multiplier: float) -> tuple[Tensor, Tensor]:
    left, right = dense_rows(x), dense_rows(y)
    summed, normed = _results(x, y)
    sizes = _sizes(left.shape[1])
    launch(
        _add_kernel, (cdiv(len(left), sizes["ROWS"]),),
        left, right, weight, summed, normed, len(left), left.stride(0), right.stride(0), eps, multiplier,
        **sizes, **launch_options(x.device),
    )  # fmt: skip
    return summed, normed


@_add.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, eps: float, multiplier: float) -> tuple[Tensor, Tensor]:
    return _results(x, y)


@kernel_op("residual_norm_backward")
@replayed
def _backward(
    dsummed: Tensor, dnormed: Tensor, summed: Tensor, weight: Tensor, eps: float, multiplier: float,
    wide: torch.dtype, low: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, of y, which is that times the multiplier, and of the weight."""
    rows, own, upstream = dense_rows(summed), dense_rows(dsummed), dense_rows(dnormed)
    sizes = _sizes(rows.shape[1])
    programs = min(cdiv(len(rows), sizes["ROWS"]), PROGRAMS * processors(rows.device))
    dx, dy = (summed.new_empty(summed.shape, dtype=dtype) for dtype in (wide, low))
    sums = summed.new_empty(programs, len(weight), dtype=torch.float32)
    launch(
        _backward_kernel, (programs,),
        own, upstream, rows, weight, dx, dy, sums, len(rows), own.stride(0), upstream.stride(0), rows.stride(0), eps,
        multiplier, **sizes,
    )  # fmt: skip
    return [dx, dy, total(sums, weight.dtype)]


@_backward.register_fake
def _(
    dsummed: Tensor, dnormed: Tensor, summed: Tensor, weight: Tensor, eps: float, multiplier: float,
    wide: torch.dtype, low: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    return [
        *(summed.new_empty(summed.shape, dtype=dtype) for dtype in (wide, low)),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, weight, *ctx.settings = inputs
    ctx.save_for_backward(output[0], weight)
    ctx.dtypes = x.dtype, y.dtype


def _differentiate(ctx: Any, dsummed: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    dx, dy, dweight = _backward(dsummed, dnormed, *ctx.saved_tensors, *ctx.settings, *ctx.dtypes)
    return dx, dy, dweight, None, None


_add.register_autograd(_differentiate, setup_context=_save)


def _results(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype)), y.new_empty(y.shape)


def _sizes(width: int) -> dict[str, int]:
    """What the width decides."""
    block = power_of_2(width)
    rows = max(NUMBERS // block, 1)
    return {"WIDTH": width, "ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // 512, 1), 16)}


@triton.jit
def _load(base, row, stride, columns, inside):
    return tl.load(base + row[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _add_kernel(
    x, y, weight, summed, normed, rows, x_row, y_row, eps, multiplier,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per few rows."""
    start_next(OVERLAP)
    row, at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < WIDTH)[None, :]
    scale = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    wait_for_last(OVERLAP)
    given = _load(y, row, y_row, at, inside) * multiplier
    total = (_load(x, row, x_row, at, inside) + given).to(summed.dtype.element_ty)
    out = row[:, None] * WIDTH + at[None, :]
    tl.store(summed + out, total, mask=inside)
    u = total.to(tl.float32)
    u = u * tl.rsqrt(tl.sum(u * u, 1) / WIDTH + eps)[:, None] * scale[None, :]
    tl.store(normed + out, u.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dsummed, dnormed, summed, weight, dx, dy, sums, rows, own_row, upstream_row, summed_row, eps, multiplier,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every so many rows, a few at a time."""
    at = tl.arange(0, BLOCK)
    scale = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    gathered = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (at < WIDTH)[None, :]
        u, upstream = _load(summed, row, summed_row, at, inside), _load(dnormed, row, upstream_row, at, inside)
        rstd = tl.rsqrt(tl.sum(u * u, 1) / WIDTH + eps)
        gathered += upstream * u * rstd[:, None]
        scaled = upstream * scale[None, :]
        along = rstd * rstd * (tl.sum(scaled * u, 1) / WIDTH)
        d = _load(dsummed, row, own_row, at, inside) + rstd[:, None] * (scaled - u * along[:, None])
        out = row[:, None] * WIDTH + at[None, :]
        tl.store(dx + out, d.to(dx.dtype.element_ty), mask=inside)
        tl.store(dy + out, (d * multiplier).to(dy.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0) * WIDTH + at, tl.sum(gathered, 0), mask=at < WIDTH)
