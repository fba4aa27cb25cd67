"""The gradients of the trapezoid with several ranks on a Hopper GPU: one kernel for what a chunk says by itself.

Groups of warps share the work of a program, which takes the heads of a chunk one after the other. Four warps move tiles
into shared memory ahead of time and make keys, queries and inputs of the next head. Four find what pairs of entries say
to each other, and the gradients of inputs by entry. Eight find those of keys and queries, turn them back and sum them
over the heads: one group, because two of four would each fetch the same instructions. Entries and columns lie as
`triton_hopper_mimo_make` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from everstate.ops.trapezoid.triton_backward import rank_gradients
from everstate.ops.trapezoid.triton_hopper import across
from everstate.ops.trapezoid.triton_hopper_mimo import REGISTERS, sizes_of, weights_of
from everstate.ops.trapezoid.triton_hopper_mimo_make import (
    ENTRIES,
    bring_all,
    load_bias,
    load_factors,
    load_numbers,
    load_turns,
    store_angles,
    store_inputs,
    store_numbers,
    turn,
    vectors_for,
)
from everstate.ops.trapezoid.triton_hopper_sums import (
    leave_square,
    leave_total,
    room_for_square,
    room_for_totals,
    square_of,
    total_of,
)
from everstate.ops.trapezoid.triton_keys import NUMBERS
from everstate.ops.trapezoid.triton_values import InputGradients, KeyGradients
from everstate.ops.triton_hopper import (
    COLUMN,
    ROW,
    SQUARE,
    barriers_of,
    inner,
    load_tile,
    recast,
    rows_of,
    tiles_of,
    trace,
)
from everstate.ops.triton_launch import launch

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
        *(tiles_of(t, 2) for t in (call.B, call.C, entering, leaving)), call.rates, call.phases,
        call.B_bias, call.C_bias, call.D, du, *numbers.unbind(0), dD, dB, dC, dB_bias, dC_bias, dangles,
        call.plan.chunks, total, call.length, *call.x.stride()[:2], **sizes_of(call),
        TURNED=turned(call.ranks, call.pairs),
        SPLITS=splits, INTERLEAVED=call.interleaved, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    domega, ddt = call.turn_gradients(dangles, later, 1)
    return rank_gradients(call, du, numbers, dD), KeyGradients(dB, dC, dB_bias, dC_bias, domega.unsqueeze(0), ddt)


def turned(ranks: int, columns: int) -> gl.DistributedLinearLayout:
    """How eight warps hold the product of 64 entries with so many columns, as tokens, ranks and columns."""
    at = lambda row, column: [row // ranks, row % ranks, column]
    return gl.DistributedLinearLayout(
        [at(0, 1), at(8, 0), *(at(0, 8 << bit) for bit in range((columns // 16).bit_length() - 1))],
        [at(0, 2), at(0, 4), at(1, 0), at(2, 0), at(4, 0)],
        [at(16, 0), at(32, 0), at(0, columns // 2)],
        [],
        [64 // ranks, ranks, columns],
    )


@gluon.jit
def _ask(tensors, tiles, bar, at, place, sequence, start, head, P: gl.constexpr, HALF: gl.constexpr):
    """Gradients of outputs, and states, of a head, into their places."""
    dy, entering, leaving = tensors
    dus, hs, dhs = tiles
    mbarrier.expect(bar, dy.block_type.nbytes + 4 * entering.block_type.nbytes)
    load_tile(dy, [sequence, start, head * P], bar, dus.index(at))
    for half in gl.static_range(2):
        load_tile(leaving, [place * P, half * HALF], bar, dhs.index(2 * at + half))
        load_tile(entering, [place * P, half * HALF], bar, hs.index(2 * at + half))


@gluon.jit
def _fetch(rows, COUNT: gl.constexpr, last, stride, WIDTH: gl.constexpr):
    """Bring rows up to `last` of so many numbers of 16 bits into the L2 cache."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    EACH: gl.constexpr = WIDTH // 16
    at = gl.arange(0, COUNT * EACH, line)
    there = rows + (gl.minimum(at // EACH, last) * stride + at % EACH * 16)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [there], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load_inputs(
    x, mimo_x, start, end, head, x_token, x_head, RANKS: gl.constexpr, P: gl.constexpr, INPUTS: gl.constexpr
):  # fmt: skip
    """Inputs of a head by token, zeros where there are none, and the factors of the ranks."""
    by_token: gl.constexpr = gl.SliceLayout(1, INPUTS)
    t, p = gl.arange(0, ENTRIES // RANKS, gl.SliceLayout(1, by_token)), gl.arange(0, P, gl.SliceLayout(0, by_token))
    there = (start + t < end)[:, None] & (p < P)[None, :]
    rows = x + start.to(gl.int64) * x_token + head * x_head
    u = gl.load(rows + (t[:, None] * x_token + p[None, :]), mask=there, other=0.0)
    return u, load_factors(mimo_x, head, RANKS, P, INPUTS)


@gluon.jit
def _make(
    x, mimo_x, steps, rates, phases, B, C, biases, tensors, tiles, us, ks, qs, angles, bases, vectors, barriers,
    chunk, sequence, first, start, end, head, group, x_token, x_head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr,
    RANKS: gl.constexpr, INPUTS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Four warps: what belongs to each head, as soon as there is room; its keys, queries and inputs."""
    full, empty, made, ready = barriers
    TOKENS: gl.constexpr = ENTRIES // RANKS
    by_rank: gl.constexpr = gl.SliceLayout(0, KEYS)
    bring_all((B, C), bases, (chunk * GROUPS + group) * ENTRIES, ready, 2)
    r, n = gl.arange(0, RANKS, gl.SliceLayout(1, by_rank)), gl.arange(0, HALF, gl.SliceLayout(0, by_rank))
    each = r[:, None] * (2 * HALF) + n[None, :]
    mbarrier.wait(ready.index(0), 0)
    mbarrier.wait(ready.index(1), 0)
    others = load_turns(rates, steps, phases, chunk, chunk * HEADS + head, TOKENS, HALF)
    for step in range(EACH):
        at, own = step % 2, head + step
        place = (chunk * HEADS + own).to(gl.int64)
        following = gl.minimum(step + 1, EACH - 1) + head
        # Its inputs come from far away.
        _fetch(x + start.to(gl.int64) * x_token + following * x_head, TOKENS, end - 1 - start, x_token, P)
        # Asked for before there is room.
        turns, others = others, load_turns(rates, steps, phases, chunk, chunk * HEADS + following, TOKENS, HALF)
        inputs = _load_inputs(x, mimo_x, start, end, own, x_token, x_head, RANKS, P, INPUTS)
        numbers = load_numbers(steps + place * (NUMBERS * TOKENS), TOKENS)
        mbarrier.wait(empty.index(at), (step // 2 & 1) ^ 1)
        _ask(tensors, tiles, full.index(at), at, chunk * HEADS + own, sequence, first, own, P, HALF)
        store_numbers(vectors, at, numbers)
        store_inputs(inputs, us.index(at), RANKS, P, INPUTS)
        store_angles(turns, angles, at)
        bias = load_bias(biases[0], each + own * (RANKS * 2 * HALF), HALF)
        turn(bases, ks, angles, bias, 0, 2 * at, at, RANKS, HALF, KEYS)
        bias = load_bias(biases[1], each + own * (RANKS * 2 * HALF), HALF)
        turn(bases, qs, angles, bias, 2, 2 * at, at, RANKS, HALF, KEYS)
        fence_async_shared()
        mbarrier.arrive(made.index(at), count=1)


@gluon.jit
def _weigh(u, du, ks, qs, pairs, vectors, gained, at, weighed, downs, dD, none, RANKS: gl.constexpr):
    """What pairs `[j, i]` say to each other, i receives from j: through keys and queries it goes to `pairs`, through
    inputs it is returned, with what entries gave to later tokens; what they received of earlier ones is left in
    `gained`, and the gradient of D. And the gradients of own weights."""
    sums, weighted, owns = vectors[:3]
    dtype: gl.constexpr = pairs.dtype
    j, i = gl.arange(0, ENTRIES, ROW), gl.arange(0, ENTRIES, COLUMN)
    received = warpgroup_mma(u, du.permute((1, 0)), none, use_acc=False, is_async=True)
    product = across(ks, qs, at, none)
    later, earlier = sums.index(at).load(COLUMN), weighted.index(at).load(ROW)
    weights = weights_of(later, earlier, owns.index(at).load(ROW), j, i, RANKS)
    received, product = warpgroup_mma_wait(0, (received, product))
    if dD is not None:
        leave_total(gained[1].index(1), trace(received))
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
    leave_square(gained[0], passed)
    return (product * weights).to(dtype), gl.sum(passed, 1)


@gluon.jit
def _inputs(
    us, ks, qs, tiles, vectors, pairs, gained, barriers, dinputs, D, ddecays, dscales, downs, dD,
    chunk, start, end, head, HEADS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, RANKS: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of inputs, decays, scales and own weights, by entry. Pairs are `[j, i]`."""
    dus, hs, dhs = tiles
    sums, weighted, _, gives, takes, keeps = vectors
    full, empty, made, weighed, spent = barriers
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
        weights, gave = _weigh(
            u, du, ks, qs, pairs.index(at), vectors, gained, at, weighed.index(at), downs + place, dD, none, RANKS
        )
        earlier = weighted.index(at).load(ROW)
        # What went through the state.
        state = across(ks, dhs, at, none)
        state = warpgroup_mma_wait(0, (state,)) * gives.index(at).load(ROW)[:, None]
        dlast = inner(state, u)
        gave += dlast
        dinput = warpgroup_mma(gl.convert_layout(weights, first), du, state, is_async=True)
        gl.store(dscales + place + j, gave * gl.exp2(earlier - sums.index(at).load(ROW)))
        dinput = warpgroup_mma_wait(0, (dinput,))
        answers = across(qs, hs, at, none)
        if D is not None:
            dinput += du.load(SQUARE).to(gl.float32) * gl.load(D + head + step).to(gl.float32)
        gl.store(out + step * P + (j[:, None] * (HEADS * P) + p[None, :]), dinput.to(dtype), mask=there)
        answers = warpgroup_mma_wait(0, (answers,))
        mbarrier.arrive(spent.index(at), count=1)
        kept = across(hs, dhs, at, none)
        ddecay = inner(answers, du) * takes.index(at).load(ROW) - gave
        dlast += trace(warpgroup_mma_wait(0, (kept,))) * keeps.index(at).load(ROW)
        mbarrier.arrive(empty.index(at), count=1)
        leave_total(gained[1].index(0), dlast)
        if dD is not None:
            gl.store(dD + place // ENTRIES, total_of(gained[1].index(1)))
        ddecay += square_of(gained[0]) + gl.where(j == ENTRIES - 1, total_of(gained[1].index(0)), 0.0)
        gl.store(ddecays + place + j, ddecay)


@gluon.jit
def _lift(tile, RANKS: gl.constexpr, TURNED: gl.constexpr):
    """Rows of entries, by token and rank."""
    return gl.convert_layout(tile.reshape([ENTRIES // RANKS, RANKS, tile.shape[1]]), TURNED)


@gluon.jit
def _turned_back(
    dk1, dk2, ks, at, angles, room, dphi, db1, db2, RANKS: gl.constexpr, wide: gl.constexpr, TURNED: gl.constexpr
):
    """What the angles of entries gain, and sums over the heads of gradients of keys before they were turned.

    With keys and queries as the products had them, rounded, what two entries say to each other cancels.
    """
    by_token: gl.constexpr = gl.SliceLayout(1, TURNED)
    dk1, dk2 = _lift(dk1, RANKS, TURNED), _lift(dk2, RANKS, TURNED)
    k1, k2 = _lift(ks.index(at).load(wide), RANKS, TURNED), _lift(ks.index(at + 1).load(wide), RANKS, TURNED)
    dphi = dphi + dk2 * k1.to(gl.float32) - dk1 * k2.to(gl.float32)
    c = angles.index(2 * room).load(by_token).to(gl.float32)[:, None, :]
    s = angles.index(2 * room + 1).load(by_token).to(gl.float32)[:, None, :]
    return dphi, db1 + dk1 * c + dk2 * s, db2 + dk2 * c - dk1 * s


@gluon.jit
def _by_warp(sums, RANKS: gl.constexpr):
    """Sums over the tokens of a warp."""
    TOKENS: gl.constexpr = ENTRIES // RANKS
    return gl.sum(sums.reshape([4, TOKENS // 4, RANKS, sums.shape[2]]), 1)


@gluon.jit
def _meeting(rooms, at, RANKS: gl.constexpr, HALF: gl.constexpr):
    """Sums of both halves of the columns, `[half, warp, rank, column]`, in a room of keys that all have read."""
    EACH: gl.constexpr = 8 // RANKS
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    return recast(rooms, gl.float32, [2 * EACH, 2, 4, RANKS, HALF], plain).index(EACH * at)


@gluon.jit
def _leave_sums(out, rooms, at, first, second, RANKS: gl.constexpr, HALF: gl.constexpr):
    """Leave sums over the tokens of each warp, by rank, if anybody asks for them."""
    if out is not None:
        both = gl.join(_by_warp(first, RANKS), _by_warp(second, RANKS))
        _meeting(rooms, at, RANKS, HALF).store(both.permute((3, 0, 1, 2)))


@gluon.jit
def _store_sums(out, place, rooms, at, RANKS: gl.constexpr, HALF: gl.constexpr):
    """Sums over all tokens, by rank."""
    if out is not None:
        line: gl.constexpr = gl.BlockedLayout([1, 4, 1, 1], [1, 1, 1, 32], [2, 1, 4, 1], [3, 2, 1, 0])
        total = gl.sum(_meeting(rooms, at, RANKS, HALF).load(line), 1)
        flat: gl.constexpr = gl.SliceLayout(1, line)
        half = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, flat)))[:, None, None]
        r = gl.arange(0, RANKS, gl.SliceLayout(0, gl.SliceLayout(2, flat)))[None, :, None]
        n = gl.arange(0, HALF, gl.SliceLayout(0, gl.SliceLayout(1, flat)))[None, None, :]
        gl.store(out + place * (RANKS * 2 * HALF) + (half * HALF + r * (2 * HALF) + n), total)


@gluon.jit
def _store_columns(
    out, first, second, start, end, GROUPS: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INTERLEAVED: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """The columns of a chunk, in the order of the caller."""
    by_token: gl.constexpr = gl.SliceLayout(1, TURNED)
    by_rank: gl.constexpr = gl.SliceLayout(0, TURNED)
    t = gl.arange(0, ENTRIES // RANKS, gl.SliceLayout(1, by_token))
    n = gl.arange(0, HALF, gl.SliceLayout(0, by_token))
    r, m = gl.arange(0, RANKS, gl.SliceLayout(1, by_rank)), gl.arange(0, HALF, gl.SliceLayout(0, by_rank))
    place = ((t[:, None] + 0 * n[None, :]) * (RANKS * GROUPS * 2 * HALF))[:, None, :]
    place = place + (r[:, None] * (GROUPS * 2 * HALF) + (2 * m if INTERLEAVED else m)[None, :])[None, :, :]
    there = (start + t < end)[:, None] & (n < HALF)[None, :]
    there = there[:, None, :] & (r[:, None] + 0 * m[None, :] < RANKS)[None, :, :]
    dtype: gl.constexpr = out.dtype.element_ty
    gl.store(out + place, first.to(dtype), mask=there)
    gl.store(out + (1 if INTERLEAVED else HALF) + place, second.to(dtype), mask=there)


@gluon.jit
def _columns(
    us, ks, qs, tiles, angles, vectors, pairs, barriers, dB, dC, dB_bias, dC_bias, dangles,
    chunk, start, end, total, head, group, split, HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr,
    P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr, INTERLEAVED: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Eight warps: the gradients of B and C, summed over the heads, and of angles."""
    dus, hs, dhs = tiles
    _, _, _, gives, takes, _ = vectors
    full, empty, made, weighed, spent = barriers
    TOKENS: gl.constexpr = ENTRIES // RANKS
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HALF // 2, 16])
    side: gl.constexpr = gl.SliceLayout(1, wide)
    by_token: gl.constexpr = gl.SliceLayout(1, TURNED)
    t, n = gl.arange(0, TOKENS, gl.SliceLayout(1, by_token)), gl.arange(0, HALF, gl.SliceLayout(0, by_token))
    angle = t[:, None] * HALF + n[None, :]
    nothing = gl.zeros((ENTRIES, HALF), gl.float32, wide)
    none = gl.zeros((TOKENS, RANKS, HALF), gl.float32, TURNED)
    db1, db2, dc1, dc2 = none, none, none, none
    for step in range(EACH):
        at, place = step % 2, (chunk * HEADS + head + step).to(gl.int64)
        u, du, pair = us.index(at), dus.index(at).reshape([ENTRIES, P]), pairs.index(at)
        mbarrier.wait(full.index(at), step // 2 & 1)
        mbarrier.wait(made.index(at), step // 2 & 1)
        dk1 = warpgroup_mma(u, dhs.index(2 * at), nothing, use_acc=False, is_async=True)
        dk2 = warpgroup_mma(u, dhs.index(2 * at + 1), nothing, use_acc=False, is_async=True)
        weight = gives.index(at).load(side)[:, None]
        dk1, dk2 = warpgroup_mma_wait(0, (dk1, dk2))
        mbarrier.wait(weighed.index(at), step // 2 & 1)
        dk1 = warpgroup_mma(pair, qs.index(2 * at), dk1 * weight, is_async=True)
        dk2 = warpgroup_mma(pair, qs.index(2 * at + 1), dk2 * weight, is_async=True)
        dk1, dk2 = warpgroup_mma_wait(0, (dk1, dk2))
        dphi, db1, db2 = _turned_back(dk1, dk2, ks, 2 * at, angles, at, none, db1, db2, RANKS, wide, TURNED)
        dq1 = warpgroup_mma(du, hs.index(2 * at), nothing, use_acc=False, is_async=True)
        dq2 = warpgroup_mma(du, hs.index(2 * at + 1), nothing, use_acc=False, is_async=True)
        weight = takes.index(at).load(side)[:, None]
        dq1, dq2 = warpgroup_mma_wait(0, (dq1, dq2))
        dq1 = warpgroup_mma(pair.permute((1, 0)), ks.index(2 * at), dq1 * weight, is_async=True)
        dq2 = warpgroup_mma(pair.permute((1, 0)), ks.index(2 * at + 1), dq2 * weight, is_async=True)
        dq1, dq2 = warpgroup_mma_wait(0, (dq1, dq2))
        dphi, dc1, dc2 = _turned_back(dq1, dq2, qs, 2 * at, angles, at, dphi, dc1, dc2, RANKS, wide, TURNED)
        gl.store(dangles + place * (TOKENS * HALF) + angle, gl.sum(dphi, 1))
        mbarrier.wait(spent.index(at), step // 2 & 1)
        _leave_sums(dB_bias, ks, at, db1, db2, RANKS, HALF)
        _leave_sums(dC_bias, qs, at, dc1, dc2, RANKS, HALF)
        _store_sums(dB_bias, place, ks, at, RANKS, HALF)
        _store_sums(dC_bias, place, qs, at, RANKS, HALF)
        mbarrier.arrive(empty.index(at), count=1)
    row = ((split.to(gl.int64) * total + start) * (RANKS * GROUPS) + group) * (2 * HALF)
    _store_columns(dB + row, db1, db2, start, end, GROUPS, HALF, RANKS, INTERLEAVED, TURNED)
    _store_columns(dC + row, dc1, dc2, start, end, GROUPS, HALF, RANKS, INTERLEAVED, TURNED)


@gluon.jit
def gradients_kernel(
    x, mimo_x, dy, steps, B, C, entering, leaving, rates, phases, B_bias, C_bias, D,
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
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    us = gl.allocate_shared_memory(dy.dtype, [2, ENTRIES, P], square)
    dus = gl.allocate_shared_memory(dy.dtype, [2, 1, ENTRIES, P], dy.layout)
    ks = gl.allocate_shared_memory(dy.dtype, [4, ENTRIES, HALF], B.layout)
    qs = gl.allocate_shared_memory(dy.dtype, [4, ENTRIES, HALF], C.layout)
    hs = gl.allocate_shared_memory(dy.dtype, [4, P, HALF], entering.layout)
    dhs = gl.allocate_shared_memory(dy.dtype, [4, P, HALF], leaving.layout)
    bases = gl.allocate_shared_memory(dy.dtype, [4, ENTRIES, HALF], B.layout)
    pairs = gl.allocate_shared_memory(dy.dtype, [2, ENTRIES, ENTRIES], square)
    angles = gl.allocate_shared_memory(gl.float16, [4, ENTRIES // RANKS, HALF], plain)
    vectors, gained = vectors_for(2), (room_for_square(), room_for_totals(2))
    full, empty, made, weighed = barriers_of(2, 1), barriers_of(2, 2), barriers_of(2, 1), barriers_of(2, 1)
    spent, ready = barriers_of(2, 1), barriers_of(2, 1)
    fence_async_shared()
    tiles, barriers = (dus, hs, dhs), (full, empty, made, weighed, spent)
    gl.warp_specialize(
        [
            (_inputs, (us, ks, qs, tiles, vectors, pairs, gained, barriers, du, D, ddecays, dscales, downs, dD, chunk,
                       start, end, head, HEADS, EACH, P, RANKS)),
            (_columns, (us, ks, qs, tiles, angles, vectors, pairs, barriers, dB, dC, dB_bias, dC_bias, dangles, chunk,
                        start, end, total, head, group, split,
                        HEADS, GROUPS, EACH, P, HALF, RANKS, INTERLEAVED, TURNED)),
            (_make, (x, mimo_x, steps, rates, phases, B, C, (B_bias, C_bias), (dy, entering, leaving), tiles, us, ks,
                     qs, angles, bases, vectors, (full, empty, made, ready), chunk, sequence, first, start, end, head,
                     group, x_token, x_head, HEADS, GROUPS, EACH, P, HALF, RANKS, INPUTS, KEYS)),
        ],
        [8, 4],
        [128, 72],
    )  # fmt: skip
