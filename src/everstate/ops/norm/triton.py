"""The norms on a GPU: one pass over memory forward, one backward, gate and weight included.

A program takes the rows of one group one after the other. Backward, it sums the gradient of the weight over its rows;
the sums of the programs are added at the end, always in the same order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.ops.triton_launch import launch, power_of_2
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_rows import dense_rows, follow_last, launch_options
from everstate.ops.triton_sums import total

PLAIN, GATE_FIRST, GATE_LAST = 0, 1, 2
"""No gate; `norm(x silu(z))`; `norm(x) silu(z)`."""

PROGRAMS = 8
"""Per multiprocessor, backwards."""


def rms_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"] | None, *, eps: float = 1e-5, groups: int = 1
) -> Float[Tensor, "*b d"]:
    """See `everstate.ops.rms_norm`."""
    return _norm(x, None, weight, eps, groups, PLAIN)


def gated_rms_norm(
    x: Float[Tensor, "*b d"],
    z: Float[Tensor, "*b d"],
    weight: Float[Tensor, " d"] | None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> Float[Tensor, "*b d"]:
    """See `everstate.ops.gated_rms_norm`."""
    return _norm(x, z, weight, eps, groups, GATE_LAST if norm_before_gate else GATE_FIRST)


def normalise(x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int, mode: int) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, gate = dense_rows(x), None if z is None else dense_rows(z)
    # A wide row waits less for its weight with 16 warps than with 8: 0.367 instead of 0.382 ms for 65,536 of 4,096.
    grid, sizes = _launch(rows, groups, len(rows), 8 if rows.shape[1] > 2048 * groups else 16)
    launch(
        _norm_kernel, grid,
        rows, gate, weight, y, len(rows), rows.stride(0), 0 if gate is None else gate.stride(0), eps,
        GROUPS=groups, MODE=mode, **sizes, **launch_options(x.device),
    )  # fmt: skip
    return y


_norm = kernel_op("rms_norm")(replayed(normalise))


@_norm.register_fake
def _(x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int, mode: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("rms_norm_backward")
@replayed
def _norm_backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int, mode: int
) -> list[Tensor]:
    """Gradients of x, and of z and weight where they are given."""
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dx, dweight = differentiate(dy, x, z, weight, eps, groups, mode, dz)
    return [t for t in (dx, dz, dweight) if t is not None]


def differentiate(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int, mode: int,
    dz: Tensor | None, again: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients of x and weight.

    That of z is written into `dz`, rows of which may be part of wider ones, and the output once more into `again`.
    """
    rows, gate, upstream = dense_rows(x), None if z is None else dense_rows(z), dense_rows(dy)
    programs = min(len(rows), PROGRAMS * processors(x.device))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = None if weight is None else x.new_empty(programs, len(weight), dtype=torch.float32)
    grid, sizes = _launch(rows, groups, programs, 16)
    launch(
        _norm_backward_kernel, grid,
        upstream, rows, gate, weight, dx, dz, again, sums, len(rows), upstream.stride(0), rows.stride(0),
        0 if gate is None else gate.stride(0), 0 if dz is None else dense_rows(dz).stride(0), eps,
        GROUPS=groups, MODE=mode, **sizes,
    )  # fmt: skip
    return dx, None if sums is None or weight is None else total(sums, weight.dtype)


@_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, eps: float, groups: int, mode: int
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, z, weight) if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, z, weight = saved = ctx.saved_tensors
    gradients = iter(_norm_backward(dy, *saved, *ctx.settings))
    dx = next(gradients)
    return dx, None if z is None else next(gradients), None if weight is None else next(gradients), None, None, None


_norm.register_autograd(_differentiate, setup_context=_save)


