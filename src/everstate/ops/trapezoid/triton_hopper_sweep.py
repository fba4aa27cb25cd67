"""The states of the trapezoid at the boundaries of chunks on a Hopper GPU, or their gradients backwards.

What `everstate.ops.trapezoid.triton_forward.sweep_kernel` does, shared by groups of warps: one warp moves tiles into
shared memory ahead of time, four turn the keys of the next chunk, and four walk with each of two heads. Sizes and tiles
are those of `everstate.ops.trapezoid.triton_hopper`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from everstate.ops.trapezoid.triton_hopper import (
    REGISTERS,
    both_at,
    load_state,
    rows,
    sizes_of,
    store_state,
    two_stacks,
)
from everstate.ops.trapezoid.triton_hopper_backward import trig
from everstate.ops.trapezoid.triton_hopper_sums import by_warp, columns_of, halves, room_for_columns
from everstate.ops.trapezoid.triton_keys import NUMBERS
from everstate.ops.triton_hopper import barriers_of, place_of, tiles_of, vectors_of, widened
from everstate.ops.triton_launch import launch

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call


def sweep(
    call: Call, dy: Tensor | None, entering: Tensor | None, chunks: Tensor | None, ends: Tensor,
    entered: Tensor | None, turned: Tensor | None, kept: Tensor | None,
) -> None:  # fmt: skip
    """The states, forwards; or with dy their gradients, backwards."""
    x, keys, bias = (call.x, call.B, call.B_bias) if dy is None else (dy.squeeze(1), call.C, call.C_bias)
    launch(
        sweep_kernel, (len(call.plan.segments) * call.heads // 2,),
        rows(call, x), vectors_of(call.steps), tiles_of(keys, 2), bias,
        tiles_of(call.cos.view(x.dtype)), tiles_of(call.sin.view(x.dtype)),
        None if entered is None else tiles_of(entered, 2), entering, None if chunks is None else tiles_of(chunks, 2),
        ends, kept, turned, call.plan.chunks, call.plan.segments, call.length,
        **sizes_of(call), REVERSE=dy is not None, STAGES=2, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


@gluon.jit
def _feed(
    tensors, tiles, vectors, barriers, segments, chunks, length, segment, group, head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """One warp: what the keys are made of, then what belongs to each head, as soon as there is room."""
    x, steps, B, cos, sin, entered = tensors
    bases, cs, ss, us, hs = tiles
    sums, weighted = vectors
    angled, spent, full, empty = barriers
    first, count, sequence, start = place_of(segments, chunks, length, segment)
    states: gl.constexpr = 0 if entered is None else 2 * entered.block_type.nbytes
    for step in range(count):
        at = step % STAGES
        now = count - 1 - step if REVERSE else step
        place, row = (first + now) * HEADS + head, ((first + now) * GROUPS + group) * BLOCK
        mbarrier.wait(spent.index(at), (step // STAGES & 1) ^ 1)
        bar = angled.index(at)
        mbarrier.expect(bar, 2 * B.block_type.nbytes + 4 * cos.block_type.nbytes)
        for part in gl.static_range(2):
            tma.async_copy_global_to_shared(B, [row, part * 2 * HALF], bar, bases.index(2 * at + part))
            tma.async_copy_global_to_shared(cos, [(place + part) * BLOCK, 0], bar, cs.index(2 * at + part))
            tma.async_copy_global_to_shared(sin, [(place + part) * BLOCK, 0], bar, ss.index(2 * at + part))
        mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
        bar = full.index(at)
        mbarrier.expect(bar, 2 * x.block_type.nbytes + (2 if REVERSE else 4) * steps.block_type.nbytes + states)
        for own in gl.static_range(2):
            numbers = (place + own) * (NUMBERS * BLOCK)
            tma.async_copy_global_to_shared(steps, [numbers], bar, sums.index(2 * at + own))
            if not REVERSE:
                tma.async_copy_global_to_shared(steps, [numbers + BLOCK], bar, weighted.index(2 * at + own))
            tma.async_copy_global_to_shared(
                x, [sequence, start + now * BLOCK, (head + own) * P], bar, us.index(2 * at + own)
            )
            if entered is not None:
                tma.async_copy_global_to_shared(entered, [(place + own) * P, 0], bar, hs.index(2 * at + own))


@gluon.jit
def _turn(base, bias, cs, ss, out, HALF: gl.constexpr, half: gl.constexpr):
    """The columns of the keys of a head that turn, from those of B; `bias` is that of the head, if there is one."""
    dtype: gl.constexpr = out.dtype
    n = gl.arange(0, HALF, gl.SliceLayout(0, half))
    c, s = trig(cs, half), trig(ss, half)
    a, b = halves(widened(base.load(half)), HALF, half)
    if bias is not None:
        a += gl.load(bias + n)[None, :]
        b += gl.load(bias + HALF + n)[None, :]
    turned = gl.join((a * c - b * s).to(dtype), (a * s + b * c).to(dtype))
    out.store(turned.permute((0, 2, 1)).reshape([c.shape[0], 2 * HALF]))


@gluon.jit
def _shift(base, bias, out, HALF: gl.constexpr, half: gl.constexpr):
    """The columns that stand still."""
    m = gl.arange(0, 2 * HALF, gl.SliceLayout(0, half))
    still = base.load(half)
    if bias is not None:
        still = (widened(still) + gl.load(bias + 2 * HALF + m)[None, :]).to(out.dtype)
    out.store(still)


@gluon.jit
def _make(
    tiles, keys, barriers, bias, segments, segment, head,
    HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: the keys of two heads, up to two chunks ahead of their use."""
    bases, cs, ss, _, _ = tiles
    angled, spent, made, taken = barriers
    half: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [0, 1])
    for step in range(gl.load(segments + 5 * segment + 1)):
        at, room = step % STAGES, step % 2 * 2
        mbarrier.wait(angled.index(at), step // STAGES & 1)
        for own in gl.static_range(2):
            mine = None if bias is None else bias + (head + own) * (4 * HALF)
            mbarrier.wait(taken.index(room + own), (step // 2 & 1) ^ 1)
            turning, standing = both_at(keys, room + own)
            _shift(bases.index(2 * at + 1), mine, standing, HALF, half)
            _turn(bases.index(2 * at), mine, cs.index(2 * at + own), ss.index(2 * at + own), turning, HALF, half)
            fence_async_shared()
            mbarrier.arrive(made.index(room + own), count=1)
        mbarrier.arrive(spent.index(at), count=1)


@gluon.jit
def _store_turned(out, h, s, room, HALF: gl.constexpr, wide: gl.constexpr, narrow: gl.constexpr):
    """What turning a state by a common angle would change, given the gradient of what it becomes."""
    h1, h2 = halves(h, HALF, narrow)
    s1, s2 = halves(s.load(wide), HALF, narrow)
    room.store(by_warp(h2 * s1.to(gl.float32) - h1 * s2.to(gl.float32)).reshape(room.shape))
    change = columns_of(room)
    n = gl.arange(0, HALF, gl.SliceLayout(0, change.type.layout))
    gl.store(out + n[None, :], change)


@gluon.jit
def _write(boundaries, row, h1, h2, out, out2):
    """A state, once the one before is on its way."""
    tma.store_wait(0)
    out.store(h1.to(out.dtype))
    out2.store(h2.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(boundaries, [row, 0], out)
    tma.async_copy_shared_to_global(boundaries, [row, h1.shape[1]], out2)


@gluon.jit
def _walk(
    tiles, keys, vectors, barriers, out, boundaries, entering, ends, kept, turned, met, segments, segment, head,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Four warps: the state (p, n) of one head along a segment, in two halves."""
    _, _, _, us, hs = tiles
    sums, weighted = vectors
    full, empty, made, taken = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    token: gl.constexpr = gl.SliceLayout(0, inputs)
    dtype: gl.constexpr = us.dtype
    j = gl.arange(0, BLOCK, token)
    first, count = gl.load(segments + 5 * segment), gl.load(segments + 5 * segment + 1)
    h1, h2 = gl.zeros((P, 2 * HALF), gl.float32, wide), gl.zeros((P, 2 * HALF), gl.float32, wide)
    decayed = 0.0
    if entering is not None:
        h1, h2 = load_state(entering, segment, head, HEADS, P, HALF, wide)
    for step in range(count):
        at, room = step % STAGES, step % 2 * 2 + OWN
        place = (first + (count - 1 - step if REVERSE else step)) * HEADS + head
        if boundaries is not None:
            _write(boundaries, place * P, h1, h2, out.index(2 * OWN), out.index(2 * OWN + 1))
        mbarrier.wait(full.index(at), step // STAGES & 1)
        later = sums.index(2 * at + OWN).load(token)
        last = gl.sum(gl.where(j == BLOCK - 1, later, 0.0), 0)
        weight = gl.exp2(later if REVERSE else last - weighted.index(2 * at + OWN).load(token))
        added = us.index(2 * at + OWN).reshape([BLOCK, P]).permute((1, 0)).load(inputs)
        added = (widened(added) * weight[None, :]).to(dtype)
        mbarrier.wait(made.index(room), step // 2 & 1)
        turning, standing = both_at(keys, room)
        h1 = warpgroup_mma(added, turning, h1 * gl.exp2(last), is_async=True)
        h2 = warpgroup_mma(added, standing, h2 * gl.exp2(last), is_async=True)
        h1, h2 = warpgroup_mma_wait(0, (h1, h2))
        mbarrier.arrive(taken.index(room), count=1)
        decayed += last
        if turned is not None:
            _store_turned(turned + place * HALF, h1, hs.index(2 * at + OWN), met, HALF, wide, narrow)
        mbarrier.arrive(empty.index(at), count=1)
    tma.store_wait(0)
    if boundaries is None:
        store_state(ends, segment, head, h1, h2, HEADS, P, HALF, wide)
        gl.store(kept + segment * HEADS + head, decayed * 0.6931471805599453)
    elif gl.load(segments + 5 * segment + (3 if REVERSE else 4)) == 1:
        store_state(ends, gl.load(segments + 5 * segment + 2), head, h1, h2, HEADS, P, HALF, wide)


@gluon.jit
def sweep_kernel(
    x, steps, B, bias, cos, sin, entered, entering, boundaries, ends, kept, turned, chunks, segments, length,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    REVERSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads, which share B."""
    segment, head = gl.program_id(0) // (HEADS // 2), gl.program_id(0) % (HEADS // 2) * 2
    group = head // (HEADS // GROUPS)
    tile: gl.constexpr = gl.NVMMASharedLayout(4 * HALF, 16, 2)
    us = gl.allocate_shared_memory(x.dtype, [2 * STAGES, 1, BLOCK, P], x.layout)
    bases = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BLOCK, 2 * HALF], B.layout)
    cs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BLOCK, HALF], cos.layout)
    ss = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BLOCK, HALF], cos.layout)
    hs = us if entered is None else gl.allocate_shared_memory(x.dtype, [2 * STAGES, P, 2 * HALF], tile)
    keys = two_stacks(x.dtype, 4, BLOCK, 2 * HALF, tile)
    out = gl.allocate_shared_memory(x.dtype, [4, P, 2 * HALF], tile)
    sums = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], steps.layout)
    weighted = sums if REVERSE else gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], steps.layout)
    met, met2 = room_for_columns(1, HALF), room_for_columns(1, HALF)
    angled, spent = barriers_of(STAGES, 1), barriers_of(STAGES, 1)
    full, empty, made, taken = barriers_of(STAGES, 1), barriers_of(STAGES, 2), barriers_of(4, 1), barriers_of(4, 1)
    fence_async_shared()
    tiles, vectors = (bases, cs, ss, us, hs), (sums, weighted)
    gl.warp_specialize(
        [
            (_walk, (tiles, keys, vectors, (full, empty, made, taken), out, boundaries, entering, ends, kept, turned,
                     met, segments, segment, head, 0, HEADS, P, HALF, BLOCK, STAGES, REVERSE)),
            (_walk, (tiles, keys, vectors, (full, empty, made, taken), out, boundaries, entering, ends, kept, turned,
                     met2, segments, segment, head + 1, 1, HEADS, P, HALF, BLOCK, STAGES, REVERSE)),
            (_make, (tiles, keys, (angled, spent, made, taken), bias, segments, segment, head, HALF, STAGES)),
            (_feed, ((x, steps, B, cos, sin, entered), tiles, vectors, (angled, spent, full, empty), segments, chunks,
                     length, segment, group, head, HEADS, GROUPS, P, HALF, BLOCK, STAGES, REVERSE)),
        ],
        [4, 4, 1],
        [168, 128, 24],
    )  # fmt: skip
