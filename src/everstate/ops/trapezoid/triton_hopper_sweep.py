"""The states of the trapezoid at the boundaries of chunks on a Hopper GPU, or their gradients backwards.

What `everstate.ops.trapezoid.triton_forward.sweep_kernel` does, shared by groups of warps as in
`everstate.ops.trapezoid.triton_hopper`, whose sizes and tiles they have: one warp moves tiles into shared memory ahead
of time, one for each of two heads makes cosines and sines, four turn the keys of the next chunk, and four walk with
each head.
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

from everstate.core.kernels import processors
from everstate.ops.trapezoid.triton_hopper import (
    REGISTERS,
    barriers_of_groups,
    both_at,
    bring_turns,
    load_state,
    rates_of,
    rows,
    sizes_of,
    store_state,
    two_stacks,
)
from everstate.ops.trapezoid.triton_hopper_angles import layout_of_walk, trig_by_walking
from everstate.ops.trapezoid.triton_hopper_sums import by_warp, columns_of, halves, room_for_columns
from everstate.ops.trapezoid.triton_keys import DT, NUMBERS
from everstate.ops.triton_hopper import load_tile, place_of, store_tile, tiles_of, vectors_of, widened
from everstate.ops.triton_launch import launch

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call


def sweep(
    call: Call, dy: Tensor | None, entering: Tensor | None, chunks: Tensor | None, ends: Tensor,
    entered: Tensor | None, turned: Tensor | None, kept: Tensor | None,
) -> None:  # fmt: skip
    """The states, forwards; or with dy their gradients, backwards."""
    x, keys, bias = (call.x, call.B, call.B_bias) if dy is None else (dy.squeeze(1), call.C, call.C_bias)
    items = len(call.plan.segments) * call.heads // 2
    launch(
        sweep_kernel, (min(items, processors(call.x.device)),),
        rows(call, x), vectors_of(call.steps), tiles_of(keys, 2), bias, rates_of(call.rates), call.phases,
        None if entered is None else tiles_of(entered, 2), entering, None if chunks is None else tiles_of(chunks, 2),
        ends, kept, turned, call.plan.chunks, call.plan.segments, call.length, items,
        **sizes_of(call), REVERSE=dy is not None, STAGES=2, ROOMS=3, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


@gluon.jit
def _feed(
    tensors, tiles, rates, vectors, barriers, segments, chunks, length, items,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """One warp: what angles and keys are made of, then what belongs to each head, as soon as there is room."""
    x, steps, B, omega, entered = tensors
    bases = tiles[0]
    full, empty, brought, read, timed, heard = barriers
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2
        group = head // (HEADS // GROUPS)
        first, count, sequence, start = place_of(segments, chunks, length, segment)
        for chunk in range(count):
            step = done + chunk
            at, odd = step % STAGES, (step // STAGES & 1) ^ 1
            now = count - 1 - chunk if REVERSE else chunk
            place, row = (first + now) * HEADS + head, ((first + now) * GROUPS + group) * BLOCK
            bring_turns(omega, steps, rates, timed, heard, step, first + now, head, HEADS, BLOCK, NUMBERS, DT)
            mbarrier.wait(read.index(at), odd)
            bar = brought.index(at)
            mbarrier.expect(bar, 2 * B.block_type.nbytes)
            for part in gl.static_range(2):
                load_tile(B, [row, part * 2 * HALF], bar, bases.index(2 * at + part))
            mbarrier.wait(empty.index(at), odd)
            token = start + now * BLOCK
            _bring_heads(x, steps, entered, tiles, vectors, full.index(at), at, place, sequence, token, head,
                         P, BLOCK, REVERSE)  # fmt: skip
        done += count


@gluon.jit
def _bring_heads(
    x, steps, entered, tiles, vectors, bar, at, place, sequence, token, head,
    P: gl.constexpr, BLOCK: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Inputs and numbers of both heads, and the states that enter, where these are asked for."""
    _, us, hs = tiles
    sums, weighted = vectors
    states: gl.constexpr = 0 if entered is None else 2 * entered.block_type.nbytes
    mbarrier.expect(bar, 2 * x.block_type.nbytes + (2 if REVERSE else 4) * steps.block_type.nbytes + states)
    for own in gl.static_range(2):
        numbers = (place + own) * (NUMBERS * BLOCK)
        load_tile(steps, [numbers], bar, sums.index(2 * at + own))
        if not REVERSE:
            load_tile(steps, [numbers + BLOCK], bar, weighted.index(2 * at + own))
        load_tile(x, [sequence, token, (head + own) * P], bar, us.index(2 * at + own))
        if entered is not None:
            load_tile(entered, [(place + own) * P, 0], bar, hs.index(2 * at + own))


