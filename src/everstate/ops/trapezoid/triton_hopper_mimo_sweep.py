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
    warpgroup_mma_wait,
)

from everstate.ops.trapezoid.triton_hopper import grow, halves_at, load_state
from everstate.ops.trapezoid.triton_hopper_mimo import inputs_of, sizes_of
from everstate.ops.trapezoid.triton_hopper_mimo_make import ENTRIES, ROOMS, make, rooms_for, vectors_for
from everstate.ops.triton_hopper import barriers_of, place_of, rows_of, store_tile, tiles_of, widened
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
        inputs_of(call), call.mimo_x, upstream, call.steps, tiles_of(keys, 2), bias,
        call.rates, call.phases, entering,
        tiles_of(chunks, 2), None if entered is None else tiles_of(entered, 2),
        turned, last, call.plan.chunks, call.plan.segments, call.length, **sizes_of(call),
        REVERSE=dy is not None, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


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
    h1, h2 = load_state(entering, segment, head, HEADS, P, HALF // 2, wide)
    for step in range(count):
        now, turn = count - 1 - step if REVERSE else step, 2 * step + OWN
        room = turn % ROOMS
        place = (first + now) * HEADS + head
        tma.store_wait(0)
        out.index(2 * OWN).store(h1.to(dtype))
        out.index(2 * OWN + 1).store(h2.to(dtype))
        fence_async_shared()
        store_tile(boundaries, [place * P, 0], out.index(2 * OWN))
        store_tile(boundaries, [place * P, HALF], out.index(2 * OWN + 1))
        mbarrier.wait(made.index(room), turn // ROOMS & 1)
        u = us.index(room).reshape([ENTRIES, P]).permute((1, 0)).load(inputs)
        weight = (takes if REVERSE else gives).index(room).load(gl.SliceLayout(0, inputs))
        added = (widened(u) * weight[None, :]).to(dtype)
        h1, h2 = grow((h1, h2), halves_at(keys, room), added, keeps.index(room).load(side))
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
    x, mimo_x, dy, steps, B, bias, rates, phases, entering, boundaries, entered, turned, ends, chunks, segments, length,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr, KEYS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads, which share B and C."""
    segment, head = gl.program_id(0) // (HEADS // 2), gl.program_id(0) % (HEADS // 2) * 2
    group = head // (HEADS // GROUPS)
    dtype: gl.constexpr = boundaries.dtype
    keys = gl.allocate_shared_memory(dtype, [2 * ROOMS, ENTRIES, HALF], B.layout)
    us = gl.allocate_shared_memory(dtype, [ROOMS, 1, ENTRIES, P], x.layout)
    out = gl.allocate_shared_memory(dtype, [4, P, HALF], boundaries.layout)
    states, upstream = out, None
    if REVERSE:
        states = gl.allocate_shared_memory(dtype, [2 * ROOMS, P, HALF], boundaries.layout)
        upstream = dy, entered, states
    made, taken = barriers_of(ROOMS, 2 if REVERSE else 1), barriers_of(ROOMS, 1)
    vectors, barriers = vectors_for(ROOMS), (made, taken)
    rooms = rooms_for(x, keys, 1, RANKS, HALF)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_walk, (us, keys, states, vectors, barriers, out, boundaries, entering, turned, ends, segments,
                     chunks, length, segment, head, 0, HEADS, P, HALF, REVERSE)),
            (_walk, (us, keys, states, vectors, barriers, out, boundaries, entering, turned, ends, segments,
                     chunks, length, segment, head + 1, 1, HEADS, P, HALF, REVERSE)),
            (make, (x, (B,), mimo_x, steps, (bias,), rates, phases, upstream, keys, us, vectors, rooms, barriers,
                    segments, chunks, length, segment, group, head,
                    HEADS, GROUPS, P, HALF, RANKS, INPUTS, KEYS, 1)),
        ],
        [4, 4],
        [176, 144],
    )  # fmt: skip
