"""The gradients of the trapezoid with several ranks on a Hopper GPU: one kernel for what a chunk says by itself.

Groups of four warps share the work of a program, which takes the heads of a chunk one after the other. One moves tiles
into shared memory ahead of time and makes keys, queries and inputs of the next head. One finds what pairs of entries
say to each other, and the gradients of inputs by entry. Two find those of keys and queries, each for a half of the
pairs of columns, turn them back and sum them over the heads. Entries and columns lie as `triton_hopper_mimo` says.
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

from everstate.ops.trapezoid.triton_backward import rank_gradients
from everstate.ops.trapezoid.triton_hopper_mimo import (
    ENTRIES,
    REGISTERS,
    fetch_head,
    laid,
    load_bias,
    load_inputs,
    load_numbers,
    sizes_of,
    store_inputs,
    store_numbers,
    tiles_of,
    vectors_for,
    weights_of,
)
from everstate.ops.trapezoid.triton_keys import NUMBERS
from everstate.ops.trapezoid.triton_values import InputGradients, KeyGradients
from everstate.ops.triton_hopper import COLUMN, ROW, SQUARE, barriers_of, inner, rows_of, trace
from everstate.ops.triton_launch import launch
from everstate.ops.triton_segments import CHUNK

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call


def gradients(
    call: Call, dy: Tensor, entering: Tensor, leaving: Tensor, later: Tensor, splits: int
) -> tuple[InputGradients, KeyGradients]:
    """Those of inputs; those of B, C and omega, by part of the heads, and of dt, given what later chunks say of angles.

    Those of biases are sums over the heads of a part up to each, by chunk.
    """
    count, total, steps = len(call.plan.chunks), call.batch * call.length, call.steps
    du = call.x.new_empty(total, call.ranks, call.heads, call.headdim)
    numbers = steps.new_empty(3, count, call.heads, call.tokens * call.ranks)
    dD = None if call.D is None else steps.new_empty(count, call.heads)
    dtype = call.x.dtype
    dB, dC = call.B.new_empty(2, splits, *call.given.B.shape, dtype=steps.dtype if splits > 1 else dtype).unbind(0)
    dB_bias, dC_bias = (None if t is None else steps.new_empty(count, *t.shape) for t in (call.B_bias, call.C_bias))
    dangles = steps.new_empty(count, call.heads, call.tokens, call.pairs)
    launch(
        gradients_kernel, (count * call.groups * splits,),
        call.x, call.mimo_x, rows_of(dy, call.batch, call.length * call.ranks), steps,
        *(tiles_of(t, CHUNK, 4) for t in (call.B, call.C, entering, leaving)),
        call.cos, call.sin, tiles_of(call.cos, call.tokens, 2), tiles_of(call.sin, call.tokens, 2),
        call.B_bias, call.C_bias, call.D, du, *numbers.unbind(0), dD, dB, dC, dB_bias, dC_bias, dangles,
        call.plan.chunks, total, call.length, *call.x.stride()[:2], **sizes_of(call),
        KEYS=laid(call.ranks, call.pairs // 2, 4), TURNED=turned(call.ranks, call.pairs // 2),
        SPLITS=splits, INTERLEAVED=call.interleaved, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    domega, ddt = call.turn_gradients(dangles, later, 1)
    return rank_gradients(call, du, numbers, dD), KeyGradients(dB, dC, dB_bias, dC_bias, domega.unsqueeze(0), ddt)


def turned(ranks: int, columns: int) -> gl.DistributedLinearLayout:
    """How four warps hold the product of 64 entries with so many columns, as tokens, ranks and columns."""
    at = lambda row, column: [row // ranks, row % ranks, column]
    return gl.DistributedLinearLayout(
        [at(0, 1), at(8, 0), *(at(0, 8 << bit) for bit in range((columns // 8).bit_length() - 1))],
        [at(0, 2), at(0, 4), at(1, 0), at(2, 0), at(4, 0)],
        [at(16, 0), at(32, 0)],
        [],
        [64 // ranks, ranks, columns],
    )


@gluon.jit
def _ask(
    tensors, tiles, bar, at, place, sequence, start, head, TOKENS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr
):
    """Gradients of outputs, states, cosines and sines of a head, into their places."""
    dy, entering, leaving, cos, sin = tensors
    dus, hs, dhs, cs, ss = tiles
    mbarrier.expect(bar, dy.block_type.nbytes + 8 * entering.block_type.nbytes + 4 * cos.block_type.nbytes)
    tma.async_copy_global_to_shared(dy, [sequence, start, head * P], bar, dus.index(at))
    for part in gl.static_range(4):
        tma.async_copy_global_to_shared(leaving, [place * P, part * (HALF // 2)], bar, dhs.index(4 * at + part))
        tma.async_copy_global_to_shared(entering, [place * P, part * (HALF // 2)], bar, hs.index(4 * at + part))
    for part in gl.static_range(2):
        tma.async_copy_global_to_shared(cos, [place * TOKENS, part * (HALF // 2)], bar, cs.index(2 * at + part))
        tma.async_copy_global_to_shared(sin, [place * TOKENS, part * (HALF // 2)], bar, ss.index(2 * at + part))


@gluon.jit
def _by_rank(tile, part: gl.constexpr, RANKS: gl.constexpr, HALF: gl.constexpr, KEYS: gl.constexpr):
    """32 rows of a tile, by token and rank."""
    flat: gl.constexpr = gl.BlockedLayout([1, HALF // 8], [8, 4], [4, 1], [1, 0])
    rows = tile.slice(32 * part, 32).load(flat)
    return gl.convert_layout(rows.reshape([32 // RANKS, RANKS, HALF // 2]), KEYS).to(gl.float32)


@gluon.jit
def _turn(
    bases, which: gl.constexpr, bias, angles, out, at, half: gl.constexpr, part: gl.constexpr, RANKS: gl.constexpr,
    HALF: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """32 keys of a head, half of their pairs, into two of four tiles of `out`; `bias` is that of the head."""
    dtype: gl.constexpr = out.dtype
    COLUMNS: gl.constexpr = HALF // 2
    a = _by_rank(bases.index(4 * which + half), part, RANKS, HALF, KEYS)
    b = _by_rank(bases.index(4 * which + 2 + half), part, RANKS, HALF, KEYS)
    a += bias[0][None, :, :]
    b += bias[1][None, :, :]
    c, s = angles[0].to(gl.float32)[:, None, :], angles[1].to(gl.float32)[:, None, :]
    out.index(4 * at + half).slice(32 * part, 32).store((a * c - b * s).to(dtype).reshape([32, COLUMNS]))
    out.index(4 * at + 2 + half).slice(32 * part, 32).store((a * s + b * c).to(dtype).reshape([32, COLUMNS]))


@gluon.jit
def _load_angles(cos, sin, angle, half: gl.constexpr, part: gl.constexpr, RANKS: gl.constexpr, HALF: gl.constexpr):
    at = angle + (part * (32 // RANKS * HALF) + half * (HALF // 2))
    return gl.load(cos + at), gl.load(sin + at)


@gluon.jit
def _turn_all(
    bias, angles, biases, each, cos, sin, angle, bases, ks, qs, at,
    RANKS: gl.constexpr, HALF: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """The keys and queries of a head in eight parts; biases and angles of the next are asked for before each."""
    for part in gl.static_range(8):
        following, bias_ = angles, bias
        if part < 7:
            following = _load_angles(cos, sin, angle, (part + 1) // 2 % 2, (part + 1) % 2, RANKS, HALF)
            if part % 2 == 1:
                bias_ = load_bias(biases[(part + 1) // 4], each + (part + 1) // 2 % 2 * (HALF // 2), HALF)
        _turn(bases, part // 4, bias, angles, ks if part < 4 else qs, at, part // 2 % 2, part % 2, RANKS, HALF, KEYS)
        angles, bias = following, bias_


@gluon.jit
def _ask_bases(B, C, bases, bar, row, HALF: gl.constexpr):
    """B and C of a chunk, into their places."""
    mbarrier.expect(bar, 8 * B.block_type.nbytes)
    for part in gl.static_range(4):
        tma.async_copy_global_to_shared(B, [row, part * (HALF // 2)], bar, bases.index(part))
        tma.async_copy_global_to_shared(C, [row, part * (HALF // 2)], bar, bases.index(4 + part))


@gluon.jit
def _make(
    x, mimo_x, steps, cos, sin, B, C, B_bias, C_bias, tensors, tiles, us, ks, qs, bases, vectors, barriers,
    chunk, sequence, first, start, end, head, group, x_token, x_head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr,
    RANKS: gl.constexpr, INPUTS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Four warps: what belongs to each head, as soon as there is room; its keys, queries and inputs."""
    full, empty, made, ready = barriers
    TOKENS: gl.constexpr = ENTRIES // RANKS
    by_token: gl.constexpr = gl.SliceLayout(1, KEYS)
    by_rank: gl.constexpr = gl.SliceLayout(0, KEYS)
    _ask_bases(B, C, bases, ready.index(0), (chunk * GROUPS + group) * ENTRIES, HALF)
    t, n = gl.arange(0, 32 // RANKS, gl.SliceLayout(1, by_token)), gl.arange(0, HALF // 2, gl.SliceLayout(0, by_token))
    angle = t[:, None] * HALF + n[None, :]
    r, m = gl.arange(0, RANKS, gl.SliceLayout(1, by_rank)), gl.arange(0, HALF // 2, gl.SliceLayout(0, by_rank))
    each = r[:, None] * (2 * HALF) + m[None, :]
    for step in range(EACH):
        at, own = step % 2, head + step
        place = (chunk * HEADS + own).to(gl.int64)
        following = gl.minimum(step + 1, EACH - 1) + head
        fetch_head(x, cos, sin, start, end, chunk * HEADS + following, following, x_token, x_head, HALF, P, RANKS)
        # Asked for before there is room.
        mine = load_inputs(x, mimo_x, start, end, own, x_token, x_head, RANKS, P, INPUTS)
        numbers = load_numbers(steps + place * (NUMBERS * TOKENS), TOKENS)
        c, s = cos + place * (TOKENS * HALF), sin + place * (TOKENS * HALF)
        angles = _load_angles(c, s, angle, 0, 0, RANKS, HALF)
        mine_of = each + own * (RANKS * 2 * HALF)
        bias = load_bias(B_bias, mine_of, HALF)
        mbarrier.wait(empty.index(at), (step // 2 & 1) ^ 1)
        _ask(tensors, tiles, full.index(at), at, chunk * HEADS + own, sequence, first, own, TOKENS, P, HALF)
        store_numbers(vectors, at, numbers)
        store_inputs(mine, us.index(at), RANKS, P, INPUTS)
        mbarrier.wait(ready.index(0), 0)
        _turn_all(bias, angles, (B_bias, C_bias), mine_of, c, s, angle, bases, ks, qs, at, RANKS, HALF, KEYS)
        fence_async_shared()
        mbarrier.arrive(made.index(at), count=1)


@gluon.jit
def _across(a, b, at, none):
    """Products of the rows of one matrix with the rows of another, both in four tiles."""
    out = warpgroup_mma(a.index(4 * at), b.index(4 * at).permute((1, 0)), none, use_acc=False, is_async=True)
    for part in gl.static_range(1, 4):
        out = warpgroup_mma(a.index(4 * at + part), b.index(4 * at + part).permute((1, 0)), out, is_async=True)
    return out


@gluon.jit
def _weigh(u, du, ks, qs, pairs, vectors, at, weighed, downs, dD, place, none, RANKS: gl.constexpr):
    """What pairs `[j, i]` say to each other, i receives from j: through keys and queries it goes to `pairs`, through
    inputs it is returned, with what entries gave to later tokens and received of earlier ones. And the gradients of own
    weights and of D."""
    sums, weighted, owns = vectors[:3]
    dtype: gl.constexpr = pairs.dtype
    j, i = gl.arange(0, ENTRIES, ROW), gl.arange(0, ENTRIES, COLUMN)
    received = warpgroup_mma(u, du.permute((1, 0)), none, use_acc=False, is_async=True)
    product = _across(ks, qs, at, none)
    later, earlier = sums.index(at).load(COLUMN), weighted.index(at).load(ROW)
    weights = weights_of(later, earlier, owns.index(at).load(ROW), j, i, RANKS)
    received, product = warpgroup_mma_wait(0, (received, product))
    if dD is not None:
        gl.store(dD + place, gl.sum(trace(received), 0))
    given = (received * weights).to(dtype)
    pairs.store(given)
    fence_async_shared()
    mbarrier.arrive(weighed, count=1)
    first = (j // RANKS * RANKS)[:, None]
    after = i[None, :] >= first + RANKS
    same = gl.where(after, 0.0, gl.where(i[None, :] >= first, product * received, 0.0))
    gl.store(downs + j, gl.sum(same, 1))
    # Both sides with the same rounded weights: then two entries of the same decay cancel, as they must.
    passed = gl.where(after, product * given.to(gl.float32), 0.0)
    return (product * weights).to(dtype), gl.sum(passed, 1), gl.convert_layout(gl.sum(passed, 0), ROW)


@gluon.jit
def _inputs(
    us, ks, qs, tiles, vectors, pairs, barriers, dinputs, D, ddecays, dscales, downs, dD, chunk, start, end, head,
    HEADS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, RANKS: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of inputs, decays, scales and own weights, by entry. Pairs are `[j, i]`."""
    dus, hs, dhs, _, _ = tiles
    sums, weighted, _, gives, takes, keeps = vectors
    full, empty, made, weighed = barriers
    dtype: gl.constexpr = pairs.dtype
    first: gl.constexpr = gl.DotOperandLayout(0, SQUARE, 2)
    j = gl.arange(0, ENTRIES, ROW)
    p = gl.arange(0, P, COLUMN)
    none = gl.zeros((ENTRIES, ENTRIES), gl.float32, SQUARE)
    there = (start + j // RANKS < end)[:, None] & (p < P)[None, :]
    out = dinputs + start.to(gl.int64) * (RANKS * HEADS * P) + head * P
    for step in range(EACH):
        at = step % 2
        place = (chunk * HEADS + head + step).to(gl.int64) * ENTRIES
        u, du = us.index(at), dus.index(at).reshape([ENTRIES, P])
        mbarrier.wait(full.index(at), step // 2 & 1)
        mbarrier.wait(made.index(at), step // 2 & 1)
        weights, gave, gained = _weigh(
            u, du, ks, qs, pairs.index(at), vectors, at, weighed.index(at), downs + place, dD, place // ENTRIES, none,
            RANKS,
        )  # fmt: skip
        earlier = weighted.index(at).load(ROW)
        # What went through the state.
        state = _across(ks, dhs, at, none)
        state = warpgroup_mma_wait(0, (state,)) * gives.index(at).load(ROW)[:, None]
        dlast = inner(state, u)
        gave += dlast
        dinput = warpgroup_mma(gl.convert_layout(weights, first), du, state, is_async=True)
        gl.store(dscales + place + j, gave * gl.exp2(earlier - sums.index(at).load(ROW)))
        dinput = warpgroup_mma_wait(0, (dinput,))
        answers = _across(qs, hs, at, none)
        if D is not None:
            dinput += du.load(SQUARE).to(gl.float32) * gl.load(D + head + step).to(gl.float32)
        gl.store(out + step * P + (j[:, None] * (HEADS * P) + p[None, :]), dinput.to(dtype), mask=there)
        answers = warpgroup_mma_wait(0, (answers,))
        kept = _across(hs, dhs, at, none)
        ddecay = inner(answers, du) * takes.index(at).load(ROW) + gained - gave
        dlast += trace(warpgroup_mma_wait(0, (kept,))) * keeps.index(at).load(ROW)
        mbarrier.arrive(empty.index(at), count=1)
        dlast = gl.sum(dlast, 0)
        gl.store(ddecays + place + j, ddecay + gl.where(j == ENTRIES - 1, dlast, 0.0))


@gluon.jit
def _lift(tile, RANKS: gl.constexpr, TURNED: gl.constexpr):
    """Rows of entries, by token and rank."""
    return gl.convert_layout(tile.reshape([ENTRIES // RANKS, RANKS, tile.shape[1]]), TURNED)


@gluon.jit
def _turned_back(
    dk1, dk2, ks, at, cs, ss, turn, db1, db2, RANKS: gl.constexpr, narrow: gl.constexpr, TURNED: gl.constexpr
):
    """Gradients of angles by token, and sums over the heads of those of keys before they were turned.

    With keys and queries as the products had them, rounded, what two entries say to each other cancels.
    """
    by_token: gl.constexpr = gl.SliceLayout(1, TURNED)
    dk1, dk2 = _lift(dk1, RANKS, TURNED), _lift(dk2, RANKS, TURNED)
    k1, k2 = _lift(ks.index(at).load(narrow), RANKS, TURNED), _lift(ks.index(at + 2).load(narrow), RANKS, TURNED)
    dphi = gl.sum(dk2 * k1.to(gl.float32) - dk1 * k2.to(gl.float32), 1)
    c = cs.index(turn).load(by_token).to(gl.float32)[:, None, :]
    s = ss.index(turn).load(by_token).to(gl.float32)[:, None, :]
    return dphi, db1 + dk1 * c + dk2 * s, db2 + dk2 * c - dk1 * s


@gluon.jit
def _store_sums(out, place, first, second, HALF: gl.constexpr):
    """Sums over the tokens, by rank."""
    if out is not None:
        gl.store(out + place, gl.sum(first, 0))
        gl.store(out + HALF + place, gl.sum(second, 0))


@gluon.jit
def _store_columns(
    out, first, second, start, end, OWN: gl.constexpr, GROUPS: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INTERLEAVED: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Half of the pairs of columns of a chunk, in the order of the caller."""
    by_token: gl.constexpr = gl.SliceLayout(1, TURNED)
    by_rank: gl.constexpr = gl.SliceLayout(0, TURNED)
    COLUMNS: gl.constexpr = HALF // 2
    t = gl.arange(0, ENTRIES // RANKS, gl.SliceLayout(1, by_token))
    n = gl.arange(0, COLUMNS, gl.SliceLayout(0, by_token))
    r, m = gl.arange(0, RANKS, gl.SliceLayout(1, by_rank)), gl.arange(0, COLUMNS, gl.SliceLayout(0, by_rank))
    column = m[None, :] + OWN * COLUMNS
    place = ((t[:, None] + 0 * n[None, :]) * (RANKS * GROUPS * 2 * HALF))[:, None, :]
    place = place + (r[:, None] * (GROUPS * 2 * HALF) + (2 * column if INTERLEAVED else column))[None, :, :]
    there = (start + t < end)[:, None] & (n < HALF)[None, :]
    there = there[:, None, :] & (r[:, None] + 0 * m[None, :] < RANKS)[None, :, :]
    dtype: gl.constexpr = out.dtype.element_ty
    gl.store(out + place, first.to(dtype), mask=there)
    gl.store(out + (1 if INTERLEAVED else HALF) + place, second.to(dtype), mask=there)


@gluon.jit
def _places(OWN: gl.constexpr, RANKS: gl.constexpr, HALF: gl.constexpr, TURNED: gl.constexpr):
    """Where half of the pairs of columns are: by token, among angles, and by rank, among biases."""
    by_token: gl.constexpr = gl.SliceLayout(1, TURNED)
    by_rank: gl.constexpr = gl.SliceLayout(0, TURNED)
    t, r = gl.arange(0, ENTRIES // RANKS, gl.SliceLayout(1, by_token)), gl.arange(0, RANKS, gl.SliceLayout(1, by_rank))
    n, m = gl.arange(0, HALF // 2, gl.SliceLayout(0, by_token)), gl.arange(0, HALF // 2, gl.SliceLayout(0, by_rank))
    first: gl.constexpr = OWN * (HALF // 2)
    return t[:, None] * HALF + n[None, :] + first, r[:, None] * (2 * HALF) + m[None, :] + first


@gluon.jit
def _columns(
    us, ks, qs, tiles, vectors, pairs, barriers, dB, dC, dB_bias, dC_bias, dangles,
    chunk, start, end, total, head, group, split, OWN: gl.constexpr,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr,
    RANKS: gl.constexpr, INTERLEAVED: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of half of the pairs of columns of B and C, summed over the heads, and of angles."""
    dus, hs, dhs, cs, ss = tiles
    _, _, _, gives, takes, _ = vectors
    full, empty, made, weighed = barriers
    COLUMNS: gl.constexpr = HALF // 2
    TOKENS: gl.constexpr = ENTRIES // RANKS
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    side: gl.constexpr = gl.SliceLayout(1, narrow)
    angle, each = _places(OWN, RANKS, HALF, TURNED)
    nothing = gl.zeros((ENTRIES, COLUMNS), gl.float32, narrow)
    db1 = gl.zeros((TOKENS, RANKS, COLUMNS), gl.float32, TURNED)
    db2, dc1, dc2 = db1, db1, db1
    for step in range(EACH):
        at, place = step % 2, (chunk * HEADS + head + step).to(gl.int64)
        mine = 4 * at + OWN
        u, du, pair = us.index(at), dus.index(at).reshape([ENTRIES, P]), pairs.index(at)
        mbarrier.wait(full.index(at), step // 2 & 1)
        mbarrier.wait(made.index(at), step // 2 & 1)
        dk1 = warpgroup_mma(u, dhs.index(mine), nothing, use_acc=False, is_async=True)
        dk2 = warpgroup_mma(u, dhs.index(mine + 2), nothing, use_acc=False, is_async=True)
        weight = gives.index(at).load(side)[:, None]
        dk1, dk2 = warpgroup_mma_wait(0, (dk1, dk2))
        mbarrier.wait(weighed.index(at), step // 2 & 1)
        dk1 = warpgroup_mma(pair, qs.index(mine), dk1 * weight, is_async=True)
        dk2 = warpgroup_mma(pair, qs.index(mine + 2), dk2 * weight, is_async=True)
        dk1, dk2 = warpgroup_mma_wait(0, (dk1, dk2))
        dphi, db1, db2 = _turned_back(dk1, dk2, ks, mine, cs, ss, 2 * at + OWN, db1, db2, RANKS, narrow, TURNED)
        dq1 = warpgroup_mma(du, hs.index(mine), nothing, use_acc=False, is_async=True)
        dq2 = warpgroup_mma(du, hs.index(mine + 2), nothing, use_acc=False, is_async=True)
        weight = takes.index(at).load(side)[:, None]
        dq1, dq2 = warpgroup_mma_wait(0, (dq1, dq2))
        dq1 = warpgroup_mma(pair.permute((1, 0)), ks.index(mine), dq1 * weight, is_async=True)
        dq2 = warpgroup_mma(pair.permute((1, 0)), ks.index(mine + 2), dq2 * weight, is_async=True)
        dq1, dq2 = warpgroup_mma_wait(0, (dq1, dq2))
        dphi2, dc1, dc2 = _turned_back(dq1, dq2, qs, mine, cs, ss, 2 * at + OWN, dc1, dc2, RANKS, narrow, TURNED)
        mbarrier.arrive(empty.index(at), count=1)
        gl.store(dangles + place * (TOKENS * HALF) + angle, dphi + dphi2)
        _store_sums(dB_bias, place * (RANKS * 2 * HALF) + each, db1, db2, HALF)
        _store_sums(dC_bias, place * (RANKS * 2 * HALF) + each, dc1, dc2, HALF)
    row = ((split.to(gl.int64) * total + start) * (RANKS * GROUPS) + group) * (2 * HALF)
    _store_columns(dB + row, db1, db2, start, end, OWN, GROUPS, HALF, RANKS, INTERLEAVED, TURNED)
    _store_columns(dC + row, dc1, dc2, start, end, OWN, GROUPS, HALF, RANKS, INTERLEAVED, TURNED)


@gluon.jit
def gradients_kernel(
    x, mimo_x, dy, steps, B, C, entering, leaving, cos, sin, cosines, sines, B_bias, C_bias, D,
    du, ddecays, dscales, downs, dD, dB, dC, dB_bias, dC_bias, dangles, chunks, total, length, x_token, x_head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr, KEYS: gl.constexpr, TURNED: gl.constexpr, SPLITS: gl.constexpr, INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads."""
    EACH: gl.constexpr = HEADS // GROUPS // SPLITS
    chunk, part = gl.program_id(0) // (GROUPS * SPLITS), gl.program_id(0) % (GROUPS * SPLITS)
    group, split = part // SPLITS, part % SPLITS
    head = part * EACH
    start, end = gl.load(chunks + 2 * chunk), gl.load(chunks + 2 * chunk + 1)
    sequence, first = start // length, start % length * RANKS
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    COLUMNS: gl.constexpr = HALF // 2
    us = gl.allocate_shared_memory(dy.dtype, [2, ENTRIES, P], square)
    dus = gl.allocate_shared_memory(dy.dtype, [2, 1, ENTRIES, P], dy.layout)
    ks = gl.allocate_shared_memory(dy.dtype, [8, ENTRIES, COLUMNS], B.layout)
    qs = gl.allocate_shared_memory(dy.dtype, [8, ENTRIES, COLUMNS], C.layout)
    hs = gl.allocate_shared_memory(dy.dtype, [8, P, COLUMNS], entering.layout)
    dhs = gl.allocate_shared_memory(dy.dtype, [8, P, COLUMNS], leaving.layout)
    bases = gl.allocate_shared_memory(dy.dtype, [8, ENTRIES, COLUMNS], B.layout)
    pairs = gl.allocate_shared_memory(dy.dtype, [2, ENTRIES, ENTRIES], square)
    cs = gl.allocate_shared_memory(cosines.dtype, [4, ENTRIES // RANKS, COLUMNS], cosines.layout)
    ss = gl.allocate_shared_memory(cosines.dtype, [4, ENTRIES // RANKS, COLUMNS], cosines.layout)
    vectors = vectors_for(2)
    full, empty, made, weighed = barriers_of(2, 1), barriers_of(2, 3), barriers_of(2, 1), barriers_of(2, 1)
    ready = barriers_of(1, 1)
    fence_async_shared()
    tensors, tiles = (dy, entering, leaving, cosines, sines), (dus, hs, dhs, cs, ss)
    barriers = (full, empty, made, weighed)
    gl.warp_specialize(
        [
            (_inputs, (us, ks, qs, tiles, vectors, pairs, barriers, du, D, ddecays, dscales, downs, dD, chunk, start,
                       end, head, HEADS, EACH, P, RANKS)),
            (_columns, (us, ks, qs, tiles, vectors, pairs, barriers, dB, dC, dB_bias, dC_bias, dangles, chunk, start,
                        end, total, head, group, split, 0, HEADS, GROUPS, EACH, P, HALF, RANKS, INTERLEAVED, TURNED)),
            (_columns, (us, ks, qs, tiles, vectors, pairs, barriers, dB, dC, dB_bias, dC_bias, dangles, chunk, start,
                        end, total, head, group, split, 1, HEADS, GROUPS, EACH, P, HALF, RANKS, INTERLEAVED, TURNED)),
            (_make, (x, mimo_x, steps, cos, sin, B, C, B_bias, C_bias, tensors, tiles, us, ks, qs, bases, vectors,
                     (full, empty, made, ready), chunk, sequence, first, start, end, head, group,
                     x_token, x_head, HEADS, GROUPS, EACH, P, HALF, RANKS, INPUTS, KEYS)),
        ],
        [4, 4, 4],
        [128, 128, 80],
    )  # fmt: skip
