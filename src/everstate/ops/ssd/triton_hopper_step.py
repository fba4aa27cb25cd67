"""One Mamba-2 token on a Hopper GPU whose entry waits: states are read with each token and written with every eighth.

A state answers with `C` times it, an entry that waits with `C.B` times its x: products of matrices, one with the tile
of the state and one with the keys of the entries. The layout of what they read is chosen so that a thread loads 16
bytes of a row at once, and that all they give lies where the outputs are. The language is Gluon; without a GPU,
`tests/imitation.py` runs its source.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from everstate.ops.ssd.pending import ENTRIES, SHORTEST, part_of
from everstate.ops.ssd.triton_step import strides_of_skip, time_step, write_output
from everstate.ops.triton_hopper import thread_barrier, widened
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import dense, launch_options, reads_early, slot_of, start_next, wait_for_last

REGISTERS = {(2, False): 128, (2, True): 168, (4, False): 168, (4, True): 255}
"""Of a thread, by the bytes of a number of a state and whether a channel has more than 128 of them: with fewer, loads
come later or registers spill, with more, fewer programs run at once."""
LEAST = 32
"""Numbers of a row that a product with 16 bytes of each thread takes."""


def step(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None,
    pending: tuple[Tensor, ...], dt_bias: Tensor, D: Tensor | None, z: Tensor | None, lowest: float, highest: float,
    delta_t: Tensor | None, norm: Tensor | None, y: Tensor, squares: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel."""
    (batch, heads, headdim), (groups, d_state) = x.shape, B.shape[1:]
    x, B, C, z = dense(x), dense(B), dense(C), None if z is None else dense(z)
    part, width = part_of(headdim, d_state), max(power_of_2(d_state), LEAST)
    warps, strides = part // SHORTEST, (*B.stride()[:2], *C.stride()[:2])
    # Rows of a projection may lie a multiple of 8 numbers apart, and not of 16: then Triton would load them one by one.
    even = 8 if all(stride % 8 == 0 for stride in strides) else 1
    sums = gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
    launch(
        step_kernel, (batch * heads * cdiv(headdim, part),),
        x, A_log, dt, B, C, state, slots, *pending, D, y, dt_bias, z, delta_t, norm, squares, lowest, highest,
        *x.stride()[:2], A_log.stride(0), *dt.stride(), *(stride // even for stride in strides), *state.stride()[:3],
        *strides_of_skip(D), *((0, 0) if z is None else z.stride()[:2]), dt_bias.stride(0),
        0 if delta_t is None else delta_t.stride(0),
        HEADS=heads, GROUPS=groups, P=headdim, N=d_state, ENTRIES=ENTRIES, BLOCK_P=part, BLOCK_N=width, EVEN=even,
        SUMS=sums, STATE=gl.DotOperandLayout(0, sums, 16 // state.itemsize), EARLY=reads_early(slots, batch),
        num_warps=warps, maxnreg=REGISTERS[state.itemsize, width > 128], **launch_options(x.device),
    )  # fmt: skip


@gluon.jit
def step_kernel(
    x, A_log, dt, B, C, state, slots, past_x, past_B, weights, decays, counts, D, y, dt_bias, z, delta_t, norm, squares,
    lowest, highest, x_row, x_head, A_head, dt_row, dt_head, B_row, B_group, C_row, C_group,
    state_slot, state_head, state_p, D_head, D_p, z_row, z_head, bias_head, delta_row,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, N: gl.constexpr, ENTRIES: gl.constexpr,
    BLOCK_P: gl.constexpr, BLOCK_N: gl.constexpr, EVEN: gl.constexpr, SUMS: gl.constexpr, STATE: gl.constexpr,
    EARLY: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """One program per row, head and part, whose state, weights, decay and count nobody else reads or writes."""
    start_next(OVERLAP)
    PARTS: gl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    part, head = gl.program_id(0) % PARTS, gl.program_id(0) // PARTS % HEADS
    row, group = (gl.program_id(0) // PARTS // HEADS).to(gl.int64), head // (HEADS // GROUPS)
    p = part * BLOCK_P + gl.arange(0, BLOCK_P, gl.SliceLayout(1, SUMS))
    entry = gl.arange(0, ENTRIES, gl.SliceLayout(0, SUMS))
    # What belongs to the layer and not to the token may be read before the last kernel has ended.
    bias, rate = gl.load(dt_bias + head * bias_head).to(gl.float32), gl.load(A_log + head * A_head).to(gl.float32)
    skip = None if D is None else gl.load(D + head * D_head + p * D_p, mask=p < P, other=0.0).to(gl.float32)
    weigh = None if norm is None else gl.load(norm + head * P + p, mask=p < P, other=0.0).to(gl.float32)
    if not EARLY:
        wait_for_last(OVERLAP)
    slot = slot_of(slots, row)
    own_p, n = gl.arange(0, BLOCK_P, gl.SliceLayout(1, STATE)), gl.arange(0, BLOCK_N, gl.SliceLayout(0, STATE))
    own_p += part * BLOCK_P
    own = state + slot * state_slot + head * state_head + own_p[:, None] * state_p + n[None, :]
    held = gl.load(own, mask=(own_p < P)[:, None] & (n < N)[None, :], other=0.0)
    at = (slot * HEADS + head) * PARTS + part
    past_x, past_B = past_x + (slot * ENTRIES * HEADS + head) * P, past_B + (slot * ENTRIES * GROUPS + group) * N
    count, decay, weight = gl.load(counts + at), gl.load(decays + at), gl.load(weights + at * ENTRIES + entry)
    us = gl.load(past_x + entry[None, :] * (HEADS * P) + p[:, None], mask=(p < P)[:, None], other=0.0)
    if EARLY:
        wait_for_last(OVERLAP)
    elapsed = None if delta_t is None else delta_t + row * delta_row
    step, log_decay = time_step(dt + row * dt_row + head * dt_head, bias, rate, elapsed, lowest, highest)
    x, B, fade = x + row * x_row + head * x_head, B + (row * B_row + group * B_group) * EVEN, gl.exp(log_decay)
    gate = None if z is None else gl.load(z + row * z_row + head * z_head + p, mask=p < P, other=0.0)
    u = gl.load(x + p, mask=p < P, other=0.0).to(gl.float32)
    # The token itself is the entry behind those that wait.
    weight, decay = gl.where(entry == count, step, weight * fade), decay * fade
    us = gl.where((entry == count)[None, :], u[:, None], widened(us)) * weight[None, :]
    keys = _keys(past_B, GROUPS * N, B, count, N, BLOCK_N, ENTRIES, SUMS)
    out = _answer(C + (row * C_row + group * C_group) * EVEN, held, decay, keys, us, entry, N, SUMS, STATE)
    left = row * HEADS + head
    write_output(out, u, skip, gate, weigh, None if norm is None else squares + left * PARTS + part, y + left * P, p, P)
    thread_barrier()  # all threads have read the count and the weights
    gl.store(counts + at, (count + 1) % ENTRIES)
    _wait_or_write(
        own, held, decay, weight, step, fade, x, B, past_x, past_B, weights + at * ENTRIES, decays + at, count, entry,
        (head % (HEADS // GROUPS) == 0) & (part == 0), own_p, n, HEADS * P, GROUPS * N, P, N, ENTRIES,
    )  # fmt: skip


@gluon.jit
def _wait_or_write(
    own, held, decay, weight, step, fade, x, B, past_x, past_B, weights, decays, count, entry, is_first, p, n,
    x_apart, B_apart, P: gl.constexpr, N: gl.constexpr, ENTRIES: gl.constexpr,
):  # fmt: skip
    """Leave the token where it waits, or write the state with all that waits."""
    if count < ENTRIES - 1:
        gl.store(past_x + count * x_apart + p, gl.load(x + p, mask=p < P, other=0.0), mask=p < P)
        if is_first:
            gl.store(past_B + count * B_apart + n, gl.load(B + n, mask=n < N, other=0.0), mask=n < N)
    else:
        h = _plus_entry(widened(held) * decay, step, x, B, p, n, P, N)
        for i in range(ENTRIES - 1):
            faded = gl.load(weights + i) * fade
            h = _plus_entry(h, faded, past_x + i * x_apart, past_B + i * B_apart, p, n, P, N)
        gl.store(own, h.to(own.dtype.element_ty), mask=(p < P)[:, None] & (n < N)[None, :])
        thread_barrier()  # all threads have read the weights once more
        weight, decay = gl.zeros_like(weight), gl.to_tensor(1.0)
    gl.store(weights + entry, weight)
    gl.store(decays, decay)


@gluon.jit
def _keys(
    past_B, apart, B, count, N: gl.constexpr, BLOCK_N: gl.constexpr, ENTRIES: gl.constexpr, SUMS: gl.constexpr
):  # fmt: skip
    """B of the entries, one in each column, that of the token itself among them."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    entry, n = gl.arange(0, ENTRIES, gl.SliceLayout(0, RIGHT)), gl.arange(0, BLOCK_N, gl.SliceLayout(1, RIGHT))
    columns = gl.where(entry == count, B, past_B + entry * apart)
    return gl.load(columns[None, :] + n[:, None], mask=(n < N)[:, None], other=0.0)


@gluon.jit
def _answer(C, held, decay, keys, us, entry, N: gl.constexpr, SUMS: gl.constexpr, STATE: gl.constexpr):
    """What the state, and the entries with their weighted x, say to C: `decay held C + sum_i (B_i.C) us_i`."""
    P: gl.constexpr = held.shape[0]
    BLOCK_N: gl.constexpr = held.shape[1]
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LEFT))
    q = gl.load(C + n, mask=n < N, other=0.0)
    rows, _ = gl.broadcast(q[None, :], gl.zeros([P, BLOCK_N], gl.int1, LEFT))
    none = gl.zeros([P, us.shape[1]], gl.float32, SUMS)
    said = mma_v2(rows, keys, none) * us
    if held.dtype == q.dtype:
        # Every column of this product is the same: one counts.
        columns, _ = gl.broadcast(gl.convert_layout(q, gl.SliceLayout(1, RIGHT))[:, None], keys)
        said += gl.where((entry == 0)[None, :], mma_v2(held, columns, none), 0.0) * decay
        out = gl.sum(said, 1)
    else:
        out = gl.sum(widened(held) * gl.convert_layout(q, gl.SliceLayout(0, STATE)).to(gl.float32)[None, :], 1)
        out = gl.sum(said, 1) + gl.convert_layout(out, gl.SliceLayout(1, SUMS)) * decay
    return out


@gluon.jit
def _plus_entry(h, weight, x, B, p, n, P: gl.constexpr, N: gl.constexpr):
    """A state h with one more entry."""
    u = widened(gl.load(x + p, mask=p < P, other=0.0)) * weight
    return h + u[:, None] * widened(gl.load(B + n, mask=n < N, other=0.0))[None, :]
