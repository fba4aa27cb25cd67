"""The trapezoid on a Hopper GPU: keys and queries are made by warps of their own, ahead of those that multiply.

Groups of warps share the work of a program that walks along time with two heads: four warps turn keys and queries of
the next chunks into shared memory, as `everstate.ops.trapezoid.triton_keys` says, four walk with each head, one moves
inputs. For one rank, and for keys of which one half turns: then both halves are tiles of one size.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from everstate.ops.triton_hopper import COLUMN, ROW, SQUARE, barriers_of, place_of, rows_of, vectors_of

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import _Call

PARTS = {columns: gl.NVMMASharedLayout(2 * columns, 16, 2) for columns in (16, 32, 64)}

NUMBERS = gl.constexpr(5)
"""Numbers per token and head, as in `triton_keys`: sums of log decays, those less log scales, scales, own weights."""

REGISTERS = 128
"""Registers of a thread when a program of four groups of 128 threads starts; they then share them out."""


def scan(call: _Call, entering: Tensor, y: Tensor, final: Tensor) -> None:
    """Outputs and final states."""
    scan_kernel[(len(call.plan.segments) * call.heads // 2,)](
        rows(call, call.x), vectors_of(call.steps), call.B, call.C, call.B_bias, call.C_bias, call.cos, call.sin,
        call.D, entering, rows(call, y.flatten(0, 2)), final, call.plan.chunks, call.plan.segments, call.length,
        **sizes_of(call), INTERLEAVED=call.order["INTERLEAVED"], STAGES=3, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def sizes_of(call: _Call) -> dict[str, int]:
    return {
        "HEADS": call.heads, "GROUPS": call.groups, "P": call.headdim, "HALF": call.pairs, "BLOCK": call.tokens
    }  # fmt: skip


def rows(call: _Call, t: Tensor) -> TensorDescriptor:
    return rows_of(t, call.batch, call.length)


def halves_of(t: Tensor) -> TensorDescriptor:
    """The halves of keys or states: 64 rows of the columns that turn, or of the others."""
    flat = t.flatten(0, -2)
    half = t.shape[-1] // 2
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [64, half], PARTS[half])


def angles_of(t: Tensor) -> TensorDescriptor:
    """Cosines or sines of a chunk and head."""
    flat = t.flatten(0, 2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [64, t.shape[3]], PARTS[t.shape[3]])


@gluon.jit
def _turn(
    source, bias, c, s, out, room, ROW: gl.constexpr,
    HALF: gl.constexpr, half: gl.constexpr, full: gl.constexpr,
):  # fmt: skip
    """32 keys of a head, from ROW on, into two tiles of `out`; `source` is rows of B, `bias` that of the head."""
    first, second, still = source
    dtype: gl.constexpr = out.dtype
    n, m = gl.arange(0, HALF, gl.SliceLayout(0, half)), gl.arange(0, 2 * HALF, gl.SliceLayout(0, full))
    rest = still.to(gl.float32)
    if bias is not None:
        rest += gl.load(bias + 2 * HALF + m)[None, :]
    out.index(2 * room + 1).slice(ROW, 32).store(rest.to(dtype))
    a, b = first.to(gl.float32), second.to(gl.float32)
    if bias is not None:
        a += gl.load(bias + n)[None, :]
        b += gl.load(bias + HALF + n)[None, :]
    c, s = c.to(gl.float32), s.to(gl.float32)
    turned = gl.join((a * c - b * s).to(dtype), (a * s + b * c).to(dtype))
    out.index(2 * room).slice(ROW, 32).store(turned.permute((0, 2, 1)).reshape([32, 2 * HALF]))


@gluon.jit
def _load_keys(B, turning, still, HALF: gl.constexpr):
    return gl.load(B + turning), gl.load(B + HALF + turning), gl.load(B + still)


@gluon.jit
def _make(
    B, C, B_bias, C_bias, cos, sin, keys, queries, barriers, segments, segment, group, head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Four warps: keys and queries of two heads, chunk by chunk, two chunks ahead of their use."""
    made, taken = barriers
    half: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
    full: gl.constexpr = gl.BlockedLayout([1, 8], [128 // HALF, HALF // 4], [4, 1], [1, 0])
    token, pair = gl.arange(0, 32, gl.SliceLayout(1, half)), gl.arange(0, HALF, gl.SliceLayout(0, half))
    turning = token[:, None] * (4 * HALF) + pair[None, :]
    angle = token[:, None] * HALF + pair[None, :]
    row, column = gl.arange(0, 32, gl.SliceLayout(1, full)), gl.arange(0, 2 * HALF, gl.SliceLayout(0, full))
    still = row[:, None] * (4 * HALF) + column[None, :] + 2 * HALF
    first, count = gl.load(segments + 5 * segment), gl.load(segments + 5 * segment + 1)
    for step in range(count):
        chunk = first + step
        place, room = chunk * HEADS + head, step % 2 * 2
        # Asked for before there is room.
        c0, c1 = cos + place * (BLOCK * HALF), cos + (place + 1) * (BLOCK * HALF)
        s0, s1 = sin + place * (BLOCK * HALF), sin + (place + 1) * (BLOCK * HALF)
        angles = ((gl.load(c0 + angle), gl.load(s0 + angle)), (gl.load(c1 + angle), gl.load(s1 + angle)))
        angle_ = angle + 32 * HALF
        others = ((gl.load(c0 + angle_), gl.load(s0 + angle_)), (gl.load(c1 + angle_), gl.load(s1 + angle_)))
        mbarrier.wait(taken.index(room), (step // 2 & 1) ^ 1)
        mbarrier.wait(taken.index(room + 1), (step // 2 & 1) ^ 1)
        for part in gl.static_range(2):
            at = (chunk * GROUPS + group) * (BLOCK * 4 * HALF) + part * (32 * 4 * HALF)
            source = _load_keys(B + at, turning, still, HALF)
            for own in gl.static_range(2):
                bias = None if B_bias is None else B_bias + (head + own) * (4 * HALF)
                c, s = (others if part == 1 else angles)[own]
                _turn(source, bias, c, s, keys, room + own, 32 * part, HALF, half, full)
            source = _load_keys(C + at, turning, still, HALF)
            for own in gl.static_range(2):
                bias = None if C_bias is None else C_bias + (head + own) * (4 * HALF)
                c, s = (others if part == 1 else angles)[own]
                _turn(source, bias, c, s, queries, room + own, 32 * part, HALF, half, full)
        fence_async_shared()
        mbarrier.arrive(made.index(room), count=1)
        mbarrier.arrive(made.index(room + 1), count=1)


@gluon.jit
def _feed(
    x, steps, us, vectors, barriers, segments, chunks, length, segment, head,
    HEADS: gl.constexpr, P: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: inputs and numbers per token of two heads, chunk by chunk, as soon as there is room."""
    sums, weighted, owns = vectors
    full, empty = barriers
    first, count, sequence, start = place_of(segments, chunks, length, segment)
    for step in range(count):
        at = step % STAGES
        mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
        bar = full.index(at)
        mbarrier.expect(bar, 2 * x.block_type.nbytes + 6 * steps.block_type.nbytes)
        for own in gl.static_range(2):
            place = ((first + step) * HEADS + head + own) * (NUMBERS * BLOCK)
            tma.async_copy_global_to_shared(steps, [place], bar, sums.index(2 * at + own))
            tma.async_copy_global_to_shared(steps, [place + BLOCK], bar, weighted.index(2 * at + own))
            tma.async_copy_global_to_shared(steps, [place + 3 * BLOCK], bar, owns.index(2 * at + own))
            tma.async_copy_global_to_shared(
                x, [sequence, start + step * BLOCK, (head + own) * P], bar, us.index(2 * at + own)
            )


@gluon.jit
def load_state(states, row, head, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, wide: gl.constexpr):
    """The two halves of the state (p, n) of a head."""
    p, n = gl.arange(0, P, gl.SliceLayout(1, wide)), gl.arange(0, 2 * HALF, gl.SliceLayout(0, wide))
    place = (row.to(gl.int64) * HEADS + head) * (P * 4 * HALF) + (p[:, None] * (4 * HALF) + n[None, :])
    return gl.load(states + place), gl.load(states + 2 * HALF + place)


@gluon.jit
def _store_final(
    final, row, head, h1, h2, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, INTERLEAVED: gl.constexpr,
    wide: gl.constexpr,
):  # fmt: skip
    """A state with its columns in the order of the caller."""
    p, n = gl.arange(0, P, gl.SliceLayout(1, wide)), gl.arange(0, 2 * HALF, gl.SliceLayout(0, wide))
    if INTERLEAVED:
        turning, still = n % HALF * 2 + n // HALF, n + 2 * HALF
    else:
        turning = n % HALF + n // HALF * (2 * HALF)
        still = turning + HALF
    final += (row.to(gl.int64) * HEADS + head) * (P * 4 * HALF)
    gl.store(final + (p[:, None] * (4 * HALF) + turning[None, :]), h1)
    gl.store(final + (p[:, None] * (4 * HALF) + still[None, :]), h2)


@gluon.jit
def across(a, b, at, none):
    """Products of the rows of one matrix with the rows of another, both in two tiles."""
    out = warpgroup_mma(a.index(2 * at), b.index(2 * at).permute((1, 0)), none, use_acc=False, is_async=True)
    return warpgroup_mma(a.index(2 * at + 1), b.index(2 * at + 1).permute((1, 0)), out, is_async=True)


@gluon.jit
def _ask(state, queries, none, layout: gl.constexpr, dtype: gl.constexpr):
    """Products of a state in registers with queries, `[p, i]`."""
    h1, h2 = state
    q1, q2 = queries
    half = gl.convert_layout(h1.to(dtype), layout)
    out = warpgroup_mma(half, q1.permute((1, 0)), none, use_acc=False, is_async=True)
    half = gl.convert_layout(h2.to(dtype), layout)
    return warpgroup_mma(half, q2.permute((1, 0)), out, is_async=True)


@gluon.jit
def _grow(state, keys, u, weight, kept, layout: gl.constexpr):
    """A state after a chunk: what it keeps, and what the inputs add to it."""
    dtype: gl.constexpr = u.dtype
    added = (u.permute((1, 0)).load(layout).to(gl.float32) * weight[None, :]).to(dtype)
    h1, h2 = state
    h1 = warpgroup_mma(added, keys[0], h1 * kept, is_async=True)
    return h1, warpgroup_mma(added, keys[1], h2 * kept, is_async=True)


@gluon.jit
def _write(y, place, answers, out):
    """Outputs `[p, i]`, once those before them are on their way."""
    tma.store_wait(0)
    out.reshape([out.shape[1], out.shape[2]]).permute((1, 0)).store(answers)
    fence_async_shared()
    tma.async_copy_shared_to_global(y, place, out)


@gluon.jit
def _walk(
    us, keys, queries, vectors, barriers, pairs, out, y, entering, final, D, segments, chunks, length, segment, head,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    INTERLEAVED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: one head along a segment. Outputs are `[p, i]`, weights `[j, i]` for what i receives from j."""
    sums, weighted, owns = vectors
    full, empty, made, taken = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    states: gl.constexpr = gl.DotOperandLayout(0, SQUARE, 2)
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    dtype: gl.constexpr = out.dtype
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    _, count, sequence, start = place_of(segments, chunks, length, segment)
    h1, h2 = load_state(entering, segment, head, HEADS, P, HALF, wide)
    skip = 0.0 if D is None else gl.load(D + head).to(gl.float32)
    for step in range(count):
        at, room = step % STAGES * 2 + OWN, step % 2 * 2 + OWN
        u, k1, k2 = us.index(at).reshape([BLOCK, P]), keys.index(2 * room), keys.index(2 * room + 1)
        q1, q2 = queries.index(2 * room), queries.index(2 * room + 1)
        mbarrier.wait(made.index(room), step // 2 & 1)
        weights = across(keys, queries, room, none)
        answers = _ask((h1, h2), (q1, q2), none, states, dtype)
        mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
        later, earlier, own = sums.index(at).load(COLUMN), weighted.index(at).load(ROW), owns.index(at).load(ROW)
        last = gl.sum(gl.where(i == BLOCK - 1, later, 0.0), 0)
        decay = gl.where(i[None, :] > j[:, None], gl.exp2(later[None, :] - earlier[:, None]), 0.0)
        decay = gl.where(i[None, :] == j[:, None], own[:, None], decay)
        weights = warpgroup_mma_wait(2, (weights,))
        pairs.store(gl.where(decay == 0.0, 0.0, weights * decay).to(dtype))
        fence_async_shared()
        answers = warpgroup_mma_wait(0, (answers,)) * gl.exp2(later)[None, :]
        answers = warpgroup_mma(u.permute((1, 0)), pairs, answers, is_async=True)
        given = gl.exp2(last - weighted.index(at).load(gl.SliceLayout(0, inputs)))
        h1, h2 = _grow((h1, h2), (k1, k2), u, given, gl.exp2(last), inputs)
        answers = warpgroup_mma_wait(2, (answers,))
        if D is not None:
            answers += u.permute((1, 0)).load(SQUARE).to(gl.float32) * skip
        _write(y, [sequence, start + step * BLOCK, head * P], answers.to(dtype), out)
        h1, h2 = warpgroup_mma_wait(0, (h1, h2))
        mbarrier.arrive(taken.index(room), count=1)
        mbarrier.arrive(empty.index(step % STAGES), count=1)
    tma.store_wait(0)
    if gl.load(segments + 5 * segment + 4) == 1:
        _store_final(final, gl.load(segments + 5 * segment + 2), head, h1, h2, HEADS, P, HALF, INTERLEAVED, wide)


@gluon.jit
def _vectors(steps, STAGES: gl.constexpr, BLOCK: gl.constexpr):
    """For sums of log decays, those less log scales, and own weights, of two heads."""
    sums = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], steps.layout)
    weighted = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], steps.layout)
    return sums, weighted, gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], steps.layout)


@gluon.jit
def scan_kernel(
    x, steps, B, C, B_bias, C_bias, cos, sin, D, entering, y, final, chunks, segments, length,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    INTERLEAVED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads, which share B and C."""
    segment, head = gl.program_id(0) // (HEADS // 2), gl.program_id(0) % (HEADS // 2) * 2
    group = head // (HEADS // GROUPS)
    tile: gl.constexpr = gl.NVMMASharedLayout(4 * HALF, 16, 2)
    us = gl.allocate_shared_memory(x.dtype, [2 * STAGES, 1, BLOCK, P], x.layout)
    keys = gl.allocate_shared_memory(x.dtype, [8, BLOCK, 2 * HALF], tile)
    queries = gl.allocate_shared_memory(x.dtype, [8, BLOCK, 2 * HALF], tile)
    out = gl.allocate_shared_memory(x.dtype, [2, 1, BLOCK, P], y.layout)
    pairs = gl.allocate_shared_memory(x.dtype, [2, BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    full, empty, made, taken = barriers_of(STAGES, 1), barriers_of(STAGES, 2), barriers_of(4, 1), barriers_of(4, 1)
    vectors, barriers = _vectors(steps, STAGES, BLOCK), (full, empty, made, taken)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_walk, (us, keys, queries, vectors, barriers, pairs.index(0), out.index(0), y, entering, final, D,
                     segments, chunks, length, segment, head, 0, HEADS, P, HALF, BLOCK, INTERLEAVED, STAGES)),
            (_walk, (us, keys, queries, vectors, barriers, pairs.index(1), out.index(1), y, entering, final, D,
                     segments, chunks, length, segment, head + 1, 1, HEADS, P, HALF, BLOCK, INTERLEAVED, STAGES)),
            (_make, (B, C, B_bias, C_bias, cos, sin, keys, queries, (made, taken), segments, segment, group, head,
                     HEADS, GROUPS, HALF, BLOCK)),
            (_feed, (x, steps, us, vectors, (full, empty), segments, chunks, length, segment, head,
                     HEADS, P, BLOCK, STAGES)),
        ],
        [4, 4, 1],
        [168, 144, 24],
    )  # fmt: skip
