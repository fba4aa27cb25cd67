"""One token of a Mamba-3 layer on a GPU, all between its projections in one launch. See `trapezoid/triton_step.py`."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.state import Slots
from everstate.ops.mamba3 import Mamba3Layer
from everstate.ops.trapezoid import TrapezoidState
from everstate.ops.trapezoid.triton_step import cosine_and_sine, entered, of_rank, pairs, rotated, tile_of_head, wrapped
from everstate.ops.triton_rows import dense, silu, slot_of

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


@torch.library.custom_op("everstate::mamba3_step_", mutates_args={"ssm", "k", "x", "angle"})
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
    _step_kernel[(batch * heads,)](
        projected, ssm, k, x, angle, slots, delta_t, *(None if t is None else t.contiguous() for t in vectors), out,
        projected.stride(0), 0 if delta_t is None else delta_t.stride(0),
        *ssm.stride()[:3], *k.stride()[:3], *x.stride()[:2], *angle.stride()[:2], floor, eps,
        HEADS=heads, GROUPS=ngroups, P=headdim, N=d_state, R=rank, TURNING=angle.shape[-1],
        INTERLEAVED=interleaved, HEAVY=heavy, **tile_of_head(headdim, d_state),
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
    mimo_x, mimo_z, mimo_o, norm, out,
    row_stride, delta_stride, ssm_slot, ssm_head, ssm_p, k_slot, k_rank, k_head, x_slot, x_head, angle_slot, angle_head,
    floor, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    TURNING: tl.constexpr, INTERLEAVED: tl.constexpr, HEAVY: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    slot, group = slot_of(slots, row), head // (HEADS // GROUPS)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    # The state is asked for first; what enters it is made while it comes.
    inside = (p < P)[:, None] & (n < N)[None, :]
    own = ssm + slot * ssm_slot + head * ssm_head + p[:, None] * ssm_p + n[None, :]
    h = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    WIDTH: tl.constexpr = GROUPS * N
    gates = projected + row * row_stride
    vectors = gates + 2 * HEADS * P
    scalars = vectors + 2 * R * WIDTH
    step, decay, entering = steps(scalars, head, row, delta_t, delta_stride, dt_bias, floor, HEADS, HEAVY)
    pair, partner, sign = pairs(n, N, INTERLEAVED)
    turns = (pair < TURNING) & (n < N)
    speed = PI * tanh(tl.load(scalars + 3 * HEADS + pair, mask=turns, other=0.0).to(tl.float32))
    turning = angle + slot * angle_slot + head * angle_head + pair
    turned = wrapped(tl.load(turning, mask=turns, other=0.0) + step * speed)
    cos, sin = cosine_and_sine(turned)
    sin *= sign
    B = vectors + group * N
    keys = rotated(B, WIDTH, B_norm, B_bias, head, n, partner, cos, sin, N, R, eps)
    queries = rotated(B + R * WIDTH, WIDTH, C_norm, C_bias, head, n, partner, cos, sin, N, R, eps)
    was, before = k + slot * k_slot + head * k_head, x + slot * x_slot + head * x_head + p
    z = tl.load(gates + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    u = tl.load(gates + (HEADS + head) * P + p, mask=p < P, other=0.0).to(tl.float32)
    u_before = tl.load(before, mask=p < P, other=0.0).to(tl.float32)

    h = entered(h * decay, (step - entering) * decay * u_before, was, k_rank, entering * u, keys, mimo_x, head, p, n,
                P, N, R)  # fmt: skip
    tl.store(own, h.to(ssm.dtype.element_ty), mask=inside)
    y = left(h, queries, tl.load(D + head).to(tl.float32) * u, z, mimo_x, mimo_z, mimo_o, norm, head, p, eps, P, R)
    tl.store(out + (row * HEADS + head) * P + p, y.to(out.dtype.element_ty), mask=p < P)

    tl.debug_barrier()  # all warps have read what is overwritten now
    for i in tl.static_range(R):
        tl.store(was + i * k_rank + n, keys[i].to(k.dtype.element_ty), mask=n < N)
    tl.store(before, u.to(x.dtype.element_ty), mask=p < P)
    tl.store(turning, turned, mask=turns & (sign < 0))


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
def left(h, queries, skipped, z, mimo_x, mimo_z, mimo_o, norm, head, p, eps, P: tl.constexpr, R: tl.constexpr):
    """What the ranks read of the state and skip past it, normalised, gated and summed: (p)."""
    y = tl.zeros_like(skipped)
    if norm is None and R > 1:
        # Without a norm the ranks may be summed before the entries: one sum along the state instead of R.
        read = tl.zeros_like(h)
        for i in tl.static_range(R):
            gate = silu(z * of_rank(mimo_z, head, i, p, P, R)) * of_rank(mimo_o, head, i, p, P, R)
            read += gate[:, None] * queries[i][None, :]
            y += gate * skipped * of_rank(mimo_x, head, i, p, P, R)
        y += tl.sum(h * read, 1)
    else:
        for i in tl.static_range(R):
            each = tl.sum(h * queries[i][None, :], 1) + skipped * of_rank(mimo_x, head, i, p, P, R)
            if norm is not None:
                each *= tl.rsqrt(tl.sum(each * each, 0) / P + eps)
                each *= tl.load(norm + head * P + p, mask=p < P, other=0.0).to(tl.float32)
            y += each * silu(z * of_rank(mimo_z, head, i, p, P, R)) * of_rank(mimo_o, head, i, p, P, R)
    return y


@triton.jit
def softplus(x):
    """log(1 + exp(x)), small values of it right to all their digits: as a series in e / (2 + e), e = exp(-|x|)."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    series = 1 / 9 + z * (1 / 11 + z * (1 / 13 + z * (1 / 15)))
    series = 1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * series)))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def heavy_tail(x):
    return tl.maximum(x, 0.0) + 1.0 / (1.0 + tl.maximum(-x, 0.0))


@triton.jit
def tanh(x):
    """Small values of it right to all their digits: there it is a series."""
    z = x * x
    series = x * (1 + z * (-1 / 3 + z * (2 / 15 + z * (-17 / 315 + z * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))
