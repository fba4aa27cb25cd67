"""One trapezoid token on a GPU: one launch reads and writes each number of the state once.

A program owns a row and head with all that the pool keeps of it, so nobody else reads what it overwrites. It makes the
turned vectors and scaled inputs once, leaves them in a scratch of its own, which stays in the cache, and then moves the
state through its registers tile by tile: threads that each made what they need would make it many times over. Within a
program, barriers keep its warps from overwriting k, x and angle before all have read them.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.state import Slots
from everstate.ops.trapezoid import TrapezoidState
from everstate.ops.triton_launch import launch, power_of_2
from everstate.ops.triton_rows import dense, slot_of, wait_for_last, warps_of

PROGRAMS = 16
"""Programs per multiprocessor, about as many as it holds."""

REGISTERS = 168
"""Of a thread for up to four ranks, so that twelve warps share a multiprocessor. More ranks need more."""

FEW = 2
"""Heads per multiprocessor, over all sequences, that it works on all at once."""

INVERSE_TAU: tl.constexpr = tl.constexpr(0.15915494309189535)
# 2 pi in two parts, the first exact: in one it is off by 2e-7 for every turn, and a long stream turns often.
TAU_HIGH: tl.constexpr = tl.constexpr(6.28125)
TAU_LOW: tl.constexpr = tl.constexpr(1.9353071795864769e-3)


def trapezoid_step_(
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A: Float[Tensor, "b h"],
    lam: Float[Tensor, "b h"],
    omega: Float[Tensor, "b s"],
    B: Float[Tensor, "b r g n"],
    C: Float[Tensor, "b r g n"],
    state: TrapezoidState,
    slots: Slots = None,
    *,
    B_bias: Float[Tensor, "h r n"] | None = None,
    C_bias: Float[Tensor, "h r n"] | None = None,
    mimo_x: Float[Tensor, "h r p"] | None = None,
    D: Float[Tensor, " h"] | None = None,
    interleaved: bool = True,
) -> Float[Tensor, "b r h p"]:
    """See `everstate.ops.trapezoid_step_`. The pool may be of lower precision, its angles apart: a sum of rounded
    numbers is rounded once more with every token."""
    return _step(x, dt, A, lam, omega, B, C, *state, slots, B_bias, C_bias, mimo_x, D, interleaved)


@kernel_op("trapezoid_step_", mutates={"ssm", "k", "x_before", "angle"})
def _step(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, x_before: Tensor, angle: Tensor, slots: Tensor | None,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    (batch, heads, headdim), (rank, groups, d_state) = x.shape, B.shape[1:]
    y = x.new_empty(batch, rank, heads, headdim)
    if batch == 0:
        return y
    x, omega, B, C = dense(x), dense(omega), dense(B), dense(C)
    parameters = (None if t is None else t.contiguous() for t in (B_bias, C_bias, mimo_x, D))
    scratch, tiles = room(batch * heads, headdim, d_state, rank, x.device)
    launch(
        _step_kernel, (scratch.shape[0],),
        x, dt, A, lam, omega, B, C, ssm, k, x_before, angle, slots, *parameters, scratch, y,
        *x.stride()[:2], *dt.stride(), *A.stride(), *lam.stride(), omega.stride(0), *B.stride()[:3], *C.stride()[:3],
        *ssm.stride()[:3], *k.stride()[:3], *x_before.stride()[:2], *angle.stride()[:2], batch * heads,
        HEADS=heads, GROUPS=groups, P=headdim, N=d_state, R=rank, TURNING=omega.shape[1], INTERLEAVED=interleaved,
        **tiles,
    )  # fmt: skip
    return y


@_step.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, x_before: Tensor, angle: Tensor, slots: Tensor | None,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], B.shape[1], *x.shape[1:])


def room(items: int, headdim: int, d_state: int, rank: int, device: torch.device) -> tuple[Tensor, dict[str, int]]:
    """The scratch of each program, as many as the GPU holds at once, and the sizes of their tiles.

    Many programs of few warps keep the memory busy: on an H200 8, 4 and 2 warps took 118, 85 and 82 us for 64 x 64
    heads of 64 x 128 in float32. Where there are too few heads for that, each gets eight warps, to be done sooner.
    """
    width, whole = power_of_2(d_state), power_of_2(headdim)
    numbers = 8192 if items <= FEW * processors(device) else 2048
    tile = min(whole, max(numbers // width, 1))
    sizes = {"BLOCK_P": tile, "WHOLE_P": whole, "BLOCK_N": width, "num_warps": warps_of(tile * width)}
    if sizes["num_warps"] == 1 and 1 < rank <= 4:
        sizes["maxnreg"] = REGISTERS
    programs = min(items, PROGRAMS * processors(device))
    scratch = torch.empty(programs, 3 * rank * (d_state + headdim) + headdim, device=device)
    return scratch, sizes


@triton.jit
def _step_kernel(
    x, dt, A, lam, omega, B, C, ssm, k, x_before, angle, slots, B_bias, C_bias, mimo_x, D, scratch, y,
    x_row, x_head, dt_row, dt_head, A_row, A_head, lam_row, lam_head, omega_row, B_row, B_rank, B_group,
    C_row, C_rank, C_group, ssm_slot, ssm_head, ssm_p, k_slot, k_rank, k_head, before_slot, before_head,
    angle_slot, angle_head, items,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    TURNING: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_P: tl.constexpr, WHOLE_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p, n = tl.arange(0, WHOLE_P), tl.arange(0, BLOCK_N)
    keys_before, keys, queries, owed, entering, reads = parts(scratch, P, N, R)
    for turn in range(tl.cdiv(items - tl.program_id(0), tl.num_programs(0))):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        head, row = item % HEADS, (item // HEADS).to(tl.int64)
        group = head // (HEADS // GROUPS)
        slot, own, h = begun(ssm, slots, row, head, ssm_slot, ssm_head, ssm_p, P, N, BLOCK_P, BLOCK_N, False)
        step = tl.load(dt + row * dt_row + head * dt_head).to(tl.float32)
        gain = tl.load(lam + row * lam_row + head * lam_head).to(tl.float32) * step
        decay = tl.exp(tl.load(A + row * A_row + head * A_head).to(tl.float32) * step)
        pair, partner, sign = pairs(n, N, INTERLEAVED)
        turns = (pair < TURNING) & (n < N)
        speed = tl.load(omega + row * omega_row + pair, mask=turns, other=0.0).to(tl.float32)
        turning = angle + slot * angle_slot + head * angle_head + pair
        turned, cos, sin = turn_on(turning, turns, step * speed, sign)
        B_own, C_own = B + row * B_row + group * B_group, C + row * C_row + group * C_group
        b = vectors_of(B_own, B_rank, n, n < N, R), vectors_of(B_own, B_rank, partner, n < N, R)
        c = vectors_of(C_own, C_rank, n, n < N, R), vectors_of(C_own, C_rank, partner, n < N, R)
        was, before = k + slot * k_slot + head * k_head, x_before + slot * before_slot + head * before_head + p
        olds = vectors_of(was, k_rank, n, n < N, R)
        u = tl.load(x + row * x_row + head * x_head + p, mask=p < P, other=0.0).to(tl.float32)
        u_before = tl.load(before, mask=p < P, other=0.0).to(tl.float32)
        news = rotated(b[0], b[1], None, B_bias, head, n, partner, cos, sin, N, R, 0.0)
        keep_vectors(queries, N, rotated(c[0], c[1], None, C_bias, head, n, partner, cos, sin, N, R, 0.0), n, N, R)
        keep_keys(keys_before, olds, keys, news, n, N, R)
        keep_scaled(owed, entering, (step - gain) * decay * u_before, gain * u, mimo_x, head, p, P, R)
        tl.debug_barrier()  # all is there, and k, x and the angle have been read
        keep_vectors(was, k_rank, news, n, N, R)
        tl.store(before, u.to(x_before.dtype.element_ty), mask=p < P)
        tl.store(turning, turned, mask=turns & (sign < 0))
        stream(own, ssm_p, h, decay, scratch, P, N, R, BLOCK_P, BLOCK_N, False)
        tl.debug_barrier()  # the state has been read
        for i in tl.static_range(R):
            out = tl.load(reads + i * P + p, mask=p < P, other=0.0)
            if D is not None:
                out += tl.load(D + head).to(tl.float32) * of_rank(mimo_x, head, i, p, P, R) * u
            tl.store(y + ((row * R + i) * HEADS + head) * P + p, out.to(y.dtype.element_ty), mask=p < P)
        tl.debug_barrier()  # the scratch is free


@triton.jit
def parts(scratch, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """Where a program keeps the keys of both ends of the step and the queries (R, N), the inputs of both ends (R, P),
    and what is read."""
    vectors = scratch + tl.program_id(0) * (R * (3 * N + 3 * P) + P)
    rest = vectors + 3 * R * N
    return vectors, vectors + R * N, vectors + 2 * R * N, rest, rest + R * P, rest + 2 * R * P


@triton.jit
def begun(
    ssm, slots, row, head, slot_stride, head_stride, p_stride,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The slot of a row, where the state of its head lies, and the first tile of that, which is asked for before the
    last kernel has ended."""
    slot = slot_of(slots, row)
    own = ssm + slot * slot_stride + head * head_stride
    first = tile_of(own, p_stride, 0, P, N, BLOCK_P, BLOCK_N)
    wait_for_last(OVERLAP)
    return slot, own, first


