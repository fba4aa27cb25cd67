"""The trapezoid with several ranks on a Hopper GPU: groups of warps that make, weigh and walk.

Four warps make keys, queries and inputs of the next chunks in shared memory (`triton_hopper_mimo_make`); four make the
weights of pairs; four walk along time with each of two heads. For 2, 4 or 8 ranks, and keys of which all columns turn:
the first members of the pairs are one tile, the second members another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

from everstate.ops.trapezoid.triton_hopper import ask, grow, halves_at, load_state, meet
from everstate.ops.trapezoid.triton_hopper_mimo_make import (
    ENTRIES,
    ROOMS,
    laid,
    make,
    rooms_for,
    vectors_for,
)
from everstate.ops.triton_hopper import (
    COLUMN,
    ROW,
    SQUARE,
    barriers_of,
    place_of,
    rows_of,
    store_tile,
    tiles_of,
    widened,
)
from everstate.ops.triton_launch import Tiles, launch

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call

REGISTERS = 128
"""Registers of a thread when a program of 512 threads starts; its groups then share them out."""


def forward(call: Call, y: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """Write outputs to `y`; the states and angles after each sequence."""
    launch(
        scan_kernel, (len(call.plan.segments) * call.heads // 2,),
        inputs_of(call), call.mimo_x, call.steps, *(tiles_of(t, 2) for t in (call.B, call.C)),
        call.B_bias, call.C_bias, call.rates, call.phases, call.D,
        call.entering(call.enter()), rows_of(y.flatten(0, 2), call.batch, call.length * call.ranks), final,
        call.plan.chunks, call.plan.segments, call.length, **sizes_of(call),
        INTERLEAVED=call.interleaved, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return final, call.final_angle


def inputs_of(call: Call) -> Tiles:
    """Those of the tokens of a chunk and one head."""
    return rows_of(call.x, call.batch, call.length, call.tokens)


def sizes_of(call: Call) -> dict[str, Any]:
    return {
        "HEADS": call.heads, "GROUPS": call.groups, "P": call.headdim, "HALF": call.pairs, "RANKS": call.ranks,
        "INPUTS": laid(call.ranks, call.headdim), "KEYS": laid(call.ranks, call.pairs),
    }  # fmt: skip


@gluon.jit
def weights_of(later, earlier, own, j, i, RANKS: gl.constexpr):
    """What entry i receives of j: by decay and scale if its token is later, by own weights if it is the same."""
    before, after = (j // RANKS)[:, None], (i // RANKS)[None, :]
    decay = gl.where(after > before, gl.exp2(later[None, :] - earlier[:, None]), 0.0)
    return gl.where(after == before, own[:, None], decay)


@gluon.jit
def _weigh(tiles, vectors, barriers, pairs, segments, segment, RANKS: gl.constexpr):
    """Four warps: weights of pairs `[j, i]` for what i receives from j, of two heads in turn.

    An entry receives from those of earlier tokens by their decay and scale, and by own weights from those of its own.
    """
    sums, weighted, owns, _, _, _ = vectors
    made, taken, weighed, free = barriers
    dtype: gl.constexpr = pairs.dtype
    j, i = gl.arange(0, ENTRIES, ROW), gl.arange(0, ENTRIES, COLUMN)
    none = gl.zeros((ENTRIES, ENTRIES), gl.float32, SQUARE)
    count = gl.load(segments + 5 * segment + 1)
    for turn in range(2 * count):
        head, step, room = turn % 2, turn // 2, turn % ROOMS
        mbarrier.wait(made.index(room), turn // ROOMS & 1)
        product = meet(halves_at(tiles, room), halves_at(tiles, ROOMS + room), none)
        later, earlier = sums.index(room).load(COLUMN), weighted.index(room).load(ROW)
        decay = weights_of(later, earlier, owns.index(room).load(ROW), j, i, RANKS)
        product = warpgroup_mma_wait(0, (product,))
        given = gl.where(decay == 0.0, 0.0, product * decay).to(dtype)
        mbarrier.arrive(taken.index(room), count=1)
        mbarrier.wait(free.index(head), (step & 1) ^ 1)
        pairs.index(head).store(given)
        fence_async_shared()
        mbarrier.arrive(weighed.index(head), count=1)


@gluon.jit
def _store_final(
    final, row, head, h1, h2, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, INTERLEAVED: gl.constexpr,
    wide: gl.constexpr,
):  # fmt: skip
    """A state with its columns in the order of the caller."""
    p, n = gl.arange(0, P, gl.SliceLayout(1, wide)), gl.arange(0, HALF, gl.SliceLayout(0, wide))
    final += (row.to(gl.int64) * HEADS + head) * (P * 2 * HALF)
    place = p[:, None] * (2 * HALF) + n[None, :] * (2 if INTERLEAVED else 1)
    gl.store(final + place, h1)
    gl.store(final + (1 if INTERLEAVED else HALF) + place, h2)


@gluon.jit
def _walk(
    us, tiles, vectors, barriers, pairs, out, y, entering, final, D, segments, chunks, length, segment, head,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """Four warps: one head along a segment. Outputs are `[p, i]`."""
    _, _, _, gives, takes, keeps = vectors
    made, taken, weighed, free = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    states: gl.constexpr = gl.DotOperandLayout(0, SQUARE, 2)
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    dtype: gl.constexpr = out.dtype
    none = gl.zeros((P, ENTRIES), gl.float32, SQUARE)
    _, count, sequence, start = place_of(segments, chunks, length, segment)
    h1, h2 = load_state(entering, segment, head, HEADS, P, HALF // 2, wide)
    skip = 0.0 if D is None else gl.load(D + head).to(gl.float32)
    side: gl.constexpr = gl.SliceLayout(1, wide)
    for step in range(count):
        turn = 2 * step + OWN
        room = turn % ROOMS
        u = us.index(room).reshape([ENTRIES, P])
        mbarrier.wait(made.index(room), turn // ROOMS & 1)
        answers = ask((h1, h2), halves_at(tiles, ROOMS + room), none, states, dtype)
        answers = warpgroup_mma_wait(0, (answers,)) * takes.index(room).load(COLUMN)[None, :]
        mbarrier.wait(weighed.index(OWN), step & 1)
        answers = warpgroup_mma(u.permute((1, 0)), pairs, answers, is_async=True)
        given = gives.index(room).load(gl.SliceLayout(0, inputs))
        added = (widened(u.permute((1, 0)).load(inputs)) * given[None, :]).to(dtype)
        h1, h2 = grow((h1, h2), halves_at(tiles, room), added, keeps.index(room).load(side))
        answers = warpgroup_mma_wait(2, (answers,))
        mbarrier.arrive(free.index(OWN), count=1)
        if D is not None:
            answers += widened(u.permute((1, 0)).load(SQUARE)) * skip
        tma.store_wait(0)
        out.reshape([ENTRIES, P]).permute((1, 0)).store(answers.to(dtype))
        fence_async_shared()
        store_tile(y, [sequence, start * RANKS + step * ENTRIES, head * P], out)
        h1, h2 = warpgroup_mma_wait(0, (h1, h2))
        mbarrier.arrive(taken.index(room), count=1)
    tma.store_wait(0)
    if gl.load(segments + 5 * segment + 4) == 1:
        _store_final(final, gl.load(segments + 5 * segment + 2), head, h1, h2, HEADS, P, HALF, INTERLEAVED, wide)


@gluon.jit
def scan_kernel(
    x, mimo_x, steps, B, C, B_bias, C_bias, rates, phases, D, entering, y, final, chunks, segments, length,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr, KEYS: gl.constexpr, INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads, which share B and C."""
    segment, head = gl.program_id(0) // (HEADS // 2), gl.program_id(0) % (HEADS // 2) * 2
    group = head // (HEADS // GROUPS)
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tiles = gl.allocate_shared_memory(y.dtype, [4 * ROOMS, ENTRIES, HALF], B.layout)  # keys, then queries
    us = gl.allocate_shared_memory(y.dtype, [ROOMS, 1, ENTRIES, P], y.layout)
    out = gl.allocate_shared_memory(y.dtype, [2, 1, ENTRIES, P], y.layout)
    pairs = gl.allocate_shared_memory(y.dtype, [2, ENTRIES, ENTRIES], square)
    made, taken, weighed, free = barriers_of(ROOMS, 1), barriers_of(ROOMS, 2), barriers_of(2, 1), barriers_of(2, 1)
    vectors, barriers = vectors_for(ROOMS), (made, taken, weighed, free)
    rooms = rooms_for(x, tiles, 2, RANKS, HALF)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_walk, (us, tiles, vectors, barriers, pairs.index(0), out.index(0), y, entering, final, D,
                     segments, chunks, length, segment, head, 0, HEADS, P, HALF, RANKS, INTERLEAVED)),
            (_walk, (us, tiles, vectors, barriers, pairs.index(1), out.index(1), y, entering, final, D,
                     segments, chunks, length, segment, head + 1, 1, HEADS, P, HALF, RANKS, INTERLEAVED)),
            (_weigh, (tiles, vectors, barriers, pairs, segments, segment, RANKS)),
            (make, (x, (B, C), mimo_x, steps, (B_bias, C_bias), rates, phases, None, tiles, us, vectors, rooms,
                    (made, taken), segments, chunks, length, segment, group, head,
                    HEADS, GROUPS, P, HALF, RANKS, INPUTS, KEYS, 2)),
        ],
        [4, 4, 4],
        [168, 80, 96],
    )  # fmt: skip
