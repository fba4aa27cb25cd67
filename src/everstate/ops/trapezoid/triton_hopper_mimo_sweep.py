"""The sweeps along time of the trapezoid with several ranks on a Hopper GPU: states before chunks, and their gradients.

As in `triton_hopper_mimo`, four warps make keys and inputs (backwards queries, and gradients of outputs are copied) of
two heads ahead of time; four walk with each head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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

from everstate.ops.trapezoid.triton_hopper_mimo import (
    ENTRIES,
    PART,
    fetch_chunk,
    laid,
    load_biases,
    load_inputs,
    load_numbers,
    load_part,
    load_state,
    places_in,
    sizes_of,
    store_inputs,
    store_numbers,
    tiles_of,
    turn,
    vectors_for,
)
from everstate.ops.trapezoid.triton_keys import NUMBERS
from everstate.ops.triton_hopper import barriers_of, place_of, rows_of
from everstate.ops.triton_launch import launch

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call


REGISTERS = 168
"""Registers of a thread when a program of three groups of 128 threads starts; they then share them out."""


def sweep(
    call: Call, dy: Tensor | None, entering: Tensor | None, chunks: Tensor, last: Tensor, entered: Tensor | None,
    turned: Tensor | None,
) -> None:  # fmt: skip
    """The state before each chunk goes to `chunks`, that after the last to `last`. Given dy, backwards, its gradient;
    and `turned` gets what turning each of the states `entered` would change."""
    keys, bias = (call.B, call.B_bias) if dy is None else (call.C, call.C_bias)
    upstream = None if dy is None else rows_of(dy, call.batch, call.length * call.ranks)
    entering = torch.zeros_like(last) if entering is None else entering
    launch(
        sweep_kernel, (len(call.plan.segments) * call.heads // 2,),
        call.x, call.mimo_x, upstream, call.steps, keys, bias, call.cos, call.sin, entering,
        tiles_of(chunks, call.headdim, 2), None if entered is None else tiles_of(entered, call.headdim, 2),
        turned, last, call.plan.chunks, call.plan.segments, call.length, *call.x.stride()[:2], **sizes_of(call),
        KEYS=laid(call.ranks, call.pairs, 8), REVERSE=dy is not None, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


@gluon.jit
def _ask(dy, entered, bar, us, states, room, at, tile, HALF: gl.constexpr):
    """Gradients of outputs of a head, and the state that its gradient meets, into their places."""
    mbarrier.expect(bar, dy.block_type.nbytes + 2 * entered.block_type.nbytes)
    tma.async_copy_global_to_shared(dy, at, bar, us.index(room))
    tma.async_copy_global_to_shared(entered, [tile, 0], bar, states.index(2 * room))
    tma.async_copy_global_to_shared(entered, [tile, HALF], bar, states.index(2 * room + 1))


@gluon.jit
def _turn_all(first, biases, B, cos, sin, keys, room, places, RANKS: gl.constexpr, HALF: gl.constexpr):
    """The keys of two heads of a chunk, each part loaded while the one before is turned."""
    now = first
    for part in gl.static_range(ENTRIES // PART):
        following = now
        if part + 1 < ENTRIES // PART:
            following = load_part(B, cos, sin, places[0], places[1], part + 1, RANKS, HALF)
        turn(now[0], now[1], biases[0], keys, room, part * PART, HALF)
        turn(now[0], now[2], biases[1], keys, room + 1, part * PART, HALF)
        now = following


@gluon.jit
def _make(
    x, mimo_x, dy, steps, B, bias, cos, sin, entered, keys, us, states, vectors, barriers, segments, chunks, length,
    segment, group, head, x_token, x_head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr, KEYS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Four warps: keys, inputs and numbers of two heads, chunk by chunk, two chunks ahead of their use."""
    made, taken = barriers
    TOKENS: gl.constexpr = ENTRIES // RANKS
    entry, angle, each = places_in(RANKS, HALF, KEYS)
    first, count, sequence, offset = place_of(segments, chunks, length, segment)
    begin, stop = gl.load(chunks + 2 * first), gl.load(chunks + (2 * (first + count) - 1))
    for step in range(count):
        now = count - 1 - step if REVERSE else step
        chunk, start, room = (first + now).to(gl.int64), begin + now * TOKENS, step % 2 * 2
        place = chunk * HEADS + head
        row = (chunk * GROUPS + group) * (ENTRIES * 2 * HALF)
        c, s = cos + place * (TOKENS * HALF), sin + place * (TOKENS * HALF)
        ahead = gl.minimum(step + 2, count - 1)
        ahead = count - 1 - ahead if REVERSE else ahead
        fetch_chunk(None if REVERSE else x, cos, sin, begin + ahead * TOKENS, stop, (first + ahead) * HEADS + head,
                    head, x_token, x_head, HALF, P, RANKS)  # fmt: skip
        # Asked for before there is room.
        if not REVERSE:
            x0 = load_inputs(x, mimo_x, start, stop, head, x_token, x_head, RANKS, P, INPUTS)
            x1 = load_inputs(x, mimo_x, start, stop, head + 1, x_token, x_head, RANKS, P, INPUTS)
        numbers = load_numbers(steps + place * (NUMBERS * TOKENS), TOKENS)
        others = load_numbers(steps + (place + 1) * (NUMBERS * TOKENS), TOKENS)
        source = load_part(B + row, c, s, entry, angle, 0, RANKS, HALF)
        mbarrier.wait(taken.index(room), (step // 2 & 1) ^ 1)
        mbarrier.wait(taken.index(room + 1), (step // 2 & 1) ^ 1)
        if REVERSE:
            for own in gl.static_range(2):
                tile = ((first + now) * HEADS + head + own) * P
                at = [sequence, offset * RANKS + now * ENTRIES, (head + own) * P]
                _ask(dy, entered, made.index(room + own), us, states, room + own, at, tile, HALF)
        store_numbers(vectors, room, numbers)
        store_numbers(vectors, room + 1, others)
        if not REVERSE:
            store_inputs(x0, us.index(room).reshape([ENTRIES, P]), RANKS, P, INPUTS)
            store_inputs(x1, us.index(room + 1).reshape([ENTRIES, P]), RANKS, P, INPUTS)
        biases = load_biases(bias, head, each, RANKS, HALF)
        _turn_all(source, biases, B + row, c, s, keys, room, (entry, angle), RANKS, HALF)
        fence_async_shared()
        mbarrier.arrive(made.index(room), count=1)
        mbarrier.arrive(made.index(room + 1), count=1)


@gluon.jit
def _walk(
    us, keys, states, vectors, barriers, out, boundaries, entering, turned, ends, segments, chunks, length,
    segment, head,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Four warps: one head along a segment."""
    _, _, _, gives, takes, keeps = vectors
    made, taken = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    side: gl.constexpr = gl.SliceLayout(1, wide)
    dtype: gl.constexpr = out.dtype
    n = gl.arange(0, HALF, gl.SliceLayout(0, wide))
    first, count, _, _ = place_of(segments, chunks, length, segment)
    h1, h2 = load_state(entering, segment, head, HEADS, P, HALF, wide)
    for step in range(count):
        now, room = count - 1 - step if REVERSE else step, step % 2 * 2 + OWN
        place = (first + now) * HEADS + head
        tma.store_wait(0)
        out.index(2 * OWN).store(h1.to(dtype))
        out.index(2 * OWN + 1).store(h2.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(boundaries, [place * P, 0], out.index(2 * OWN))
        tma.async_copy_shared_to_global(boundaries, [place * P, HALF], out.index(2 * OWN + 1))
        mbarrier.wait(made.index(room), step // 2 & 1)
        u = us.index(room).reshape([ENTRIES, P]).permute((1, 0)).load(inputs)
        weight = (takes if REVERSE else gives).index(room).load(gl.SliceLayout(0, inputs))
        added = (u.to(gl.float32) * weight[None, :]).to(dtype)
        kept = keeps.index(room).load(side)[:, None]
        h1 = warpgroup_mma(added, keys.index(2 * room), h1 * kept, is_async=True)
        h2 = warpgroup_mma(added, keys.index(2 * room + 1), h2 * kept, is_async=True)
        h1, h2 = warpgroup_mma_wait(0, (h1, h2))
        if REVERSE:
            s1 = states.index(2 * room).load(wide).to(gl.float32)
            s2 = states.index(2 * room + 1).load(wide).to(gl.float32)
            gl.store(turned + place.to(gl.int64) * HALF + n, gl.sum(h2 * s1 - h1 * s2, 0))
        mbarrier.arrive(taken.index(room), count=1)
    tma.store_wait(0)
    if gl.load(segments + (5 * segment + (3 if REVERSE else 4))) == 1:
        p = gl.arange(0, P, side)
        sequence = gl.load(segments + (5 * segment + 2)).to(gl.int64)
        last = (sequence * HEADS + head) * (P * 2 * HALF) + (p[:, None] * (2 * HALF) + n[None, :])
        gl.store(ends + last, h1)
        gl.store(ends + HALF + last, h2)


@gluon.jit
def sweep_kernel(
    x, mimo_x, dy, steps, B, bias, cos, sin, entering, boundaries, entered, turned, ends, chunks, segments, length,
    x_token, x_head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr, KEYS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads, which share B and C."""
    segment, head = gl.program_id(0) // (HEADS // 2), gl.program_id(0) % (HEADS // 2) * 2
    group = head // (HEADS // GROUPS)
    tile: gl.constexpr = boundaries.layout
    dtype: gl.constexpr = boundaries.dtype
    keys = gl.allocate_shared_memory(dtype, [8, ENTRIES, HALF], tile)
    us = gl.allocate_shared_memory(dtype, [4, 1, ENTRIES, P], gl.NVMMASharedLayout(128, 16, 3))
    out = gl.allocate_shared_memory(dtype, [4, P, HALF], tile)
    states = out
    if REVERSE:
        states = gl.allocate_shared_memory(dtype, [8, P, HALF], tile)
    made, taken = barriers_of(4, 2 if REVERSE else 1), barriers_of(4, 1)
    vectors, barriers = vectors_for(4), (made, taken)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_walk, (us, keys, states, vectors, barriers, out, boundaries, entering, turned, ends, segments,
                     chunks, length, segment, head, 0, HEADS, P, HALF, REVERSE)),
            (_walk, (us, keys, states, vectors, barriers, out, boundaries, entering, turned, ends, segments,
                     chunks, length, segment, head + 1, 1, HEADS, P, HALF, REVERSE)),
            (_make, (x, mimo_x, dy, steps, B, bias, cos, sin, entered, keys, us, states, vectors, barriers, segments,
                     chunks, length, segment, group, head, x_token, x_head, HEADS, GROUPS, P, HALF, RANKS, INPUTS, KEYS,
                     REVERSE)),
        ],
        [4, 4],
        [176, 144],
    )  # fmt: skip