@gluon.jit
def _angle(
    speeds, dts, phases, trig, barriers, segments, items,
    OWN: gl.constexpr, HEADS: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """One warp: cosines and sines of all angles of one head, chunk by chunk, given the phases at their starts."""
    angled, turned, timed, heard = barriers
    pair = gl.arange(0, HALF, gl.SliceLayout(0, layout_of_walk(HALF)))
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2 + OWN
        first, count = gl.load(segments + 5 * segment), gl.load(segments + 5 * segment + 1)
        here = phases + (first * HEADS + head) * HALF + pair
        following = gl.load(here + (count - 1 if REVERSE else 0) * (HEADS * HALF))
        for chunk in range(count):
            step, begin = done + chunk, following
            # Asked for here, these are there when this chunk is done.
            after = gl.maximum(count - 2 - chunk, 0) if REVERSE else gl.minimum(chunk + 1, count - 1)
            following = gl.load(here + after * (HEADS * HALF))
            mbarrier.wait(timed.index(step % 2), step // 2 & 1)
            mbarrier.wait(turned.index(OWN), step & 1 ^ 1)
            trig_by_walking(begin, speeds, dts, trig, step % 2, OWN, HALF, BLOCK)
            mbarrier.arrive(angled.index(OWN), count=1)
            mbarrier.arrive(heard.index(step % 2), count=1)
        done += count


@gluon.jit
def _turn(base, bias, c, s, out, HALF: gl.constexpr, half: gl.constexpr):
    """The columns of the keys of a head that turn, from those of B; `bias` is that of the head, if there is one."""
    dtype: gl.constexpr = out.dtype
    n = gl.arange(0, HALF, gl.SliceLayout(0, half))
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
    bases, trig, keys, barriers, bias, segments, items,
    HEADS: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr, ROOMS: gl.constexpr,
):  # fmt: skip
    """Four warps: the keys of two heads, chunk by chunk, into rooms used in turn."""
    brought, read, angled, turned, made, taken = barriers
    half: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [0, 1])
    both: gl.constexpr = gl.BlockedLayout([1, 16], [256 // HALF, HALF // 8], [4, 1], [0, 1])
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2
        count = gl.load(segments + 5 * segment + 1)
        for at in range(2 * count):
            turn = 2 * done + at
            own, step, room = turn % 2, turn // 2, turn % ROOMS
            mine = None
            if bias is not None:
                mine = bias + (head + own) * (4 * HALF)
            mbarrier.wait(angled.index(own), step & 1)
            c, s = gl.split(trig.index(own).load(both).to(gl.float32).reshape([BLOCK, HALF, 2]))
            mbarrier.arrive(turned.index(own), count=1)
            mbarrier.wait(brought.index(step % 2), step // 2 & 1)
            mbarrier.wait(taken.index(room), (turn // ROOMS & 1) ^ 1)
            turning, standing = both_at(keys, room)
            _shift(bases.index(step % 2 * 2 + 1), mine, standing, HALF, half)
            c, s = gl.convert_layout(c, half), gl.convert_layout(s, half)
            _turn(bases.index(step % 2 * 2), mine, c, s, turning, HALF, half)
            mbarrier.arrive(read.index(step % 2), count=1)
            fence_async_shared()
            mbarrier.arrive(made.index(room), count=1)
        done += count


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
    store_tile(boundaries, [row, 0], out)
    store_tile(boundaries, [row, h1.shape[1]], out2)


@gluon.jit
def _end(
    boundaries, ends, kept, segments, segment, head, h1, h2, decayed,
    HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, REVERSE: gl.constexpr, wide: gl.constexpr,
):  # fmt: skip
    """What a segment adds to a state of zeros and keeps of it; with boundaries, the state at the end of a sequence."""
    if boundaries is None:
        store_state(ends, segment, head, h1, h2, HEADS, P, HALF, wide)
        gl.store(kept + segment * HEADS + head, decayed * 0.6931471805599453)
    elif gl.load(segments + 5 * segment + (3 if REVERSE else 4)) == 1:
        store_state(ends, gl.load(segments + 5 * segment + 2), head, h1, h2, HEADS, P, HALF, wide)


@gluon.jit
def _walk(
    tiles, keys, vectors, barriers, out, boundaries, entering, ends, kept, turned, met, segments, items,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, ROOMS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Four warps: the state (p, n) of one head along a segment, in two halves."""
    _, us, hs = tiles
    sums, weighted = vectors
    full, empty, made, taken = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    token: gl.constexpr = gl.SliceLayout(0, inputs)
    dtype: gl.constexpr = us.dtype
    j = gl.arange(0, BLOCK, token)
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2 + OWN
        first, count = gl.load(segments + 5 * segment), gl.load(segments + 5 * segment + 1)
        h1, h2 = gl.zeros((P, 2 * HALF), gl.float32, wide), gl.zeros((P, 2 * HALF), gl.float32, wide)
        decayed = 0.0
        if entering is not None:
            h1, h2 = load_state(entering, segment, head, HEADS, P, HALF, wide)
        for chunk in range(count):
            step = done + chunk
            at, room, phase = step % STAGES, (2 * step + OWN) % ROOMS, (2 * step + OWN) // ROOMS & 1
            place = (first + (count - 1 - chunk if REVERSE else chunk)) * HEADS + head
            if boundaries is not None:
                _write(boundaries, place * P, h1, h2, out.index(2 * OWN), out.index(2 * OWN + 1))
            mbarrier.wait(full.index(at), step // STAGES & 1)
            later = sums.index(2 * at + OWN).load(token)
            last = gl.sum(gl.where(j == BLOCK - 1, later, 0.0), 0)
            weight = gl.exp2(later if REVERSE else last - weighted.index(2 * at + OWN).load(token))
            added = us.index(2 * at + OWN).reshape([BLOCK, P]).permute((1, 0)).load(inputs)
            added = (widened(added) * weight[None, :]).to(dtype)
            mbarrier.wait(made.index(room), phase)
            turning, standing = both_at(keys, room)
            h1 = warpgroup_mma(added, turning, h1 * gl.exp2(last), is_async=True)
            h2 = warpgroup_mma(added, standing, h2 * gl.exp2(last), is_async=True)
            h1, h2 = warpgroup_mma_wait(0, (h1, h2))
            mbarrier.arrive(taken.index(room), count=1)
            decayed += last
            if turned is not None:
                _store_turned(turned + place * HALF, h1, hs.index(2 * at + OWN), met, HALF, wide, narrow)
            mbarrier.arrive(empty.index(at), count=1)
        _end(boundaries, ends, kept, segments, segment, head, h1, h2, decayed, HEADS, P, HALF, REVERSE, wide)
        done += count
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items"])
def sweep_kernel(
    x, steps, B, bias, omega, phases, entered, entering, boundaries, ends, kept, turned, chunks, segments, length,
    items, HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    REVERSE: gl.constexpr, STAGES: gl.constexpr, ROOMS: gl.constexpr,
):  # fmt: skip
    """One program per multiprocessor, for one segment and pair of heads, which share B, after the other."""
    tile: gl.constexpr = gl.NVMMASharedLayout(4 * HALF, 16, 2)
    us = gl.allocate_shared_memory(x.dtype, [2 * STAGES, 1, BLOCK, P], x.layout)
    bases = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BLOCK, 2 * HALF], B.layout)
    trig = gl.allocate_shared_memory(gl.float16, [2, BLOCK, 2 * HALF], tile)
    speeds = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK, HALF], omega.layout)
    hs = us if entered is None else gl.allocate_shared_memory(x.dtype, [2 * STAGES, P, 2 * HALF], tile)
    keys = two_stacks(x.dtype, ROOMS, BLOCK, 2 * HALF, tile)
    out = gl.allocate_shared_memory(x.dtype, [4, P, 2 * HALF], tile)
    sums = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], steps.layout)
    dts = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], steps.layout)
    weighted = sums if REVERSE else gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], steps.layout)
    met, met2 = room_for_columns(1, HALF), room_for_columns(1, HALF)
    walking, making, feeding, angling = barriers_of_groups(STAGES, ROOMS)
    fence_async_shared()
    tiles, vectors = (bases, us, hs), (sums, weighted)
    gl.warp_specialize(
        [
            (_walk, (tiles, keys, vectors, walking, out, boundaries, entering, ends, kept, turned,
                     met, segments, items, 0, HEADS, P, HALF, BLOCK, STAGES, ROOMS, REVERSE)),
            (_walk, (tiles, keys, vectors, walking, out, boundaries, entering, ends, kept, turned,
                     met2, segments, items, 1, HEADS, P, HALF, BLOCK, STAGES, ROOMS, REVERSE)),
            (_make, (bases, trig, keys, making, bias, segments, items, HEADS, HALF, BLOCK, ROOMS)),
            (_feed, ((x, steps, B, omega, entered), tiles, (speeds, dts), vectors, feeding, segments, chunks,
                     length, items, HEADS, GROUPS, P, HALF, BLOCK, STAGES, REVERSE)),
            (_angle, (speeds, dts, phases, trig, angling, segments, items, 0, HEADS, HALF, BLOCK, REVERSE)),
            (_angle, (speeds, dts, phases, trig, angling, segments, items, 1, HEADS, HALF, BLOCK, REVERSE)),
        ],
        [4, 4, 1, 1, 1],
        [168, 104, 72, 72, 72],
    )  # fmt: skip
