"""The gradients of the trapezoid on a Hopper GPU: one kernel for all that a chunk says by itself.

Groups of warps share the work of a program: one moves tiles into shared memory ahead of time, four find the gradients
of inputs, four those of keys and four those of queries. So every tile is read from memory once. Sizes and tiles are
those of `everstate.ops.trapezoid.triton_hopper`.
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

from everstate.ops.trapezoid.triton import _InputGradients
from everstate.ops.trapezoid.triton_hopper import (
    NUMBERS,
    REGISTERS,
    across,
    angles_of,
    halves_of,
    rows,
    sizes_of,
)
from everstate.ops.triton_hopper import COLUMN, ROW, SQUARE, barriers_of, vectors_of

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import _Call


def gradients(
    call: _Call, dy: Tensor, k: Tensor, q: Tensor, entering: Tensor, leaving: Tensor, splits: int
) -> tuple[_InputGradients, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Those of inputs, of B and C by split of the heads, of biases by chunk, of angles as keys and queries see them."""
    count, total, steps = len(call.plan.chunks), call.batch * call.length, call.steps
    by_head = lambda *sizes: steps.new_empty(count, call.heads, *sizes)
    inputs = _InputGradients(
        call.x.new_empty(total, call.heads, call.headdim), by_head(call.tokens), by_head(call.tokens),
        by_head(call.tokens), None, None if call.D is None else by_head(),
    )  # fmt: skip
    dtype = torch.float32 if splits > 1 else call.B.dtype
    dB, dC = call.B.new_empty(2, splits, *call.given.B.shape[:-1], call.width, dtype=dtype).unbind(0)
    dB_bias, dC_bias = (None if t is None else steps.new_empty(count, *t.shape) for t in (call.B_bias, call.C_bias))
    dangles = by_head(call.tokens, 2, call.pairs)
    gradients_kernel[(count * call.groups * splits,)](
        rows(call, call.x), rows(call, dy.squeeze(1)), vectors_of(steps), halves_of(k), halves_of(q),
        halves_of(entering), halves_of(leaving), angles_of(call.cos), angles_of(call.sin), rows(call, inputs.x),
        call.D, inputs.decays, inputs.scales, inputs.owns, inputs.D, dB, dC, dB_bias, dC_bias, dangles,
        call.plan.chunks, total, call.length,
        **sizes_of(call), SPLITS=splits, STAGES=2, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return inputs, dB, dC, dB_bias, dC_bias, dangles


@gluon.jit
def _move(
    tensors, tiles, vectors, barriers, chunk, sequence, start, head,
    HEADS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: what belongs to each head, as soon as there is room."""
    x, dy, steps, k, q, entering, leaving, cos, sin = tensors
    us, dus, ks, qs, hs, dhs = tiles
    sums, weighted, owns, cs, ss = vectors
    full, empty = barriers
    for step in range(EACH):
        at = step % STAGES
        mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
        bar = full.index(at)
        mbarrier.expect(
            bar,
            2 * x.block_type.nbytes + 4 * k.block_type.nbytes + 4 * entering.block_type.nbytes
            + 3 * steps.block_type.nbytes + 2 * cos.block_type.nbytes,
        )  # fmt: skip
        place = chunk * HEADS + head + step
        tma.async_copy_global_to_shared(steps, [place * (NUMBERS * BLOCK)], bar, sums.index(at))
        tma.async_copy_global_to_shared(steps, [place * (NUMBERS * BLOCK) + BLOCK], bar, weighted.index(at))
        tma.async_copy_global_to_shared(steps, [place * (NUMBERS * BLOCK) + 3 * BLOCK], bar, owns.index(at))
        tma.async_copy_global_to_shared(x, [sequence, start, (head + step) * P], bar, us.index(at))
        tma.async_copy_global_to_shared(dy, [sequence, start, (head + step) * P], bar, dus.index(at))
        for part in gl.static_range(2):
            tma.async_copy_global_to_shared(k, [place * BLOCK, part * 2 * HALF], bar, ks.index(2 * at + part))
            tma.async_copy_global_to_shared(leaving, [place * P, part * 2 * HALF], bar, dhs.index(2 * at + part))
            tma.async_copy_global_to_shared(q, [place * BLOCK, part * 2 * HALF], bar, qs.index(2 * at + part))
            tma.async_copy_global_to_shared(entering, [place * P, part * 2 * HALF], bar, hs.index(2 * at + part))
        tma.async_copy_global_to_shared(cos, [place * BLOCK, 0], bar, cs.index(at))
        tma.async_copy_global_to_shared(sin, [place * BLOCK, 0], bar, ss.index(at))


@gluon.jit
def _inner(a, tile):
    """Inner products of rows."""
    return gl.sum(a.to(gl.float32) * tile.load(SQUARE).to(gl.float32), 1)


@gluon.jit
def _trace(products):
    """The diagonal of a matrix, by row."""
    j, i = gl.arange(0, products.shape[0], ROW), gl.arange(0, products.shape[1], COLUMN)
    return gl.sum(gl.where(j[:, None] == i[None, :], products, 0.0), 1)


@gluon.jit
def _write(out, dx, place, dinput):
    """Gradients of inputs, once those before them are on their way."""
    tma.store_wait(0)
    out.reshape([out.shape[1], out.shape[2]]).store(dinput)
    fence_async_shared()
    tma.async_copy_shared_to_global(dx, place, out)


@gluon.jit
def _receive(u, du, weights, hs, dhs, at, none):
    """What entries receive from each other, and states from their gradients, by row."""
    received = warpgroup_mma(u, du.permute((1, 0)), none, use_acc=False, is_async=True)
    products = across(hs, dhs, at, none)
    received = warpgroup_mma_wait(2, (received,))
    # Both sides with the same rounded weights: then two entries of the same decay cancel, as they must.
    gained = gl.sum(received * weights.to(gl.float32), 0)
    products = warpgroup_mma_wait(0, (products,))
    return gl.convert_layout(gained, ROW), _trace(products)


@gluon.jit
def _inputs(
    tiles, vectors, barriers, out, dx, D, ddecays, dscales, downs, dD, chunk, sequence, start, head,
    HEADS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of x, the decays, scales, own weights and D. Pairs are `[j, i]`: i receives from j."""
    us, dus, ks, qs, hs, dhs = tiles
    sums, weighted, owns, _, _ = vectors
    full, empty = barriers
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    for step in range(EACH):
        at = step % STAGES
        place = (chunk * HEADS + head + step).to(gl.int64)
        u, du = us.index(at).reshape([BLOCK, P]), dus.index(at).reshape([BLOCK, P])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        answers = across(qs, hs, at, none)
        product = across(ks, qs, at, none)
        later, earlier = sums.index(at).load(COLUMN), weighted.index(at).load(ROW)
        last = gl.sum(gl.where(i == BLOCK - 1, later, 0.0), 0)
        both = _inner(u.load(SQUARE), du)
        answers = warpgroup_mma_wait(2, (answers,))
        ddecay = _inner(answers, du) * gl.exp2(sums.index(at).load(ROW))
        dinput = across(ks, dhs, at, none)
        decay = gl.exp2(later[None, :] - earlier[:, None])
        product = warpgroup_mma_wait(2, (product,))
        weights = gl.where(i[None, :] > j[:, None], product * decay, 0.0).to(out.dtype)
        mine = _trace(product)
        # What went through the state.
        dinput = warpgroup_mma_wait(0, (dinput,)) * gl.exp2(last - earlier)[:, None]
        dlast = _inner(dinput, u)
        dinput = warpgroup_mma(gl.convert_layout(weights, gl.DotOperandLayout(0, SQUARE, 2)), du, dinput, is_async=True)
        down, mine = mine * both, mine * owns.index(at).load(ROW)
        if D is not None:
            mine += gl.load(D + head + step).to(gl.float32)
            gl.store(dD + place, gl.sum(both, 0))
        dinput = warpgroup_mma_wait(0, (dinput,))
        gave = _inner(dinput, u)
        dinput += mine[:, None] * du.load(SQUARE).to(gl.float32)
        _write(out, dx, [sequence, start, (head + step) * P], dinput.to(out.dtype))
        gained, kept = _receive(u, du, weights, hs, dhs, at, none)
        dlast = gl.sum(dlast + gl.exp2(last) * kept, 0)
        ddecay += gained - gave + gl.where(j == BLOCK - 1, dlast, 0.0)
        gl.store(ddecays + place * BLOCK + j, ddecay)
        gl.store(dscales + place * BLOCK + j, gave * gl.exp2(earlier - sums.index(at).load(ROW)))
        mbarrier.arrive(empty.index(at), count=1)
        gl.store(downs + place * BLOCK + j, down)
    tma.store_wait(0)


@gluon.jit
def _halves(t, HALF: gl.constexpr, narrow: gl.constexpr):
    """First and second members of the pairs."""
    first, second = gl.split(t.reshape([t.shape[0], 2, HALF]).permute((0, 2, 1)))
    return gl.convert_layout(first, narrow), gl.convert_layout(second, narrow)


@gluon.jit
def _weigh(u, du, sums, weighted, owns, none, QUERIES: gl.constexpr, first: gl.constexpr):
    """What entries say to each other, and what they say through the state: rows are keys, or QUERIES."""
    BLOCK: gl.constexpr = u.shape[0]
    dtype: gl.constexpr = u.dtype
    side: gl.constexpr = gl.SliceLayout(1, first)
    mine, other = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    weights = warpgroup_mma(u, du.permute((1, 0)), none, use_acc=False, is_async=True)
    if QUERIES:
        decay = gl.exp2(sums.load(ROW)[:, None] - weighted.load(COLUMN)[None, :])
        decay = gl.where(mine[:, None] > other[None, :], decay, 0.0)
        weight = gl.exp2(sums.load(side))
    else:
        later = sums.load(COLUMN)
        decay = gl.exp2(later[None, :] - weighted.load(ROW)[:, None])
        decay = gl.where(mine[:, None] < other[None, :], decay, 0.0)
        last = gl.sum(gl.where(other == BLOCK - 1, later, 0.0), 0)
        weight = gl.exp2(last - weighted.load(side))
    decay = gl.where(mine[:, None] == other[None, :], owns.load(ROW)[:, None], decay)
    through = (u.load(first).to(gl.float32) * weight[:, None]).to(dtype)
    weights = (warpgroup_mma_wait(0, (weights,)) * decay).to(dtype)
    return gl.convert_layout(weights, first), through


@gluon.jit
def _store_rows(out, value, start, end, stride, layout: gl.constexpr):
    """Rows of a chunk, those that exist."""
    t = gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    n = gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    gl.store(out + (t[:, None] * stride + n[None, :]), value.to(out.dtype.element_ty), mask=(start + t < end)[:, None])


@gluon.jit
def _gather(weights, through, q, dh, none):
    """The gradient of one half of the keys."""
    out = warpgroup_mma(through, dh, none, use_acc=False, is_async=True)
    out = warpgroup_mma(weights, q, out, is_async=True)
    return warpgroup_mma_wait(0, (out,))


@gluon.jit
def _keys(
    tiles, vectors, barriers, dB, dB_bias, dangles, start, end, total, chunk, head, group, split,
    QUERIES: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr,
    HALF: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of B, summed over the heads, its biases and angles; of C with the tiles of C."""
    us, dus, ks, qs, _, dhs = tiles
    sums, weighted, owns, cs, ss = vectors
    full, empty = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    first: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    n = gl.arange(0, HALF, gl.SliceLayout(0, narrow))
    m = gl.arange(0, 2 * HALF, gl.SliceLayout(0, wide))
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    nothing = gl.zeros((BLOCK, 2 * HALF), gl.float32, wide)
    db1, db2 = gl.zeros((BLOCK, HALF), gl.float32, narrow), gl.zeros((BLOCK, HALF), gl.float32, narrow)
    db3 = gl.zeros((BLOCK, 2 * HALF), gl.float32, wide)
    for step in range(EACH):
        at = step % STAGES
        place = chunk * HEADS + head + step
        u, du = us.index(at).reshape([BLOCK, P]), dus.index(at).reshape([BLOCK, P])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        weights, through = _weigh(u, du, sums.index(at), weighted.index(at), owns.index(at), none, QUERIES, first)
        dk = _gather(weights, through, qs.index(2 * at + 1), dhs.index(2 * at + 1), nothing)
        db3 += dk
        if dB_bias is not None:
            gl.store(dB_bias + place * (4 * HALF) + 2 * HALF + m, gl.sum(dk, 0))
        dk = _gather(weights, through, qs.index(2 * at), dhs.index(2 * at), nothing)
        dk1, dk2 = _halves(dk, HALF, narrow)
        k1, k2 = _halves(ks.index(2 * at).load(wide), HALF, narrow)
        # With keys and queries as the products had them, rounded, what two entries say to each other cancels.
        dangle = dk2 * k1.to(gl.float32) - dk1 * k2.to(gl.float32)
        _store_rows(dangles + place * (2 * BLOCK * HALF) + (HALF if QUERIES else 0), dangle, 0, BLOCK, 2 * HALF, narrow)
        c, s = cs.index(at).load(narrow).to(gl.float32), ss.index(at).load(narrow).to(gl.float32)
        mbarrier.arrive(empty.index(at), count=1)
        dk1, dk2 = dk1 * c + dk2 * s, dk2 * c - dk1 * s
        db1 += dk1
        db2 += dk2
        if dB_bias is not None:
            gl.store(dB_bias + place * (4 * HALF) + n, gl.sum(dk1, 0))
            gl.store(dB_bias + place * (4 * HALF) + HALF + n, gl.sum(dk2, 0))
    row = (split.to(gl.int64) * total + start) * GROUPS + group
    _store_rows(dB + row * (4 * HALF), db1, start, end, GROUPS * 4 * HALF, narrow)
    _store_rows(dB + row * (4 * HALF) + HALF, db2, start, end, GROUPS * 4 * HALF, narrow)
    _store_rows(dB + row * (4 * HALF) + 2 * HALF, db3, start, end, GROUPS * 4 * HALF, wide)


@gluon.jit
def gradients_kernel(
    x, dy, steps, k, q, entering, leaving, cos, sin, dx, D, ddecays, dscales, downs, dD, dB, dC, dB_bias, dC_bias,
    dangles, chunks, total, length,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads."""
    EACH: gl.constexpr = HEADS // GROUPS // SPLITS
    chunk, part = gl.program_id(0) // (GROUPS * SPLITS), gl.program_id(0) % (GROUPS * SPLITS)
    group, split = part // SPLITS, part % SPLITS
    head = part * EACH
    start, end = gl.load(chunks + 2 * chunk), gl.load(chunks + 2 * chunk + 1)
    sequence, first = start // length, start % length
    us = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, P], x.layout)
    dus = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, P], dy.layout)
    ks = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BLOCK, 2 * HALF], k.layout)
    qs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BLOCK, 2 * HALF], q.layout)
    hs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, P, 2 * HALF], entering.layout)
    dhs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, P, 2 * HALF], leaving.layout)
    sums = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], steps.layout)
    weighted = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], steps.layout)
    owns = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], steps.layout)
    cs = gl.allocate_shared_memory(cos.dtype, [STAGES, BLOCK, HALF], cos.layout)
    ss = gl.allocate_shared_memory(cos.dtype, [STAGES, BLOCK, HALF], cos.layout)
    out = gl.allocate_shared_memory(x.dtype, [1, BLOCK, P], dx.layout)
    full, empty = barriers_of(STAGES, 1), barriers_of(STAGES, 3)
    fence_async_shared()
    tiles, turned, vectors = (us, dus, ks, qs, hs, dhs), (dus, us, qs, ks, dhs, hs), (sums, weighted, owns, cs, ss)
    barriers = (full, empty)
    gl.warp_specialize(
        [
            (_inputs, (tiles, vectors, barriers, out, dx, D, ddecays, dscales, downs, dD,
                       chunk, sequence, first, head, HEADS, EACH, P, BLOCK, STAGES)),
            (_keys, (tiles, vectors, barriers, dB, dB_bias, dangles, start, end, total, chunk, head,
                     group, split, False, HEADS, GROUPS, EACH, P, HALF, BLOCK, STAGES)),
            (_keys, (turned, vectors, barriers, dC, dC_bias, dangles, start, end, total, chunk, head,
                     group, split, True, HEADS, GROUPS, EACH, P, HALF, BLOCK, STAGES)),
            (_move, ((x, dy, steps, k, q, entering, leaving, cos, sin), tiles, vectors, barriers,
                     chunk, sequence, first, head, HEADS, EACH, P, HALF, BLOCK, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
