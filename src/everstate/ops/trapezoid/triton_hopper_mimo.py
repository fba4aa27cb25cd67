"""The trapezoid with several ranks on a Hopper GPU: groups of warps that make, weigh and walk.

A chunk has 64 entries: the ranks of a token follow each other. Four warps make keys, queries and inputs of the next
chunks in shared memory, of B, C and x, whose ranks share cosines, sines and numbers per token; four make the weights of
pairs; four walk along time with each of two heads. For 2, 4 or 8 ranks, and keys of which all columns turn: the first
members of the pairs are one tile, the second members another.
"""

from __future__ import annotations

from functools import cache
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

from everstate.ops.trapezoid.triton_keys import NUMBERS
from everstate.ops.triton_hopper import COLUMN, ROW, SQUARE, VECTOR, barriers_of, place_of, rows_of
from everstate.ops.triton_launch import Form, Tiles, launch

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call

ENTRIES = gl.constexpr(64)
"""Entries of a chunk."""

PART = gl.constexpr(16)
"""Entries that the makers turn together."""

REGISTERS = 128
"""Registers of a thread when a program of four groups of 128 threads starts; they then share them out."""


def forward(call: Call, y: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """Write outputs to `y`; the states and angles after each sequence."""
    launch(
        scan_kernel, (len(call.plan.segments) * call.heads // 2,),
        call.x, call.mimo_x, call.steps, call.B, call.C, call.B_bias, call.C_bias, call.cos, call.sin, call.D,
        call.entering(call.enter()), rows_of(y.flatten(0, 2), call.batch, call.length * call.ranks), final,
        call.plan.chunks, call.plan.segments, call.length, *call.x.stride()[:2], **sizes_of(call),
        KEYS=laid(call.ranks, call.pairs, 8), INTERLEAVED=call.interleaved, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return final, call.final_angle


@cache
def _form_of(rows: int, columns: int) -> Form:
    return Form(rows, columns, layout=gl.NVMMASharedLayout(2 * columns, 16, 2))


def tiles_of(t: Tensor, rows: int, parts: int) -> Tiles:
    """So many rows of one of the parts of the columns of keys, states or cosines."""
    flat = t.flatten(0, -2)
    return Tiles(flat, tuple(flat.shape), flat.stride(), _form_of(rows, t.shape[-1] // parts))


def sizes_of(call: Call) -> dict[str, Any]:
    return {
        "HEADS": call.heads, "GROUPS": call.groups, "P": call.headdim, "HALF": call.pairs, "RANKS": call.ranks,
        "INPUTS": laid(call.ranks, call.headdim, 8),
    }  # fmt: skip


def laid(ranks: int, width: int, threads: int) -> gl.BlockedLayout:
    """How four warps hold rows of entries by token, rank and column, so many threads a row.

    A thread has entries of one rank: what belongs to ranks is in a few registers.
    """
    rows = 32 // threads
    lanes = min(ranks, rows)
    return gl.BlockedLayout(
        [1, 1, width // threads], [rows // lanes, lanes, threads], [4 * lanes // ranks, ranks // lanes, 1], [2, 1, 0]
    )


@gluon.jit
def turn(source, turn, bias, out, at, ROW: gl.constexpr, HALF: gl.constexpr):
    """16 keys of a head, from ROW on, into two tiles of `out`; `source` is rows of B, `bias` that of the head."""
    dtype: gl.constexpr = out.dtype
    a, b = source[0].to(gl.float32), source[1].to(gl.float32)
    a += bias[0][None, :, :]
    b += bias[1][None, :, :]
    c, s = turn[0].to(gl.float32)[:, None, :], turn[1].to(gl.float32)[:, None, :]
    out.index(2 * at).slice(ROW, PART).store((a * c - b * s).to(dtype).reshape([PART, HALF]))
    out.index(2 * at + 1).slice(ROW, PART).store((a * s + b * c).to(dtype).reshape([PART, HALF]))


@gluon.jit
def load_part(B, cos, sin, entry, angle, part: gl.constexpr, RANKS: gl.constexpr, HALF: gl.constexpr):
    """16 rows of B, and the cosines and sines of their tokens for two heads, which lie behind each other."""
    rows = B + part * (PART * 2 * HALF)
    at = angle + part * (PART // RANKS * HALF)
    other = at + ENTRIES // RANKS * HALF
    return (
        (gl.load(rows + entry), gl.load(rows + HALF + entry)),
        (gl.load(cos + at), gl.load(sin + at)),
        (gl.load(cos + other), gl.load(sin + other)),
    )


@gluon.jit
def load_bias(bias, at, HALF: gl.constexpr):
    """What belongs to the first members of some pairs, and to the second; zeros if there is no bias."""
    if bias is None:
        return at.to(gl.float32) * 0.0, at.to(gl.float32) * 0.0
    else:
        return gl.load(bias + at), gl.load(bias + HALF + at)


@gluon.jit
def load_biases(bias, head, at, RANKS: gl.constexpr, HALF: gl.constexpr):
    """Those of two heads."""
    own = at + head * (RANKS * 2 * HALF)
    return load_bias(bias, own, HALF), load_bias(bias, own + RANKS * 2 * HALF, HALF)


@gluon.jit
def _turn_all(
    first, biases, B, C, C_bias, cos, sin, keys, queries, room, head, places, RANKS: gl.constexpr, HALF: gl.constexpr
):  # fmt: skip
    """The keys and queries of two heads of a chunk, each part loaded while the one before is turned."""
    entry, angle, each = places
    PARTS: gl.constexpr = ENTRIES // PART
    now = first
    for part in gl.static_range(2 * PARTS):
        following = now
        if part + 1 < 2 * PARTS:
            source = B if part + 1 < PARTS else C
            following = load_part(source, cos, sin, entry, angle, (part + 1) % PARTS, RANKS, HALF)
        if part == PARTS:
            biases = load_biases(C_bias, head, each, RANKS, HALF)
        out = keys if part < PARTS else queries
        turn(now[0], now[1], biases[0], out, room, part % PARTS * PART, HALF)
        turn(now[0], now[2], biases[1], out, room + 1, part % PARTS * PART, HALF)
        now = following


@gluon.jit
def fetch(rows, COUNT: gl.constexpr, last, stride, WIDTH: gl.constexpr):
    """Bring rows up to `last` of so many numbers of 16 bits into the L2 cache."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    EACH: gl.constexpr = WIDTH // 16
    at = gl.arange(0, COUNT * EACH, line)
    there = rows + (gl.minimum(at // EACH, last) * stride + at % EACH * 16)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [there], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_numbers(steps, TOKENS: gl.constexpr):
    """Numbers per token by entry: sums of log decays, those less log scales, own weights; and the sum of the chunk."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, ENTRIES, line) // (ENTRIES // TOKENS)
    sums, weighted, own = gl.load(steps + at), gl.load(steps + TOKENS + at), gl.load(steps + 3 * TOKENS + at)
    return sums, weighted, own, gl.load(steps + (TOKENS - 1))


@gluon.jit
def store_numbers(vectors, room, numbers):
    """These; how much the chunk keeps of what an entry gives, how much an entry reads of the state before, and how much
    the chunk keeps of that."""
    sums, weighted, own, last = numbers
    vectors[0].index(room).store(sums)
    vectors[1].index(room).store(weighted)
    vectors[2].index(room).store(own)
    vectors[3].index(room).store(gl.exp2(last - weighted))
    vectors[4].index(room).store(gl.exp2(sums))
    vectors[5].index(room).store(gl.exp2(last + 0.0 * sums))


@gluon.jit
def vectors_for(CHUNKS: gl.constexpr):
    """Room for them."""
    sums = gl.allocate_shared_memory(gl.float32, [CHUNKS, ENTRIES], VECTOR)
    weighted = gl.allocate_shared_memory(gl.float32, [CHUNKS, ENTRIES], VECTOR)
    owns = gl.allocate_shared_memory(gl.float32, [CHUNKS, ENTRIES], VECTOR)
    gives = gl.allocate_shared_memory(gl.float32, [CHUNKS, ENTRIES], VECTOR)
    takes = gl.allocate_shared_memory(gl.float32, [CHUNKS, ENTRIES], VECTOR)
    return sums, weighted, owns, gives, takes, gl.allocate_shared_memory(gl.float32, [CHUNKS, ENTRIES], VECTOR)


@gluon.jit
def load_inputs(
    x, mimo_x, start, end, head, x_token, x_head, RANKS: gl.constexpr, P: gl.constexpr, INPUTS: gl.constexpr
):  # fmt: skip
    """Inputs of a head by token, zeros where there are none, and the factors of the ranks."""
    by_token: gl.constexpr = gl.SliceLayout(1, INPUTS)
    by_rank: gl.constexpr = gl.SliceLayout(0, INPUTS)
    t, p = gl.arange(0, ENTRIES // RANKS, gl.SliceLayout(1, by_token)), gl.arange(0, P, gl.SliceLayout(0, by_token))
    there = (start + t < end)[:, None] & (p < P)[None, :]
    rows = x + start.to(gl.int64) * x_token + head * x_head
    u = gl.load(rows + (t[:, None] * x_token + p[None, :]), mask=there, other=0.0)
    r, p = gl.arange(0, RANKS, gl.SliceLayout(1, by_rank)), gl.arange(0, P, gl.SliceLayout(0, by_rank))
    if mimo_x is None:
        return u, gl.zeros((RANKS, P), gl.float32, by_rank) + 1.0
    else:
        return u, gl.load(mimo_x + head * (RANKS * P) + (r[:, None] * P + p[None, :]))


@gluon.jit
def store_inputs(inputs, us, RANKS: gl.constexpr, P: gl.constexpr, INPUTS: gl.constexpr):
    """Inputs of a head by entry: those of the token times the factors of the rank."""
    u = inputs[0].to(gl.float32)[:, None, :] * inputs[1].to(gl.float32)[None, :, :]
    us.store(u.to(us.dtype).reshape([ENTRIES, P]))


@gluon.jit
def fetch_chunk(
    x, cos, sin, start, end, place, head, x_token, x_head, HALF: gl.constexpr, P: gl.constexpr, RANKS: gl.constexpr
):  # fmt: skip
    """What comes from far away of a later chunk: inputs and angles of two heads, which lie beside each other."""
    TOKENS: gl.constexpr = ENTRIES // RANKS
    if x is not None:
        rows = x + start.to(gl.int64) * x_token + head * x_head
        fetch(rows, TOKENS, end - 1 - start, x_token, 2 * P)
    fetch(cos + place.to(gl.int64) * (TOKENS * HALF), 2 * TOKENS, 2 * TOKENS, HALF, HALF)
    fetch(sin + place.to(gl.int64) * (TOKENS * HALF), 2 * TOKENS, 2 * TOKENS, HALF, HALF)


@gluon.jit
def fetch_head(
    x, cos, sin, start, end, place, head, x_token, x_head, HALF: gl.constexpr, P: gl.constexpr, RANKS: gl.constexpr
):  # fmt: skip
    """`fetch_chunk` of one head."""
    TOKENS: gl.constexpr = ENTRIES // RANKS
    fetch(x + start.to(gl.int64) * x_token + head * x_head, TOKENS, end - 1 - start, x_token, P)
    fetch(cos + place.to(gl.int64) * (TOKENS * HALF), TOKENS, TOKENS, HALF, HALF)
    fetch(sin + place.to(gl.int64) * (TOKENS * HALF), TOKENS, TOKENS, HALF, HALF)


@gluon.jit
def places_in(RANKS: gl.constexpr, HALF: gl.constexpr, KEYS: gl.constexpr):
    """Where the numbers of 16 entries are in B, those of their tokens in cosines, and those of the ranks in biases."""
    by_token: gl.constexpr = gl.SliceLayout(1, KEYS)
    by_rank: gl.constexpr = gl.SliceLayout(0, KEYS)
    t, n = gl.arange(0, PART // RANKS, gl.SliceLayout(1, by_token)), gl.arange(0, HALF, gl.SliceLayout(0, by_token))
    r, m = gl.arange(0, RANKS, gl.SliceLayout(1, by_rank)), gl.arange(0, HALF, gl.SliceLayout(0, by_rank))
    each = r[:, None] * (2 * HALF) + m[None, :]
    entry = (t[:, None] * (RANKS * 2 * HALF) + 0 * n[None, :])[:, None, :] + each[None, :, :]
    return entry, t[:, None] * HALF + n[None, :], each


@gluon.jit
def _make(
    x, mimo_x, steps, B, C, B_bias, C_bias, cos, sin, keys, queries, us, vectors, barriers, segments, chunks,
    segment, group, head, x_token, x_head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Four warps: keys, queries, inputs and numbers of two heads, chunk by chunk, two chunks ahead of their use."""
    made, taken = barriers
    TOKENS: gl.constexpr = ENTRIES // RANKS
    entry, angle, each = places_in(RANKS, HALF, KEYS)
    first, count = gl.load(segments + 5 * segment), gl.load(segments + 5 * segment + 1)
    begin, stop = gl.load(chunks + 2 * first), gl.load(chunks + (2 * (first + count) - 1))
    for step in range(count):
        chunk, start, room = (first + step).to(gl.int64), begin + step * TOKENS, step % 2 * 2
        place = chunk * HEADS + head
        row = (chunk * GROUPS + group) * (ENTRIES * 2 * HALF)
        c, s = cos + place * (TOKENS * HALF), sin + place * (TOKENS * HALF)
        ahead = gl.minimum(step + 2, count - 1)
        fetch_chunk(x, cos, sin, begin + ahead * TOKENS, stop, (first + ahead) * HEADS + head, head, x_token, x_head,
                    HALF, P, RANKS)  # fmt: skip
        # Asked for before there is room.
        x0 = load_inputs(x, mimo_x, start, stop, head, x_token, x_head, RANKS, P, INPUTS)
        x1 = load_inputs(x, mimo_x, start, stop, head + 1, x_token, x_head, RANKS, P, INPUTS)
        numbers = load_numbers(steps + place * (NUMBERS * TOKENS), TOKENS)
        others = load_numbers(steps + (place + 1) * (NUMBERS * TOKENS), TOKENS)
        source = load_part(B + row, c, s, entry, angle, 0, RANKS, HALF)
        mbarrier.wait(taken.index(room), (step // 2 & 1) ^ 1)
        mbarrier.wait(taken.index(room + 1), (step // 2 & 1) ^ 1)
        store_numbers(vectors, room, numbers)
        store_numbers(vectors, room + 1, others)
        store_inputs(x0, us.index(room), RANKS, P, INPUTS)
        biases = load_biases(B_bias, head, each, RANKS, HALF)
        store_inputs(x1, us.index(room + 1), RANKS, P, INPUTS)
        _turn_all(
            source, biases, B + row, C + row, C_bias, c, s, keys, queries, room, head, (entry, angle, each), RANKS, HALF
        )
        fence_async_shared()
        mbarrier.arrive(made.index(room), count=1)
        mbarrier.arrive(made.index(room + 1), count=1)


@gluon.jit
def across(a, b, at, none):
    """Products of the rows of one matrix with the rows of another, both in two tiles."""
    out = warpgroup_mma(a.index(2 * at), b.index(2 * at).permute((1, 0)), none, use_acc=False, is_async=True)
    return warpgroup_mma(a.index(2 * at + 1), b.index(2 * at + 1).permute((1, 0)), out, is_async=True)


@gluon.jit
def weights_of(later, earlier, own, j, i, RANKS: gl.constexpr):
    """What entry i receives of j: by decay and scale if its token is later, by own weights if it is the same."""
    before, after = (j // RANKS)[:, None], (i // RANKS)[None, :]
    decay = gl.where(after > before, gl.exp2(later[None, :] - earlier[:, None]), 0.0)
    return gl.where(after == before, own[:, None], decay)


@gluon.jit
def _weigh(keys, queries, vectors, barriers, pairs, segments, segment, RANKS: gl.constexpr):
    """Four warps: weights of pairs `[j, i]` for what i receives from j, of two heads in turn.

    An entry receives from those of earlier tokens by their decay and scale, and by own weights from those of its own.
    """
    sums, weighted, owns, _, _, _ = vectors
    made, taken, weighed, free = barriers
    dtype: gl.constexpr = pairs.dtype
    j, i = gl.arange(0, ENTRIES, ROW), gl.arange(0, ENTRIES, COLUMN)
    none = gl.zeros((ENTRIES, ENTRIES), gl.float32, SQUARE)
    count = gl.load(segments + 5 * segment + 1)
    for step in range(count):
        for head in gl.static_range(2):
            room = step % 2 * 2 + head
            mbarrier.wait(made.index(room), step // 2 & 1)
            product = across(keys, queries, room, none)
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
def load_state(states, row, head, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, wide: gl.constexpr):
    """The two halves of the state (p, n) of a head."""
    p, n = gl.arange(0, P, gl.SliceLayout(1, wide)), gl.arange(0, HALF, gl.SliceLayout(0, wide))
    place = (row.to(gl.int64) * HEADS + head) * (P * 2 * HALF) + (p[:, None] * (2 * HALF) + n[None, :])
    return gl.load(states + place), gl.load(states + HALF + place)


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
def _ask(state, queries, at, none, layout: gl.constexpr, dtype: gl.constexpr):
    """Products of a state in registers with queries, `[p, i]`."""
    half = gl.convert_layout(state[0].to(dtype), layout)
    out = warpgroup_mma(half, queries.index(2 * at).permute((1, 0)), none, use_acc=False, is_async=True)
    half = gl.convert_layout(state[1].to(dtype), layout)
    return warpgroup_mma(half, queries.index(2 * at + 1).permute((1, 0)), out, is_async=True)


@gluon.jit
def _grow(state, keys, at, u, weight, kept, layout: gl.constexpr):
    """A state after a chunk: what it keeps, and what the inputs add to it."""
    added = (u.permute((1, 0)).load(layout).to(gl.float32) * weight[None, :]).to(u.dtype)
    h1 = warpgroup_mma(added, keys.index(2 * at), state[0] * kept, is_async=True)
    return h1, warpgroup_mma(added, keys.index(2 * at + 1), state[1] * kept, is_async=True)


@gluon.jit
def _walk(
    us, keys, queries, vectors, barriers, pairs, out, y, entering, final, D, segments, chunks, length, segment, head,
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
    h1, h2 = load_state(entering, segment, head, HEADS, P, HALF, wide)
    skip = 0.0 if D is None else gl.load(D + head).to(gl.float32)
    side: gl.constexpr = gl.SliceLayout(1, wide)
    for step in range(count):
        room = step % 2 * 2 + OWN
        u = us.index(room)
        mbarrier.wait(made.index(room), step // 2 & 1)
        answers = _ask((h1, h2), queries, room, none, states, dtype)
        answers = warpgroup_mma_wait(0, (answers,)) * takes.index(room).load(COLUMN)[None, :]
        mbarrier.wait(weighed.index(OWN), step & 1)
        answers = warpgroup_mma(u.permute((1, 0)), pairs, answers, is_async=True)
        given = gives.index(room).load(gl.SliceLayout(0, inputs))
        h1, h2 = _grow((h1, h2), keys, room, u, given, keeps.index(room).load(side)[:, None], inputs)
        answers = warpgroup_mma_wait(2, (answers,))
        mbarrier.arrive(free.index(OWN), count=1)
        if D is not None:
            answers += u.permute((1, 0)).load(SQUARE).to(gl.float32) * skip
        tma.store_wait(0)
        out.reshape([ENTRIES, P]).permute((1, 0)).store(answers.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [sequence, start * RANKS + step * ENTRIES, head * P], out)
        h1, h2 = warpgroup_mma_wait(0, (h1, h2))
        mbarrier.arrive(taken.index(room), count=1)
    tma.store_wait(0)
    if gl.load(segments + 5 * segment + 4) == 1:
        _store_final(final, gl.load(segments + 5 * segment + 2), head, h1, h2, HEADS, P, HALF, INTERLEAVED, wide)


@gluon.jit
def scan_kernel(
    x, mimo_x, steps, B, C, B_bias, C_bias, cos, sin, D, entering, y, final, chunks, segments, length, x_token, x_head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr, KEYS: gl.constexpr, INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads, which share B and C."""
    segment, head = gl.program_id(0) // (HEADS // 2), gl.program_id(0) % (HEADS // 2) * 2
    group = head // (HEADS // GROUPS)
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tile: gl.constexpr = gl.NVMMASharedLayout(2 * HALF, 16, 2)
    keys = gl.allocate_shared_memory(y.dtype, [8, ENTRIES, HALF], tile)
    queries = gl.allocate_shared_memory(y.dtype, [8, ENTRIES, HALF], tile)
    us = gl.allocate_shared_memory(y.dtype, [4, ENTRIES, P], square)
    out = gl.allocate_shared_memory(y.dtype, [2, 1, ENTRIES, P], y.layout)
    pairs = gl.allocate_shared_memory(y.dtype, [2, ENTRIES, ENTRIES], square)
    made, taken, weighed, free = barriers_of(4, 1), barriers_of(4, 2), barriers_of(2, 1), barriers_of(2, 1)
    vectors, barriers = vectors_for(4), (made, taken, weighed, free)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_walk, (us, keys, queries, vectors, barriers, pairs.index(0), out.index(0), y, entering, final, D,
                     segments, chunks, length, segment, head, 0, HEADS, P, HALF, RANKS, INTERLEAVED)),
            (_walk, (us, keys, queries, vectors, barriers, pairs.index(1), out.index(1), y, entering, final, D,
                     segments, chunks, length, segment, head + 1, 1, HEADS, P, HALF, RANKS, INTERLEAVED)),
            (_weigh, (keys, queries, vectors, barriers, pairs, segments, segment, RANKS)),
            (_make, (x, mimo_x, steps, B, C, B_bias, C_bias, cos, sin, keys, queries, us, vectors, (made, taken),
                     segments, chunks, segment, group, head, x_token, x_head, HEADS, GROUPS, P, HALF, RANKS,
                     INPUTS, KEYS)),
        ],
        [4, 4, 4],
        [152, 80, 128],
    )  # fmt: skip
