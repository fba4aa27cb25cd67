"""One token of a Mamba-3 layer on a GPU, all between its projections in one launch. See `trapezoid/triton_step.py`."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.core.state import Slots
from everstate.ops.mamba3.ends import Mamba3Layer
from everstate.ops.trapezoid import TrapezoidState
from everstate.ops.trapezoid.triton_step import (
    begun,
    keep_keys,
    keep_scaled,
    keep_vectors,
    of_rank,
    pairs,
    parts,
    room,
    rotated,
    stream,
    turn_on,
    vectors_of,
)
from everstate.ops.triton_common import softplus
from everstate.ops.triton_launch import launch
from everstate.ops.triton_rows import dense, launch_options, silu, start_next

OVERLAPPING_ROWS = 8
"""Rows up to which it starts while the kernel before still runs: a 1.3B took 1.11 instead of 1.24 ms a token for one
row, 1.66 instead of 1.78 for 4, but 2.37 instead of 2.24 for 16."""

PI: tl.constexpr = tl.constexpr(3.141592653589793)


def mamba3_step_(
    projected: Float[Tensor, "b w"],
    state: TrapezoidState,
    slots: Slots = None,
    delta_t: Float[Tensor, " b"] | None = None,
    *,
    layer: Mamba3Layer,
) -> Float[Tensor, "b e"]:
    """See `everstate.ops.mamba3_step_`. The pool may be of lower precision, its angles apart."""
    heavy = layer.A_activation == "heavy_tail"
    return _step(projected, *state, slots, delta_t, *layer[:12], heavy, *layer[13:])


@kernel_op("mamba3_step_", mutates={"ssm", "k", "x", "angle"})
def _step(
    projected: Tensor, ssm: Tensor, k: Tensor, x: Tensor, angle: Tensor, slots: Tensor | None, delta_t: Tensor | None,
    dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor,
    mimo_x: Tensor | None, mimo_z: Tensor | None, mimo_o: Tensor | None, norm: Tensor | None,
    ngroups: int, interleaved: bool, heavy: bool, floor: float, eps: float,
) -> Tensor:  # fmt: skip
    batch, (heads, rank, d_state), headdim = projected.shape[0], B_bias.shape, x.shape[-1]
    out = projected.new_empty(batch, heads * headdim)
    if batch == 0:
        return out
    projected = dense(projected)
    vectors = (dt_bias, B_norm, C_norm, B_bias, C_bias, D, mimo_x, mimo_z, mimo_o, norm)
    alone = slots is not None or batch > OVERLAPPING_ROWS
    options = {"OVERLAP": False} if alone else launch_options(projected.device)
    scratch, tiles = room(batch * heads, headdim, d_state, rank, projected.device)
    launch(
        _step_kernel, (scratch.shape[0],),
        projected, ssm, k, x, angle, slots, delta_t, *(None if t is None else t.contiguous() for t in vectors),
        scratch, out, projected.stride(0), 0 if delta_t is None else delta_t.stride(0),
        *ssm.stride()[:3], *k.stride()[:3], *x.stride()[:2], *angle.stride()[:2], batch * heads, floor, eps,
        HEADS=heads, GROUPS=ngroups, P=headdim, N=d_state, R=rank, TURNING=angle.shape[-1],
        INTERLEAVED=interleaved, HEAVY=heavy, SUMMED=norm is None and rank > 1,
        **tiles, **options,
    )  # fmt: skip
    return out


@_step.register_fake
def _(
    projected: Tensor, ssm: Tensor, k: Tensor, x: Tensor, angle: Tensor, slots: Tensor | None, delta_t: Tensor | None,
    dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor,
    mimo_x: Tensor | None, mimo_z: Tensor | None, mimo_o: Tensor | None, norm: Tensor | None,
    ngroups: int, interleaved: bool, heavy: bool, floor: float, eps: float,
) -> Tensor:  # fmt: skip
    return projected.new_empty(projected.shape[0], x.shape[-2] * x.shape[-1])


@triton.jit
def _step_kernel(
    projected, ssm, k, x, angle, slots, delta_t, dt_bias, B_norm, C_norm, B_bias, C_bias, D,
    mimo_x, mimo_z, mimo_o, norm, scratch, out,
    row_stride, delta_stride, ssm_slot, ssm_head, ssm_p, k_slot, k_rank, k_head, x_slot, x_head, angle_slot, angle_head,
    items, floor, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    TURNING: tl.constexpr, INTERLEAVED: tl.constexpr, HEAVY: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_P: tl.constexpr, WHOLE_P: tl.constexpr, BLOCK_N: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    start_next(OVERLAP)
    p, n = tl.arange(0, WHOLE_P), tl.arange(0, BLOCK_N)
    keys_before, keys, queries, owed, entering, reads = parts(scratch, P, N, R)
    WIDTH: tl.constexpr = GROUPS * N
    for turn in range(tl.cdiv(items - tl.program_id(0), tl.num_programs(0))):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        head, row = item % HEADS, (item // HEADS).to(tl.int64)
        slot, own, h = begun(ssm, slots, row, head, ssm_slot, ssm_head, ssm_p, P, N, BLOCK_P, BLOCK_N, OVERLAP)
        gates = projected + row * row_stride + head * P + p
        vectors = projected + row * row_stride + 2 * HEADS * P
        scalars = vectors + 2 * R * WIDTH
        step, decay, gain = steps(scalars, head, row, delta_t, delta_stride, dt_bias, floor, HEADS, HEAVY)
        pair, partner, sign = pairs(n, N, INTERLEAVED)
        turns = (pair < TURNING) & (n < N)
        speed = PI * tanh(tl.load(scalars + 3 * HEADS + pair, mask=turns, other=0.0).to(tl.float32))
        turning = angle + slot * angle_slot + head * angle_head + pair
        turned, cos, sin = turn_on(turning, turns, step * speed, sign)
        B = vectors + head // (HEADS // GROUPS) * N
        b = vectors_of(B, WIDTH, n, n < N, R), vectors_of(B, WIDTH, partner, n < N, R)
        c = vectors_of(B + R * WIDTH, WIDTH, n, n < N, R), vectors_of(B + R * WIDTH, WIDTH, partner, n < N, R)
        was, before = k + slot * k_slot + head * k_head, x + slot * x_slot + head * x_head + p
        olds = vectors_of(was, k_rank, n, n < N, R)
        z = tl.load(gates, mask=p < P, other=0.0).to(tl.float32)
        u = tl.load(gates + HEADS * P, mask=p < P, other=0.0).to(tl.float32)
        u_before = tl.load(before, mask=p < P, other=0.0).to(tl.float32)
        news = rotated(b[0], b[1], B_norm, B_bias, head, n, partner, cos, sin, N, R, eps)
        keep_vectors(queries, N, rotated(c[0], c[1], C_norm, C_bias, head, n, partner, cos, sin, N, R, eps), n, N, R)
        keep_keys(keys_before, olds, keys, news, n, N, R)
        keep_scaled(owed, entering, (step - gain) * decay * u_before, gain * u, mimo_x, head, p, P, R)
        keep_gates(reads, z, mimo_z, mimo_o, head, p, P, R, SUMMED)
        tl.debug_barrier()  # all is there, and k, x and the angle have been read
        keep_vectors(was, k_rank, news, n, N, R)
        tl.store(before, u.to(x.dtype.element_ty), mask=p < P)
        tl.store(turning, turned, mask=turns & (sign < 0))
        stream(own, ssm_p, h, decay, scratch, P, N, R, BLOCK_P, BLOCK_N, SUMMED)
        tl.debug_barrier()  # the state has been read
        u *= tl.load(D + head).to(tl.float32)
        y = left(reads, u, z, mimo_x, mimo_z, mimo_o, norm, head, p, eps, P, R, SUMMED)
        tl.store(out + (row * HEADS + head) * P + p, y.to(out.dtype.element_ty), mask=p < P)
        tl.debug_barrier()  # the scratch is free


@triton.jit
def steps(scalars, head, row, delta_t, delta_stride, dt_bias, floor, HEADS: tl.constexpr, HEAVY: tl.constexpr):
    """The time step of a head, how much is left of its state, and how much of its input enters now."""
    step = softplus(tl.load(scalars + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
    if delta_t is not None:
        step *= tl.load(delta_t + row * delta_stride).to(tl.float32)
    a = tl.load(scalars + HEADS + head).to(tl.float32)
    decay = tl.exp(-tl.maximum(heavy_tail(a) if HEAVY else softplus(a), floor) * step)
    return step, decay, step / (1.0 + tl.exp(-tl.load(scalars + 2 * HEADS + head).to(tl.float32)))


@triton.jit
def gate_of(z, mimo_z, mimo_o, head, i, p, P: tl.constexpr, R: tl.constexpr):
    """The gate (p) of one rank, with the weight of its output."""
    return silu(z * of_rank(mimo_z, head, i, p, P, R)) * of_rank(mimo_o, head, i, p, P, R)


@triton.jit
def keep_gates(kept, z, mimo_z, mimo_o, head, p, P: tl.constexpr, R: tl.constexpr, SUMMED: tl.constexpr):
    """Without a norm the ranks may be summed before the entries of the state: one long sum instead of R."""
    if SUMMED:
        for i in tl.static_range(R):
            tl.store(kept + i * P + p, gate_of(z, mimo_z, mimo_o, head, i, p, P, R), mask=p < P)


@triton.jit
def left(
    reads, skipped, z, mimo_x, mimo_z, mimo_o, norm, head, p, eps,
    P: tl.constexpr, R: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """What the ranks read of the state and skip past it, normalised, gated and summed: (p)."""
    y = tl.zeros_like(z)
    if SUMMED:
        y += tl.load(reads + R * P + p, mask=p < P, other=0.0)
    for i in tl.static_range(R):
        each = skipped * of_rank(mimo_x, head, i, p, P, R)
        if not SUMMED:
            each += tl.load(reads + i * P + p, mask=p < P, other=0.0)
        if norm is not None:
            each *= tl.rsqrt(tl.sum(each * each, 0) / P + eps)
            each *= tl.load(norm + head * P + p, mask=p < P, other=0.0).to(tl.float32)
        y += each * gate_of(z, mimo_z, mimo_o, head, i, p, P, R)
    return y


@triton.jit
def heavy_tail(x):
    return tl.maximum(x, 0.0) + 1.0 / (1.0 + tl.maximum(-x, 0.0))


@triton.jit
def tanh(x):
    """Small values of it right to all their digits: there it is a series."""
    z = x * x
    series = x * (1 + z * (-1 / 3 + z * (2 / 15 + z * (-17 / 315 + z * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))
