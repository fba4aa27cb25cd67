"""One token of the selective scan on a GPU: one launch reads and writes each number of the state once."""

import triton
import triton.language as tl
from jaxtyping import Float, Int8
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.core.state import Slots
from everstate.ops.linear import linear
from everstate.ops.triton_common import LOG2E, softplus
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import (
    dense,
    launch_options,
    reads_early,
    silu,
    slot_of,
    start_next,
    tile_of,
    wait_for_last,
    warps_of,
)

LOW, FEW = 256, 8
"""Largest rank of dt, and most rows, whose product a step makes faster than another launch: each row's programs read
all weights."""


def selective_step_(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b n"],
    C: Float[Tensor, "b n"],
    state: Float[Tensor, "slots d n"],
    slots: Slots = None,
    *,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b d"]:
    """See `everstate.ops.selective_step_`."""
    return _step(x, dt, A, B, C, state, slots, D, z, dt_bias)


def mamba1_step_(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b r"],
    A_log: Float[Tensor, "d n"],
    B: Float[Tensor, "b n"],
    C: Float[Tensor, "b n"],
    state: Float[Tensor, "slots d n"],
    slots: Slots = None,
    *,
    dt_bias: Float[Tensor, " d"],
    dt_weight: Float[Tensor, "d r"] | Int8[Tensor, "d r"] | None = None,
    dt_scale: Float[Tensor, " d"] | None = None,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d"] | None = None,
    delta_t: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"]:
    """See `everstate.ops.mamba1_step_`."""
    if dt_weight is not None and (x.shape[0] > FEW or dt_weight.shape[1] > LOW):
        dt, dt_weight, dt_scale = linear(dt, dt_weight, scale=dt_scale), None, None
    return _mamba1_step(x, dt, A_log, B, C, state, slots, dt_bias, dt_weight, dt_scale, D, z, delta_t)


@kernel_op("selective_step_", mutates={"state"})
def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return _run(x, dt, A, B, C, state, slots, D, z, dt_bias, None, None, None, of_layer=False)


@_step.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


@kernel_op("mamba1_step_", mutates={"state"})
def _mamba1_step(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, dt_bias: Tensor,
    dt_weight: Tensor | None, dt_scale: Tensor | None, D: Tensor | None, z: Tensor | None, delta_t: Tensor | None,
) -> Tensor:  # fmt: skip
    return _run(x, dt, A_log, B, C, state, slots, D, z, dt_bias, dt_weight, dt_scale, delta_t, of_layer=True)


@_mamba1_step.register_fake
def _(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, dt_bias: Tensor,
    dt_weight: Tensor | None, dt_scale: Tensor | None, D: Tensor | None, z: Tensor | None, delta_t: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def _run(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, dt_weight: Tensor | None, dt_scale: Tensor | None,
    delta_t: Tensor | None, *, of_layer: bool,
) -> Float[Tensor, "b d"]:  # fmt: skip
    """Launch the kernel. `of_layer` means that A, D and dt_bias are parameters, A as the logarithm of -A."""
    (batch, dim), n = x.shape, A.shape[1]
    y = x.new_empty(batch, dim)
    if batch == 0:
        return y
    x, dt, A, B, C = dense(x), dense(dt), dense(A), dense(B), dense(C)
    z, D, dt_bias = (None if t is None else dense(t) for t in (z, D, dt_bias))
    width, rank = power_of_2(n), 0 if dt_weight is None else dt_weight.shape[1]
    tile = tile_of(dim, max(width, rank // 4), batch, x.device, least=max(512 // width, 1))
    launch(
        _step_kernel, (batch * cdiv(dim, tile),),
        x, dt, A, B, C, state, slots, D, z, dt_bias, dt_weight, dt_scale, delta_t, y,
        x.stride(0), dt.stride(0), A.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
        *state.stride()[:2], 0 if delta_t is None else delta_t.stride(0),
        DIM=dim, N=n, RANK=rank, BLOCK_D=tile, BLOCK_N=width, BLOCK_R=power_of_2(max(rank, 1)),
        OF_LAYER=of_layer, EARLY=of_layer and reads_early(slots, batch),
        num_warps=warps_of(tile * max(width, rank // 2)), **launch_options(x.device),
    )  # fmt: skip
    return y


@triton.jit
def _step_kernel(
    x, dt, A, B, C, state, slots, D, z, dt_bias, dt_weight, dt_scale, delta_t, y,
    x_row, dt_row, A_row, B_row, C_row, z_row, state_slot, state_d, delta_row,
    DIM: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, OF_LAYER: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row and tile of channels, which nobody else reads or writes."""
    start_next(OVERLAP)
    TILES: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    row = (tl.program_id(0) // TILES).to(tl.int64)
    d, n = tl.program_id(0) % TILES * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    exists = (d < DIM)[:, None] & (n < N)[None, :]
    r = tl.arange(0, BLOCK_R)
    if not OF_LAYER:
        wait_for_last(OVERLAP)
    a, skip, bias, w, factor = _of_layer(A, D, dt_bias, dt_weight, dt_scale, A_row, d, n, r, exists, DIM, RANK)
    if OF_LAYER and not EARLY:
        wait_for_last(OVERLAP)
    own = state + slot_of(slots, row) * state_slot + (d[:, None] * state_d + n[None, :])
    held = tl.load(own, mask=exists, other=0.0)
    if EARLY:
        wait_for_last(OVERLAP)
    h = held.to(tl.float32)
    u = tl.load(x + row * x_row + d, mask=d < DIM, other=0.0).to(tl.float32)
    step = _step_of(dt + row * dt_row, d, r, w, factor, DIM, RANK)
    k = tl.load(B + row * B_row + n, mask=n < N, other=0.0).to(tl.float32)
    q = tl.load(C + row * C_row + n, mask=n < N, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step = softplus(step + bias)
    if delta_t is not None:
        step = step * tl.load(delta_t + row * delta_row).to(tl.float32)
    if OF_LAYER:
        a = -tl.exp2(a * LOG2E)
    h = h * tl.exp2(a * (step * LOG2E)[:, None]) + (step * u)[:, None] * k[None, :]
    tl.store(own, h.to(state.dtype.element_ty), mask=exists)
    out = tl.sum(h * q[None, :], 1)
    if D is not None:
        out += skip * u
    if z is not None:
        out *= silu(tl.load(z + row * z_row + d, mask=d < DIM, other=0.0).to(tl.float32))
    tl.store(y + row * DIM + d, out.to(y.dtype.element_ty), mask=d < DIM)


@triton.jit
def _of_layer(
    A, D, dt_bias, dt_weight, dt_scale, A_row, d, n, r, exists, DIM: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """What belongs to the layer and may be read before the last kernel has ended: A, D, and of dt the bias, the weights
    (r where there are none) and their scale."""
    a = tl.load(A + (d[:, None] * A_row + n[None, :]), mask=exists, other=0.0)
    bias, skip, w, factor = d * 0.0, d * 0.0, r, d * 0.0 + 1.0
    if dt_bias is not None:
        bias = tl.load(dt_bias + d, mask=d < DIM, other=0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=d < DIM, other=0.0).to(tl.float32)
    if RANK > 0:
        inside = (d < DIM)[:, None] & (r < RANK)[None, :]
        w = tl.load(dt_weight + d[:, None] * RANK + r[None, :], mask=inside, other=0.0)
    if dt_scale is not None:
        factor = tl.load(dt_scale + d, mask=d < DIM, other=0.0).to(tl.float32)
    return a.to(tl.float32), skip, bias, w, factor


@triton.jit
def _step_of(dt, d, r, w, factor, DIM: tl.constexpr, RANK: tl.constexpr):
    """dt of each channel, as it is given, or multiplied with the weights."""
    if RANK > 0:
        low = tl.load(dt + r, mask=r < RANK, other=0.0).to(tl.float32)
        step = tl.sum(w.to(tl.float32) * low[None, :], 1) * factor
    else:
        step = tl.load(dt + d, mask=d < DIM, other=0.0).to(tl.float32)
    return step