def _launch(
    rows: Float[Tensor, "rows d"], groups: int, programs: int, each: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and what the width decides, with `each` numbers of a row per thread."""
    width = rows.shape[1] // groups
    block = power_of_2(width)
    return (programs, groups), {"WIDTH": width, "BLOCK": block, "num_warps": min(max(block // (32 * each), 1), 16)}


@triton.jit
def _read(base, row, stride, columns, inside):
    return tl.load(base + row.to(tl.int64) * stride + columns, mask=inside, other=0.0)


@triton.jit
def _load(base, row, stride, columns, inside):
    return _read(base, row, stride, columns, inside).to(tl.float32)


@triton.jit
def _norm_kernel(
    x, z, weight, y, rows, x_row, z_row, eps,
    GROUPS: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row and group."""
    follow_last(OVERLAP)
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside, columns = at < WIDTH, tl.program_id(1) * WIDTH + at
    u = _load(x, row, x_row, columns, inside)
    gate = u
    if MODE != 0:
        gate = _load(z, row, z_row, columns, inside)
        gate = gate * tl.sigmoid(gate)
    if MODE == 1:
        u = u * gate
    out = u * tl.rsqrt(tl.sum(u * u, 0) / WIDTH + eps)
    if weight is not None:
        out = out * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if MODE == 2:
        out = out * gate
    tl.store(y + row.to(tl.int64) * GROUPS * WIDTH + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _read_row(x, dy, z, row, x_row, dy_row, z_row, columns, inside, MODE: tl.constexpr):
    """A row of each, that of x in place of z where there is none."""
    own_x = _read(x, row, x_row, columns, inside)
    own_z = own_x
    if MODE != 0:
        own_z = _read(z, row, z_row, columns, inside)
    return own_x, _read(dy, row, dy_row, columns, inside), own_z


@triton.jit
def _gate(logit, MODE: tl.constexpr):
    """silu and its derivative, where there is a gate."""
    gate, slope = logit, logit
    if MODE != 0:
        share = tl.sigmoid(logit)
        gate = logit * share
        slope = share * (1.0 + logit * (1.0 - share))
    return gate, slope


@triton.jit
def _norm_backward_kernel(
    dy, x, z, weight, dx, dz, again, sums, rows, dy_row, x_row, z_row, dz_row, eps,
    GROUPS: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per group and every so many rows."""
    at = tl.arange(0, BLOCK)
    inside, columns = at < WIDTH, tl.program_id(1) * WIDTH + at
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    # Each row is on its way while the one before is worked on, if there are registers for both.
    AHEAD: tl.constexpr = BLOCK <= 4096
    row = tl.program_id(0)
    own_x, own_dy, own_z = _read_row(x, dy, z, row, x_row, dy_row, z_row, columns, inside, MODE)
    for _ in range(row, rows, tl.num_programs(0)):
        at_row, row = row, row + tl.num_programs(0)
        if not AHEAD:
            own_x, own_dy, own_z = _read_row(x, dy, z, at_row, x_row, dy_row, z_row, columns, inside, MODE)
        given, upstream, logit = own_x.to(tl.float32), own_dy.to(tl.float32), own_z.to(tl.float32)
        if AHEAD:
            own_x, own_dy, own_z = _read_row(
                x, dy, z, row, x_row, dy_row, z_row, columns, inside & (row < rows), MODE
            )  # fmt: skip
        gate, slope = _gate(logit, MODE)
        u = given
        if MODE == 1:
            u = given * gate
        rstd = tl.rsqrt(tl.sum(u * u, 0) / WIDTH + eps)
        out = at_row.to(tl.int64) * GROUPS * WIDTH + columns
        if again is not None:
            factor = gate if MODE == 2 else 1.0
            tl.store(again + out, (u * rstd * scale * factor).to(again.dtype.element_ty), mask=inside)
        dgate = upstream * u * rstd * scale
        if MODE == 2:
            upstream = upstream * gate
        summed += upstream * u * rstd
        scaled = upstream * scale
        du = rstd * (scaled - u * (rstd * rstd * (tl.sum(scaled * u, 0) / WIDTH)))
        if MODE == 1:
            dgate = du * given
            du = du * gate
        tl.store(dx + out, du.to(dx.dtype.element_ty), mask=inside)
        if MODE != 0:
            tl.store(dz + at_row.to(tl.int64) * dz_row + columns, (dgate * slope).to(dz.dtype.element_ty), mask=inside)
    if weight is not None:
        tl.store(sums + tl.program_id(0) * GROUPS * WIDTH + columns, summed, mask=inside)
