"""SSD on a Hopper GPU, for heads of 64 channels: groups of warps that share the work of a program.

The formulas are those of `everstate.ops.ssd.triton`. Compiled in one piece, all that a chunk needs takes more registers
than there are, and whoever waits for a product does nothing else meanwhile. Here groups of four warps do different
things with the same tiles, as `everstate.ops.triton_hopper` says. Sequences are a dimension of their own for the copy
engine, so no length needs masks. The language is Gluon; without a GPU, `tests/imitation.py` runs its source.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from everstate.ops.triton_hopper import (
    COLUMN,
    ROW,
    SQUARE,
    STATES,
    barriers_of,
    in_parts,
    load_tile,
    place_of,
    rows_of,
    store_tile,
    vectors_of,
)
from everstate.ops.triton_launch import Form, Tiles, launch

if TYPE_CHECKING:
    from everstate.ops.ssd.triton import Call


def scan(call: Call, entering: Tensor, y: Tensor, final: Tensor) -> None:
    """Outputs and final states."""
    launch(
        scan_kernel, (call.layout.segments * call.heads // 2,),
        _rows(call, call.x), vectors_of(call.decays), vectors_of(call.scales),
        _rows(call, call.B), _rows(call, call.C), call.D, entering, _rows(call, y), final, call.plan.chunks,
        call.plan.segments, call.shape[1], **call.layout.few, SKIP=call.skip, STAGES=3,
        num_warps=4, maxnreg=128,
    )  # fmt: skip


def sweep(
    call: Call, x: Tensor, keys: Tensor, ends: Tensor, entering: Tensor | None, chunks: Tensor | None,
    kept: Tensor | None, reverse: bool,
) -> None:  # fmt: skip
    """The states alone."""
    launch(
        sweep_kernel, (call.layout.segments * call.heads // 2,),
        _rows(call, x), vectors_of(call.decays), vectors_of(call.scales), _rows(call, keys),
        entering, None if chunks is None else _states(chunks), ends, kept, call.plan.chunks, call.plan.segments,
        call.shape[1], **call.layout.few, REVERSE=reverse, STAGES=4, num_warps=4, maxnreg=168,
    )  # fmt: skip


def gradients(
    call: Call, dy: Tensor, entering: Tensor, leaving: Tensor, dx: Tensor, parts: Tensor, dD: Tensor | None,
    dB: Tensor, dC: Tensor,
) -> None:  # fmt: skip
    """All that a chunk says by itself: gradients of x, the decays, s, D, B and C."""
    splits = len(dB)
    launch(
        gradients_kernel, (call.layout.chunks * call.groups * splits,),
        _rows(call, call.x), _rows(call, dy), vectors_of(call.decays), vectors_of(call.scales),
        _rows(call, call.B), _rows(call, call.C), _states(entering), _states(leaving), _rows(call, dx), call.D,
        *parts.unbind(0), dD, dB, dC, call.plan.chunks, dB.stride(2), *call.shape,
        **call.layout.few, SPLITS=splits, SKIP=call.skip, STAGES=3, num_warps=4, maxnreg=128,
    )  # fmt: skip


@cache
def _form_of_states(p: int, n: int) -> Form:
    return Form(p, n, layout=STATES)


def _rows(call: Call, t: Float[Tensor, "*b h p"]) -> Tiles:
    return rows_of(t, *call.shape)


def _states(t: Float[Tensor, "chunks h p n"]) -> Tiles:
    """The state of a head."""
    chunks, heads, p, n = t.shape
    return Tiles(t, (chunks * heads * p, n), (n, 1), _form_of_states(p, n))


@gluon.jit
def _move(
    tensors, tiles, vectors, keys, barriers, chunk, row, start, group, head,
    HEADS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: B and C of the chunk, then what belongs to each head, as soon as there is room."""
    x, dy, decays, scales, B, C, entering, leaving = tensors
    us, dus, hs, dhs = tiles
    css, ss = vectors
    k, q = keys
    full, empty, ready, _ = barriers
    mbarrier.expect(ready, 2 * B.block_type.nbytes)
    load_tile(B, [row, start, group * N], ready, k)
    load_tile(C, [row, start, group * N], ready, q)
    for i in range(EACH):
        at = i % STAGES
        mbarrier.wait(empty.index(at), (i // STAGES & 1) ^ 1)
        bar = full.index(at)
        mbarrier.expect(bar, 2 * x.block_type.nbytes + 2 * entering.block_type.nbytes + 2 * decays.block_type.nbytes)
        place = chunk * HEADS + head + i
        load_tile(decays, [place * BLOCK], bar, css.index(at))
        load_tile(scales, [place * BLOCK], bar, ss.index(at))
        load_tile(leaving, [place * P, 0], bar, dhs.index(at))
        load_tile(x, [row, start, (head + i) * P], bar, us.index(at))
        load_tile(dy, [row, start, (head + i) * P], bar, dus.index(at))
        load_tile(entering, [place * P, 0], bar, hs.index(at))


@gluon.jit
def _inputs(
    tiles, vectors, keys, barriers, out, dx, D, dD, through, chunk, sequence, start, head,
    HEADS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of x and D. Matrices over pairs are `[j, i]` for what i receives from j."""
    first: gl.constexpr = gl.DotOperandLayout(0, SQUARE, 2)
    us, dus, _, dhs = tiles
    css, ss = vectors
    k, q = keys[0].reshape([BLOCK, N]), keys[1].reshape([BLOCK, N])
    full, empty, ready, _ = barriers
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    mbarrier.wait(ready, 0)
    gram = gl.where(i[None, :] >= j[:, None], warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False), 0.0)
    for step in range(EACH):
        at = step % STAGES
        u, du = us.index(at).reshape([BLOCK, P]), dus.index(at).reshape([BLOCK, P])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        dadded = warpgroup_mma(k, dhs.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
        cs, scale, later = css.index(at).load(ROW), ss.index(at).load(ROW), css.index(at).load(COLUMN)
        last = gl.sum(gl.where(i == BLOCK - 1, later, 0.0), 0)
        weights = gram * gl.exp2(gl.minimum(later[None, :] - cs[:, None], 126.0))
        # The gradient of s x: first what went through the state, then what entries of the chunk received.
        dadded = warpgroup_mma_wait(0, (dadded,)) * gl.exp2(last - cs)[:, None]
        place = (chunk * HEADS + head + step).to(gl.int64) * BLOCK
        given = u.load(SQUARE).to(gl.float32)
        gl.store(through + place + j, gl.sum(dadded * given, 1))
        coarse, fine = in_parts(weights, k.dtype)
        dadded = warpgroup_mma(gl.convert_layout(coarse, first), du, dadded, is_async=True)
        dadded = warpgroup_mma(gl.convert_layout(fine, first), du, dadded, is_async=True)
        answered = du.load(SQUARE).to(gl.float32)
        if SKIP == 1:
            gl.store(dD + place + j, gl.sum(given * answered, 1))
        if SKIP == 2:
            gl.store(dD + place + i, gl.sum(given * answered, 0))
        dadded = warpgroup_mma_wait(0, (dadded,)) * scale[:, None]
        mbarrier.arrive(empty.index(at), count=1)
        if SKIP == 1:
            dadded += gl.load(D + head + step).to(gl.float32) * answered
        if SKIP == 2:
            dadded += gl.load(D + (head + step) * P + i).to(gl.float32)[None, :] * answered
        tma.store_wait(0)
        out.reshape([BLOCK, P]).store(dadded.to(k.dtype))
        fence_async_shared()
        store_tile(dx, [sequence, start, (head + step) * P], out)
    tma.store_wait(0)


@gluon.jit
def _decays(
    tiles, vectors, keys, barriers, grams, sums, given, gained, chunk, head,
    HEADS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: what pairs of entries say of a and s, and for B and C its sum over the heads."""
    us, dus, _, _ = tiles
    css, ss = vectors
    k, q = keys[0].reshape([BLOCK, N]), keys[1].reshape([BLOCK, N])
    full, empty, ready, summed = barriers
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    dgram = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    mbarrier.wait(ready, 0)
    gram = gl.where(i[None, :] >= j[:, None], warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False), 0.0)
    grams.store(gram.to(k.dtype))
    for step in range(EACH):
        at = step % STAGES
        u, du = us.index(at).reshape([BLOCK, P]), dus.index(at).reshape([BLOCK, P])
        place = (chunk * HEADS + head + step).to(gl.int64) * BLOCK
        mbarrier.wait(full.index(at), step // STAGES & 1)
        received = warpgroup_mma(u, du.permute((1, 0)), none, use_acc=False, is_async=True)
        cs, scale, later = css.index(at).load(ROW), ss.index(at).load(ROW), css.index(at).load(COLUMN)
        # Bounded, so that the powers of entries that receive nothing stay finite until they are masked.
        decay = gl.exp2(gl.minimum(later[None, :] - cs[:, None], 126.0))
        received = warpgroup_mma_wait(0, (received,))
        dgram += received * scale[:, None] * decay
        # Both sides of each pair are the same number: two entries of the same decay cancel, as they must.
        received = received * decay * grams.load(SQUARE).to(gl.float32)
        mbarrier.arrive(empty.index(at), count=1)
        gl.store(given + place + j, gl.sum(received, 1))
        gl.store(gained + place + i, gl.sum(received * scale[:, None], 0))
    dgram = gl.where(i[None, :] >= j[:, None], dgram, 0.0)
    # What rounding would cut off this sum of all heads is a third of the error of B and C, and costs nothing to add.
    coarse, fine = in_parts(dgram, k.dtype)
    sums.index(0).store(coarse)
    sums.index(1).store(fine)
    fence_async_shared()
    mbarrier.arrive(summed, count=1)


@gluon.jit
def _fresh(t):
    """`t`, so that what depends on it is computed again and not kept: registers are scarce."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [t], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _keys(
    tiles, vectors, keys, barriers, sums, answered, own, dB, dC, key_row, start, end, total, chunk, group, split, head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of B and C, summed over the heads, and what the entering state says of a."""
    us, dus, hs, dhs = tiles
    css, ss = vectors
    k, q = keys[0].reshape([BLOCK, N]), keys[1].reshape([BLOCK, N])
    full, empty, ready, summed = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    first: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    entry: gl.constexpr = gl.SliceLayout(1, first)
    dtype: gl.constexpr = k.dtype
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    none = gl.zeros((BLOCK, P), gl.float32, SQUARE)
    dk, dq = gl.zeros((BLOCK, N), gl.float32, wide), gl.zeros((BLOCK, N), gl.float32, wide)
    mbarrier.wait(ready, 0)
    for step in range(EACH):
        at = step % STAGES
        mbarrier.wait(full.index(at), step // STAGES & 1)
        cs, scale = css.index(at).load(entry), ss.index(at).load(entry)
        last = gl.sum(gl.where(i == BLOCK - 1, css.index(at).load(COLUMN), 0.0), 0)
        kept = dus.index(at).reshape([BLOCK, P]).load(first).to(gl.float32) * gl.exp2(cs)[:, None]
        dq = warpgroup_mma(kept.to(dtype), hs.index(at), dq, is_async=True)
        given = us.index(at).reshape([BLOCK, P]).load(first).to(gl.float32) * (scale * gl.exp2(last - cs))[:, None]
        dk = warpgroup_mma(given.to(dtype), dhs.index(at), dk, is_async=True)
        dq, dk = warpgroup_mma_wait(0, (dq, dk))
        products = warpgroup_mma(hs.index(at), dhs.index(at).permute((1, 0)), none, use_acc=False)
        answers = warpgroup_mma(q, hs.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
        products = gl.where(_fresh(j)[:, None] == i[None, :], products, 0.0)
        place = (chunk * HEADS + head + step).to(gl.int64) * BLOCK + j
        gl.store(own + place, gl.sum(products, 1) * gl.exp2(last))
        answers = warpgroup_mma_wait(0, (answers,))
        answers = answers * dus.index(at).reshape([BLOCK, P]).load(SQUARE).to(gl.float32)
        answers = gl.sum(answers, 1) * gl.exp2(css.index(at).load(ROW))
        mbarrier.arrive(empty.index(at), count=1)
        gl.store(answered + place, answers)
    mbarrier.wait(summed, 0)
    for part in gl.static_range(2):
        dk = warpgroup_mma(sums.index(part), q, dk)
        dq = warpgroup_mma(sums.index(part).permute((1, 0)), k, dq)
    at = start + gl.arange(0, BLOCK, gl.SliceLayout(1, wide))
    rows = (split.to(gl.int64) * total + at) * key_row + group * N
    place = rows[:, None] + gl.arange(0, N, gl.SliceLayout(0, wide))[None, :]
    gl.store(dB + place, dk.to(dB.dtype.element_ty), mask=(at < end)[:, None])
    gl.store(dC + place, dq.to(dC.dtype.element_ty), mask=(at < end)[:, None])


@gluon.jit(do_not_specialize=["batch", "length"])
def gradients_kernel(
    x, dy, decays, scales, B, C, entering, leaving, dx, D, through, answered, own, given, gained, dD, dB, dC, chunks,
    key_row, batch, length, HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, N: gl.constexpr,
    BLOCK: gl.constexpr, SPLITS: gl.constexpr, SKIP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads."""
    EACH: gl.constexpr = HEADS // GROUPS // SPLITS
    chunk, part = gl.program_id(0) // (GROUPS * SPLITS), gl.program_id(0) % (GROUPS * SPLITS)
    group, split = part // SPLITS, part % SPLITS
    head = group * (HEADS // GROUPS) + split * EACH
    start, end = gl.load(chunks + 2 * chunk), gl.load(chunks + 2 * chunk + 1)
    sequence, first = start // length, start % length
    us = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, P], x.layout)
    dus = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, P], dy.layout)
    hs = gl.allocate_shared_memory(x.dtype, [STAGES, P, N], entering.layout)
    dhs = gl.allocate_shared_memory(x.dtype, [STAGES, P, N], leaving.layout)
    css = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], decays.layout)
    ss = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], scales.layout)
    k = gl.allocate_shared_memory(x.dtype, [1, BLOCK, N], B.layout)
    q = gl.allocate_shared_memory(x.dtype, [1, BLOCK, N], C.layout)
    out = gl.allocate_shared_memory(x.dtype, [1, BLOCK, P], dx.layout)
    sums = gl.allocate_shared_memory(x.dtype, [2, BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    grams = gl.allocate_shared_memory(x.dtype, [BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    full, empty = barriers_of(STAGES, 1), barriers_of(STAGES, 3)
    ready, summed = barriers_of(1, 1).index(0), barriers_of(1, 1).index(0)
    fence_async_shared()
    tiles, vectors, keys, barriers = (us, dus, hs, dhs), (css, ss), (k, q), (full, empty, ready, summed)
    gl.warp_specialize(
        [
            (_inputs, (tiles, vectors, keys, barriers, out, dx, D, dD, through, chunk, sequence, first, head,
                       HEADS, EACH, P, N, BLOCK, STAGES, SKIP)),
            (_decays, (tiles, vectors, keys, barriers, grams, sums, given, gained, chunk, head,
                       HEADS, EACH, P, N, BLOCK, STAGES)),
            (_keys, (tiles, vectors, keys, barriers, sums, answered, own, dB, dC, key_row, start, end, batch * length,
                     chunk, group, split, head, HEADS, GROUPS, EACH, P, N, BLOCK, STAGES)),
            (_move, ((x, dy, decays, scales, B, C, entering, leaving), tiles, vectors, keys, barriers,
                     chunk, sequence, first, group, head, HEADS, EACH, P, N, BLOCK, STAGES)),
        ],
        [4, 4, 1],
        [128, 192, 24],
    )  # fmt: skip


@gluon.jit
def _feed(
    tensors, tiles, vectors, barriers, segments, chunks, length, segment, group, head,
    HEADS: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: what two heads of a segment need, chunk by chunk, as soon as there is room."""
    x, decays, scales, B, C = tensors
    us, ks, qs = tiles
    css, ss = vectors
    full, empty, _, _ = barriers
    first, count, sequence, start = place_of(segments, chunks, length, segment)
    for step in range(count):
        at = step % STAGES
        mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
        bar = full.index(at)
        mbarrier.expect(bar, 2 * x.block_type.nbytes + 2 * B.block_type.nbytes + 4 * decays.block_type.nbytes)
        load_tile(B, [sequence, start, group * N], bar, ks.index(at))
        load_tile(C, [sequence, start, group * N], bar, qs.index(at))
        for own in gl.static_range(2):
            place = ((first + step) * HEADS + head + own) * BLOCK
            load_tile(decays, [place], bar, css.index(2 * at + own))
            load_tile(scales, [place], bar, ss.index(2 * at + own))
            load_tile(x, [sequence, start, (head + own) * P], bar, us.index(2 * at + own))
        start += BLOCK


@gluon.jit
def _weigh(
    tiles, vectors, barriers, pairs, segments, segment, N: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr
):
    """Four warps: how much of each entry j of a chunk the entries i from it on receive, `[j, i]`, for both heads."""
    _, ks, qs = tiles
    css, ss = vectors
    full, empty, weighed, used = barriers
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    count = gl.load(segments + 5 * segment + 1)
    for step in range(count):
        at, turn = step % STAGES, step % 2
        k, q = ks.index(at).reshape([BLOCK, N]), qs.index(at).reshape([BLOCK, N])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        products = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False)
        products = gl.where(i[None, :] >= j[:, None], products, 0.0)
        for own in gl.static_range(2):
            cs, later = css.index(2 * at + own).load(ROW), css.index(2 * at + own).load(COLUMN)
            decay = gl.exp2(gl.minimum(later[None, :] - cs[:, None], 126.0)) * ss.index(2 * at + own).load(ROW)[:, None]
            mbarrier.wait(used.index(2 * turn + own), (step // 2 & 1) ^ 1)
            pairs.index(2 * turn + own).store((products * decay).to(pairs.dtype))
            fence_async_shared()
            mbarrier.arrive(weighed.index(2 * turn + own), count=1)
        mbarrier.arrive(empty.index(at), count=1)


@gluon.jit
def _walk(
    tiles, vectors, barriers, pairs, out, y, entering, final, D, segments, chunks, length, segment, head,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """Four warps: one head along a segment, its state (p, n) in registers. Outputs are transposed, `[p, i]`."""
    us, ks, qs = tiles
    css, ss = vectors
    full, empty, weighed, used = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    entry: gl.constexpr = gl.SliceLayout(0, inputs)
    _, count, sequence, start = place_of(segments, chunks, length, segment)
    i, none = gl.arange(0, BLOCK, COLUMN), gl.zeros((P, BLOCK), gl.float32, SQUARE)
    state = gl.arange(0, P, gl.SliceLayout(1, wide))[:, None] * N + gl.arange(0, N, gl.SliceLayout(0, wide))[None, :]
    h = gl.load(entering + (segment.to(gl.int64) * HEADS + head) * (P * N) + state)
    skip = _skip(D, head, gl.arange(0, P, ROW), P, SKIP)
    for step in range(count):
        at, turn = step % STAGES, 2 * (step % 2) + OWN
        cs, scale, u = css.index(2 * at + OWN), ss.index(2 * at + OWN), us.index(2 * at + OWN).reshape([BLOCK, P])
        k, q = ks.index(at).reshape([BLOCK, N]), qs.index(at).reshape([BLOCK, N])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        kept = gl.convert_layout(h.to(out.dtype), gl.DotOperandLayout(0, SQUARE, 2))
        answers = warpgroup_mma(kept, q.permute((1, 0)), none, use_acc=False, is_async=True)
        later = cs.load(COLUMN)
        last = gl.sum(gl.where(i == BLOCK - 1, later, 0.0), 0)
        added = u.permute((1, 0)).load(inputs).to(gl.float32)
        added = (added * (scale.load(entry) * gl.exp2(last - cs.load(entry)))[None, :]).to(out.dtype)
        answers = warpgroup_mma_wait(0, (answers,)) * gl.exp2(later)[None, :]
        mbarrier.wait(weighed.index(turn), step // 2 & 1)
        answers = warpgroup_mma(u.permute((1, 0)), pairs.index(turn), answers, is_async=True)
        h = warpgroup_mma(added, k, h * gl.exp2(last), is_async=True)
        answers = warpgroup_mma_wait(1, (answers,))
        mbarrier.arrive(used.index(turn), count=1)
        if SKIP > 0:
            answers += u.permute((1, 0)).load(SQUARE).to(gl.float32) * skip[:, None]
        tma.store_wait(0)
        out.reshape([BLOCK, P]).permute((1, 0)).store(answers.to(out.dtype))
        fence_async_shared()
        store_tile(y, [sequence, start + step * BLOCK, head * P], out)
        h = warpgroup_mma_wait(0, (h,))
        mbarrier.arrive(empty.index(at), count=1)
    tma.store_wait(0)
    if gl.load(segments + 5 * segment + 4) == 1:
        own = gl.load(segments + 5 * segment + 2).to(gl.int64)
        gl.store(final + (own * HEADS + head) * (P * N) + state, h)


@gluon.jit
def _skip(D, head, p, P: gl.constexpr, SKIP: gl.constexpr):
    """D of a head for its channels: one number for all (SKIP 1), or one for each (SKIP 2)."""
    if SKIP == 2:
        skip = gl.load(D + head * P + p).to(gl.float32)
    elif SKIP == 1:
        skip = gl.load(D + head + p * 0).to(gl.float32)
    else:
        skip = p.to(gl.float32)
    return skip


@gluon.jit(do_not_specialize=["length"])
def scan_kernel(
    x, decays, scales, B, C, D, entering, y, final, chunks, segments, length,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr,
    SKIP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads, which share B and C."""
    segment, head = gl.program_id(0) // (HEADS // 2), gl.program_id(0) % (HEADS // 2) * 2
    group = head // (HEADS // GROUPS)
    us = gl.allocate_shared_memory(x.dtype, [2 * STAGES, 1, BLOCK, P], x.layout)
    ks = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, N], B.layout)
    qs = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, N], C.layout)
    css = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], decays.layout)
    ss = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], scales.layout)
    out = gl.allocate_shared_memory(x.dtype, [2, 1, BLOCK, P], y.layout)
    pairs = gl.allocate_shared_memory(x.dtype, [4, BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    full, empty, weighed, used = barriers_of(STAGES, 1), barriers_of(STAGES, 3), barriers_of(4, 1), barriers_of(4, 1)
    fence_async_shared()
    tiles, vectors, barriers = (us, ks, qs), (css, ss), (full, empty, weighed, used)
    gl.warp_specialize(
        [
            (_walk, (tiles, vectors, barriers, pairs, out.index(0), y, entering, final, D, segments, chunks,
                     length, segment, head, 0, HEADS, P, N, BLOCK, STAGES, SKIP)),
            (_walk, (tiles, vectors, barriers, pairs, out.index(1), y, entering, final, D, segments, chunks,
                     length, segment, head + 1, 1, HEADS, P, N, BLOCK, STAGES, SKIP)),
            (_weigh, (tiles, vectors, barriers, pairs, segments, segment, N, BLOCK, STAGES)),
            (_feed, ((x, decays, scales, B, C), tiles, vectors, barriers, segments, chunks, length, segment, group,
                     head, HEADS, P, N, BLOCK, STAGES)),
        ],
        [4, 4, 1],
        [184, 120, 24],
    )  # fmt: skip


@gluon.jit
def _feed_sweep(
    tensors, tiles, vectors, barriers, segments, chunks, length, segment, group, head,
    HEADS: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    REVERSE: gl.constexpr,
):  # fmt: skip
    """One warp: what two heads of a sweep need, chunk by chunk, as soon as there is room."""
    x, decays, scales, B = tensors
    us, ks = tiles
    css, ss = vectors
    full, empty = barriers
    first, count, sequence, start = place_of(segments, chunks, length, segment)
    for step in range(count):
        at = step % STAGES
        own = count - 1 - step if REVERSE else step
        mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
        bar = full.index(at)
        mbarrier.expect(bar, 2 * x.block_type.nbytes + B.block_type.nbytes + 4 * decays.block_type.nbytes)
        load_tile(B, [sequence, start + own * BLOCK, group * N], bar, ks.index(at))
        for which in gl.static_range(2):
            place = ((first + own) * HEADS + head + which) * BLOCK
            load_tile(decays, [place], bar, css.index(2 * at + which))
            load_tile(scales, [place], bar, ss.index(2 * at + which))
            load_tile(x, [sequence, start + own * BLOCK, (head + which) * P], bar, us.index(2 * at + which))


@gluon.jit
def _sweep(
    tiles, vectors, barriers, outs, boundaries, entering, ends, kept, segments, segment, head,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Four warps: the state (p, n) of one head along a segment, or its gradient backwards."""
    us, ks = tiles
    css, ss = vectors
    full, empty = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    token: gl.constexpr = gl.SliceLayout(0, inputs)
    j = gl.arange(0, BLOCK, token)
    first, count = gl.load(segments + 5 * segment), gl.load(segments + 5 * segment + 1)
    p, n = gl.arange(0, P, gl.SliceLayout(1, wide)), gl.arange(0, N, gl.SliceLayout(0, wide))
    place = p[:, None] * N + n[None, :]
    size: gl.constexpr = P * N
    h, decayed = gl.zeros((P, N), gl.float32, wide), 0.0
    if entering is not None:
        h = gl.load(entering + (segment.to(gl.int64) * HEADS + head) * size + place)
    for step in range(count):
        at = step % STAGES
        mine = 2 * at + OWN
        if boundaries is not None:
            own = count - 1 - step if REVERSE else step
            tma.store_wait(1)
            outs.index(step % 2).store(h.to(us.dtype))
            fence_async_shared()
            store_tile(boundaries, [((first + own) * HEADS + head) * P, 0], outs.index(step % 2))
        mbarrier.wait(full.index(at), step // STAGES & 1)
        cs = css.index(mine).load(token)
        last = gl.sum(gl.where(j == BLOCK - 1, cs, 0.0), 0)
        weight = gl.exp2(cs) if REVERSE else ss.index(mine).load(token) * gl.exp2(last - cs)
        added = us.index(mine).reshape([BLOCK, P]).permute((1, 0)).load(inputs).to(gl.float32) * weight[None, :]
        h = warpgroup_mma(added.to(us.dtype), ks.index(at).reshape([BLOCK, N]), h * gl.exp2(last))
        mbarrier.arrive(empty.index(at), count=1)
        decayed += last
    tma.store_wait(0)
    if boundaries is None:
        gl.store(ends + (segment.to(gl.int64) * HEADS + head) * size + place, h)
        gl.store(kept + segment * HEADS + head, decayed * 0.6931471805599453)
    elif gl.load(segments + 5 * segment + (3 if REVERSE else 4)) == 1:
        sequence = gl.load(segments + 5 * segment + 2).to(gl.int64)
        gl.store(ends + (sequence * HEADS + head) * size + place, h)


@gluon.jit(do_not_specialize=["length"])
def sweep_kernel(
    x, decays, scales, B, entering, boundaries, ends, kept, chunks, segments, length,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr,
    REVERSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads: only the states."""
    segment, head = gl.program_id(0) // (HEADS // 2), gl.program_id(0) % (HEADS // 2) * 2
    group = head // (HEADS // GROUPS)
    us = gl.allocate_shared_memory(x.dtype, [2 * STAGES, 1, BLOCK, P], x.layout)
    ks = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, N], B.layout)
    css = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], decays.layout)
    ss = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK], scales.layout)
    even = gl.allocate_shared_memory(x.dtype, [2, P, N], gl.NVMMASharedLayout(128, 16, 2))
    odd = gl.allocate_shared_memory(x.dtype, [2, P, N], gl.NVMMASharedLayout(128, 16, 2))
    full, empty = barriers_of(STAGES, 1), barriers_of(STAGES, 2)
    fence_async_shared()
    tiles, vectors, barriers = (us, ks), (css, ss), (full, empty)
    gl.warp_specialize(
        [
            (_sweep, (tiles, vectors, barriers, even, boundaries, entering, ends, kept, segments,
                      segment, head, 0, HEADS, P, N, BLOCK, STAGES, REVERSE)),
            (_sweep, (tiles, vectors, barriers, odd, boundaries, entering, ends, kept, segments,
                      segment, head + 1, 1, HEADS, P, N, BLOCK, STAGES, REVERSE)),
            (_feed_sweep, ((x, decays, scales, B), tiles, vectors, barriers, segments, chunks, length, segment, group,
                           head, HEADS, P, N, BLOCK, STAGES, REVERSE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