@triton.jit
def tile_of(
    own, p_stride, first, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The rows of the state of a head from `first` on."""
    p, n = first + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    return tl.load(own + p[:, None] * p_stride + n[None, :], mask=inside, other=0.0)


@triton.jit
def stream(
    own, p_stride, ahead, decay, scratch,
    P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """The state of a head, tile by tile: decayed, given what both ends of the step add, written, and read.

    `ahead` is the first tile; each is asked for before the one in front of it is used. What the query of each rank
    reads goes to `reads` (R, P), or if SUMMED its sum with the weights that lie there to the row behind them.
    """
    n = tl.arange(0, BLOCK_N)
    keys_before, keys, queries, owed, entering, reads = parts(scratch, P, N, R)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        h = ahead.to(tl.float32) * decay
        if P > BLOCK_P:
            ahead = tile_of(own, p_stride, first + BLOCK_P, P, N, BLOCK_P, BLOCK_N)
        for i in tl.static_range(R):
            k = tl.load(keys_before + i * N + n, mask=n < N, other=0.0)
            h += tl.load(owed + i * P + p, mask=p < P, other=0.0)[:, None] * k[None, :]
            k = tl.load(keys + i * N + n, mask=n < N, other=0.0)
            h += tl.load(entering + i * P + p, mask=p < P, other=0.0)[:, None] * k[None, :]
        inside = (p < P)[:, None] & (n < N)[None, :]
        tl.store(own + p[:, None] * p_stride + n[None, :], h.to(own.dtype.element_ty), mask=inside)
        weighted = tl.zeros_like(h)
        for i in tl.static_range(R):
            q = tl.load(queries + i * N + n, mask=n < N, other=0.0)
            if SUMMED:
                weighted += tl.load(reads + i * P + p, mask=p < P, other=0.0)[:, None] * q[None, :]
            else:
                tl.store(reads + i * P + p, tl.sum(h * q[None, :], 1), mask=p < P)
        if SUMMED:
            tl.store(reads + R * P + p, tl.sum(h * weighted, 1), mask=p < P)


@triton.jit
def turn_on(at, turns, by, sign):
    """The angles where the head has got to, their cosines, and their sines with the sign of each entry."""
    turned = wrapped(tl.load(at, mask=turns, other=0.0) + by)
    cos, sin = cosine_and_sine(turned)
    return turned, cos, sign * sin


@triton.jit
def wrapped(angle):
    """The same angle between -pi and pi."""
    turns = tl.floor(angle * INVERSE_TAU + 0.5)
    return (angle - turns * TAU_HIGH) - turns * TAU_LOW


@triton.jit
def cosine_and_sine(angle):
    """Both to 1e-7 for angles between -pi and pi. Those of the libraries also take huge angles, by way of memory."""
    quarter = tl.floor(angle * (4 * INVERSE_TAU) + 0.5)
    x = (angle - quarter * (TAU_HIGH / 4)) - quarter * (TAU_LOW / 4)
    z = x * x
    cos = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    sin = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    odd, low = tl.abs(quarter) == 1, tl.abs(quarter) == 2
    # A quarter turn makes of (cos, sin) (-sin, cos), the other way round (sin, -cos), two of them (-cos, -sin).
    return (
        tl.where(odd, -quarter * sin, tl.where(low, -cos, cos)),
        tl.where(odd, quarter * cos, tl.where(low, -sin, sin)),
    )


@triton.jit
def pairs(n, N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each entry: the number of its pair, where its partner lies, and the sign of the sine with which that enters:
    -1 for the first of a pair, 1 for the second."""
    if INTERLEAVED:
        return n // 2, n ^ 1, tl.where(n % 2 == 0, -1.0, 1.0)
    else:
        first = n < N // 2
        return tl.where(first, n, n - N // 2), tl.where(first, n + N // 2, n - N // 2), tl.where(first, -1.0, 1.0)


@triton.jit
def vectors_of(at, rank_stride, n, within, R: tl.constexpr):
    """The vectors (n) of all ranks: asked for at once, before the first is used."""
    made = ()
    for i in tl.static_range(R):
        vector = tl.load(at + i * rank_stride + n, mask=within, other=0.0).to(tl.float32)
        made = made + (vector,)  # type: ignore[assignment]  # unrolled
    return made


@triton.jit
def rotated(own, other, weight, bias, head, n, partner, cos, sin, N: tl.constexpr, R: tl.constexpr, eps):
    """The vectors of all ranks, normalised if there is a `weight`, with the bias of their head, turned."""
    made = ()
    for i in tl.static_range(R):
        a, b = own[i], other[i]
        if weight is not None:
            scale = tl.rsqrt(tl.sum(a * a, 0) / N + eps)
            a *= scale * tl.load(weight + n, mask=n < N, other=0.0).to(tl.float32)
            b *= scale * tl.load(weight + partner, mask=n < N, other=0.0).to(tl.float32)
        if bias is not None:
            a += tl.load(bias + (head * R + i) * N + n, mask=n < N, other=0.0).to(tl.float32)
            b += tl.load(bias + (head * R + i) * N + partner, mask=n < N, other=0.0).to(tl.float32)
        made = made + (a * cos + b * sin,)  # type: ignore[assignment]  # unrolled
    return made


@triton.jit
def keep_vectors(at, rank_stride, vectors, n, N: tl.constexpr, R: tl.constexpr):
    """Write a vector (n) of each rank."""
    for i in tl.static_range(R):
        tl.store(at + i * rank_stride + n, vectors[i].to(at.dtype.element_ty), mask=n < N)


@triton.jit
def keep_keys(keys_before, olds, keys, news, n, N: tl.constexpr, R: tl.constexpr):
    """The keys of both ends of the step."""
    keep_vectors(keys_before, N, olds, n, N, R)
    keep_vectors(keys, N, news, n, N, R)


@triton.jit
def keep_scaled(owed, entering, u_before, u, mimo_x, head, p, P: tl.constexpr, R: tl.constexpr):
    """What each rank makes of the inputs (p) of both ends of the step."""
    for i in tl.static_range(R):
        factor = of_rank(mimo_x, head, i, p, P, R)
        tl.store(owed + i * P + p, factor * u_before, mask=p < P)
        tl.store(entering + i * P + p, factor * u, mask=p < P)


@triton.jit
def of_rank(factors, head, i, p, P: tl.constexpr, R: tl.constexpr):
    """The factors (p) of one rank of a head, or 1 where there are none."""
    if factors is not None:
        return tl.load(factors + (head * R + i) * P + p, mask=p < P, other=0.0).to(tl.float32)
    else:
        return 1.0
