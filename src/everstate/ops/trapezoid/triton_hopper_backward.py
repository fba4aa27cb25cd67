"""The gradients of the trapezoid on a Hopper GPU: one kernel for all that a chunk says by itself.

Groups of four warps share the work of a program, which takes the heads of a chunk one after the other. One moves tiles
into shared memory ahead of time, turns keys and queries of the next head, and sums gradients of angles. One finds the
gradients of inputs, and on the way what pairs of entries say to each other; with that one finds those of the columns
of B and C that turn, one those of the others, and what the entering state says of decays. So every tile is read from
memory once, and keys and queries are never written there. Sizes and tiles are those of
`everstate.ops.trapezoid.triton_hopper`.

Registers are divided such that no group spills what its products need: else the compiler would wait after each of them,
in all groups. Hence sums over the heads are numbers like others, to which finished products are added.
"""

from __future__ import annotations

from functools import cache
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

from everstate.ops.trapezoid.triton_hopper import (
    REGISTERS,
    across,
    both_at,
    halves_at,
    meet,
    rows,
    sizes_of,
    two_stacks,
)
from everstate.ops.trapezoid.triton_hopper_sums import (
    by_warp,
    columns_of,
    halves,
    leave_square,
    leave_total,
    room_for_columns,
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
    VECTOR,
    barriers_of,
    halves_of,
    inner,
    tiles_of,
    trace,
    vectors_of,
    widened,
)
from everstate.ops.triton_launch import Form, Tiles, launch

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call


def gradients(
    call: Call, dy: Tensor, entering: Tensor, leaving: Tensor, later: Tensor, splits: int, into: Tensor | None
) -> tuple[InputGradients, KeyGradients]:
    """Those of inputs; those of B, C and omega, by part of the heads, and of dt, given what later chunks say of angles.
    That of x is written `into` memory of the caller, if there is such.

    Those of biases are sums over the heads of a part up to each, by chunk.
    """
    count, total, steps = len(call.plan.chunks), call.batch * call.length, call.steps
    by_head = lambda *sizes: steps.new_empty(count, call.heads, *sizes)
    dx = call.x.new_empty(total, call.heads, call.headdim) if into is None else into
    inputs = InputGradients(
        dx, by_head(call.tokens), by_head(call.tokens), by_head(call.tokens), None,
        None if call.D is None else by_head(),
    )  # fmt: skip
    dtype = call.x.dtype
    dB, dC = call.B.new_empty(2, splits, *call.given.B.shape, dtype=torch.float32 if splits > 1 else dtype).unbind(0)
    dB_bias, dC_bias = (None if t is None else steps.new_empty(count, *t.shape) for t in (call.B_bias, call.C_bias))
    domega, ddt = steps.new_empty(call.groups * splits, total, call.pairs), by_head(call.tokens)
    launch(
        gradients_kernel, (count * call.groups * splits,),
        rows(call, call.x), rows(call, dy.squeeze(1)), vectors_of(steps), tiles_of(call.B, 2), tiles_of(call.C, 2),
        halves_of(entering), halves_of(leaving), tiles_of(call.cos.view(dtype)), tiles_of(call.sin.view(dtype)),
        _rows_of(call.B_bias), _rows_of(call.C_bias), call.D, call.omega, later,
        inputs.x, inputs.decays, inputs.scales, inputs.owns, inputs.D, dB, dC,
        dB_bias, dC_bias, domega, ddt, call.plan.chunks, total, call.length, call.omega.stride(0),
        **sizes_of(call), SPLITS=splits, DX=dx.stride(0), INTERLEAVED=call.interleaved, STAGES=2,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return inputs, KeyGradients(dB, dC, dB_bias, dC_bias, domega, ddt)


@cache
def _form_of_bias(width: int) -> Form:
    return Form(width, layout=VECTOR)


def _rows_of(bias: Tensor | None) -> Tiles | None:
    """The bias of a head."""
    return None if bias is None else Tiles(bias, (bias.numel(),), (1,), _form_of_bias(bias.shape[-1]))


@gluon.jit
def _ask(
    tensors, tiles, vectors, bar, at, place, sequence, start, head, P: gl.constexpr, BLOCK: gl.constexpr
):  # fmt: skip
    """Inputs, their gradients, states and numbers per token of a head, into their places."""
    x, dy, steps, _, _, entering, leaving = tensors[:7]
    us, dus, _, _, hs, dhs = tiles
    sums, weighted, owns = vectors[:3]
    mbarrier.expect(bar, 2 * x.block_type.nbytes + 2 * entering.block_type.nbytes + 3 * steps.block_type.nbytes)
    numbers = place * (NUMBERS * BLOCK)
    tma.async_copy_global_to_shared(steps, [numbers], bar, sums.index(at))
    tma.async_copy_global_to_shared(steps, [numbers + BLOCK], bar, weighted.index(at))
    tma.async_copy_global_to_shared(steps, [numbers + 3 * BLOCK], bar, owns.index(at))
    tma.async_copy_global_to_shared(x, [sequence, start, head * P], bar, us.index(at))
    tma.async_copy_global_to_shared(dy, [sequence, start, head * P], bar, dus.index(at))
    tma.async_copy_global_to_shared(entering, [0, place * P, 0], bar, _room_for_halves(hs, at, entering))
    tma.async_copy_global_to_shared(leaving, [0, place * P, 0], bar, _room_for_halves(dhs, at, leaving))


@gluon.jit
def _room_for_halves(tiles, at, tensor):
    """Two tiles of a stack as the copy engine fills them with both halves of a state."""
    both: gl.constexpr = [tiles.shape[0] // 2, 2, tiles.shape[1], tiles.shape[2]]
    return tiles._reinterpret(tiles.dtype, both, tensor.layout).index(at)


@gluon.jit
def _ask_angles(tensors, vectors, bar, at, place, head, HALF: gl.constexpr, BLOCK: gl.constexpr):
    """What keys and queries of a head are made of, and dt."""
    steps, cos, sin, B_bias, C_bias = tensors[2], tensors[7], tensors[8], tensors[9], tensors[10]
    dts, cs, ss, bs, bs2 = vectors[3:]
    biases: gl.constexpr = (0 if B_bias is None else 16 * HALF) + (0 if C_bias is None else 16 * HALF)
    mbarrier.expect(bar, 2 * cos.block_type.nbytes + steps.block_type.nbytes + biases)
    tma.async_copy_global_to_shared(cos, [place * BLOCK, 0], bar, cs.index(at))
    tma.async_copy_global_to_shared(sin, [place * BLOCK, 0], bar, ss.index(at))
    tma.async_copy_global_to_shared(steps, [place * (NUMBERS * BLOCK) + 4 * BLOCK], bar, dts.index(at))
    if B_bias is not None:
        tma.async_copy_global_to_shared(B_bias, [head * (4 * HALF)], bar, bs[0].index(at))
    if C_bias is not None:
        tma.async_copy_global_to_shared(C_bias, [head * (4 * HALF)], bar, bs2[0].index(at))


@gluon.jit
def _turn(bases, biases, cs, ss, ks, qs, at, HALF: gl.constexpr, half: gl.constexpr):
    """The keys of a head from B, and queries from C, by 32 rows; biases are those of the head, if there are any."""
    for part in gl.static_range(2):
        c, s = trig(cs.slice(32 * part, 32), half), trig(ss.slice(32 * part, 32), half)
        _turn_rows(bases, 0, biases[0], c, s, ks, at, part, HALF, half)
        _turn_rows(bases, 2, biases[1], c, s, qs, at, part, HALF, half)


@gluon.jit
def _turn_rows(bases, which, bias, c, s, out, at, part: gl.constexpr, HALF: gl.constexpr, half: gl.constexpr):
    """Some rows of both halves, given the cosines and sines of the angles of the first."""
    first, second = both_at(out, at)
    dtype: gl.constexpr = first.dtype
    side: gl.constexpr = gl.SliceLayout(0, half)
    a, b = halves(widened(bases.index(which).slice(32 * part, 32).load(half)), HALF, half)
    if bias is not None:
        a += bias[0].index(4 * at).load(side)[None, :]
        b += bias[0].index(4 * at + 1).load(side)[None, :]
    turned = gl.join((a * c - b * s).to(dtype), (a * s + b * c).to(dtype))
    first.slice(32 * part, 32).store(turned.permute((0, 2, 1)).reshape([32, 2 * HALF]))
    still = bases.index(which + 1).slice(32 * part, 32).load(half)
    if bias is not None:
        still = (widened(still) + bias[1].index(2 * at + 1).load(side)[None, :]).to(dtype)
    second.slice(32 * part, 32).store(still)


@gluon.jit
def trig(bits, layout: gl.constexpr):
    """Cosines or sines, which are float16 in tiles of the other numbers of 16 bits."""
    return gl.cast(bits.load(layout), gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _make_next(
    bases, tiles, vectors, barriers, B_bias, C_bias, step, HALF: gl.constexpr, half: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Keys and queries of a head, once what they are made of is there."""
    angled, made = barriers
    _, _, ks, qs, _, _ = tiles
    _, _, _, _, cs, ss, bs, bs2 = vectors
    at = step % STAGES
    mbarrier.wait(angled.index(at), step // STAGES & 1)
    biases = (None if B_bias is None else bs[1:], None if C_bias is None else bs2[1:])
    _turn(bases, biases, cs.index(at), ss.index(at), ks, qs, at, HALF, half)
    fence_async_shared()
    mbarrier.arrive(made.index(at), count=1)


@gluon.jit
def _add_turns(
    angles, dts, rate, drate, later, ddt, place, total, at, HALF: gl.constexpr, BLOCK: gl.constexpr,
    narrow: gl.constexpr,
):  # fmt: skip
    """Gradients of the rates and of dt: a turn moves all angles from its token on, so they are sums from the right,
    products with ones. These are made such that the compiler knows none of them: ptxas 12.8 may set a register that
    holds a constant only behind the product that reads it."""
    cs, ss = angles
    t, n = gl.arange(0, BLOCK, gl.SliceLayout(1, narrow)), gl.arange(0, HALF, gl.SliceLayout(0, narrow))
    dturn = gl.zeros((BLOCK, HALF), gl.float32, narrow) + gl.load(later + place * HALF + n)[None, :]
    first: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    row, column = gl.arange(0, BLOCK, gl.SliceLayout(1, first)), gl.arange(0, BLOCK, gl.SliceLayout(0, first))
    nought = (total < 0) * 1.0
    ones = gl.where(row[:, None] <= column[None, :], 1.0 - nought, nought).to(cs.dtype)
    dturn = warpgroup_mma(ones, cs.index(at), dturn, is_async=True)
    dturn = warpgroup_mma(ones, ss.index(at), dturn, is_async=True)
    step = dts.index(at).load(gl.SliceLayout(1, narrow))
    dturn = warpgroup_mma_wait(0, (dturn,))
    gl.store(ddt + place * BLOCK + t, gl.sum(dturn * rate, 1))
    return drate + dturn * step[:, None]


@gluon.jit
def _make(
    tensors, tiles, vectors, barriers, bases, omega, later, domega, ddt,
    chunk, sequence, first, start, end, total, head, group, part, omega_token,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: what belongs to each head, as soon as there is room; its keys and queries; the gradient of omega."""
    full, angled, empty, made, ready = barriers
    half: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    dts, cs, ss = vectors[3:6]
    B, C, B_bias, C_bias = tensors[3], tensors[4], tensors[9], tensors[10]
    row = (chunk * GROUPS + group) * BLOCK
    mbarrier.expect(ready.index(0), 4 * B.block_type.nbytes)
    for own in gl.static_range(2):
        tma.async_copy_global_to_shared(B, [row, own * 2 * HALF], ready.index(0), bases.index(own))
        tma.async_copy_global_to_shared(C, [row, own * 2 * HALF], ready.index(0), bases.index(2 + own))
    for step in gl.static_range(STAGES if EACH > 1 else 1):
        _ask_angles(tensors, vectors, angled.index(step), step, chunk * HEADS + head + step, head + step, HALF, BLOCK)
        _ask(tensors, tiles, vectors, full.index(step), step, chunk * HEADS + head + step, sequence, first, head + step,
             P, BLOCK)  # fmt: skip
    t, n = gl.arange(0, BLOCK, gl.SliceLayout(1, narrow)), gl.arange(0, HALF, gl.SliceLayout(0, narrow))
    there = (start + t < end)[:, None] & (n < HALF)[None, :]
    rates = omega + start.to(gl.int64) * omega_token + (t[:, None] * omega_token + n[None, :])
    rate = gl.load(rates, mask=there, other=0.0).to(gl.float32)
    drate = gl.zeros((BLOCK, HALF), gl.float32, narrow)
    mbarrier.wait(ready.index(0), 0)
    _make_next(bases, tiles, vectors, (angled, made), B_bias, C_bias, 0, HALF, half, STAGES)
    for step in range(1, EACH):
        _make_next(bases, tiles, vectors, (angled, made), B_bias, C_bias, step, HALF, half, STAGES)
        before, phase, place = (step - 1) % STAGES, (step - 1) // STAGES & 1, chunk * HEADS + head + step
        mbarrier.wait(empty.index(before), phase)
        if step + 1 < EACH:
            _ask(tensors, tiles, vectors, full.index(before), before, place + 1, sequence, first, head + step + 1,
                 P, BLOCK)  # fmt: skip
        drate = _add_turns((cs, ss), dts, rate, drate, later, ddt, place - 1, total, before, HALF, BLOCK, narrow)
        if step + 1 < EACH:
            _ask_angles(tensors, vectors, angled.index(before), before, place + 1, head + step + 1, HALF, BLOCK)
    mbarrier.wait(empty.index((EACH - 1) % STAGES), (EACH - 1) // STAGES & 1)
    drate = _add_turns((cs, ss), dts, rate, drate, later, ddt, chunk * HEADS + head + EACH - 1, total,
                       (EACH - 1) % STAGES, HALF, BLOCK, narrow)  # fmt: skip
    _store_rows(domega + (part.to(gl.int64) * total + start) * HALF, drate, start, end, HALF, narrow)


@gluon.jit
def _store_rows(out, value, start, end, stride, layout: gl.constexpr):
    """Rows of a chunk, those that exist."""
    t = gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    n = gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    gl.store(out + (t[:, None] * stride + n[None, :]), value.to(out.dtype.element_ty), mask=(start + t < end)[:, None])


@gluon.jit
def _weights(sums, weighted, at, BLOCK: gl.constexpr):
    """What i receives from j `[j, i]`, strictly before it; and the sums at the end and of each j."""
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    later, earlier = sums.index(at).load(COLUMN), weighted.index(at).load(ROW)
    weights = gl.where(i[None, :] > j[:, None], gl.exp2(later[None, :] - earlier[:, None]), 0.0)
    return weights, _last(sums, at, BLOCK), earlier


@gluon.jit
def _last(sums, at, BLOCK: gl.constexpr):
    """The sum of the log decays of a chunk."""
    numbers = sums._reinterpret(gl.float32, [sums.shape[0] * BLOCK, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return gl.sum(numbers.index(at * BLOCK + BLOCK - 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _tell(received, decay, own, pairs, step, barriers):
    """Give the others what pairs say to each other through keys and queries."""
    weighed, free = barriers
    j, i = gl.arange(0, received.shape[0], ROW), gl.arange(0, received.shape[1], COLUMN)
    given = (received * gl.where(i[None, :] == j[:, None], own[:, None], decay)).to(pairs.dtype)
    mbarrier.wait(free.index(0), (step & 1) ^ 1)
    pairs.store(given)
    fence_async_shared()
    mbarrier.arrive(weighed.index(0), count=1)


@gluon.jit
def _exchange(weights, received, gains, dtype: gl.constexpr):
    """Weights of entries for others, for products, and what each gave; what each gained is left in `gains`."""
    # Both sides of each pair are the same number: two entries of the same decay cancel, as they must.
    both = weights * received
    leave_square(gains, both)
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, SQUARE, 2)), gl.sum(both, 1)


@gluon.jit
def _own_weights(mine, direct, own, D, head, dD, place):
    """How much of its own input a token gives, through D too, whose gradient is stored."""
    mine *= own
    if D is not None:
        mine += gl.load(D + head).to(gl.float32)
        gl.store(dD + place, total_of(direct))
    return mine


@gluon.jit
def _inputs(
    tiles, vectors, pairs, answered, gained, barriers, dx, D, ddecays, dscales, downs, dD,
    chunk, start, end, head, HEADS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, DX: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of x, the decays, scales, own weights and D, and on the way what pairs of entries say
    to each other. Pairs are `[j, i]`: i receives from j."""
    us, dus, ks, qs, _, dhs = tiles
    sums, weighted, owns = vectors[:3]
    full, empty, made, weighed, free, asked = barriers
    j = gl.arange(0, BLOCK, ROW)
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    for step in range(EACH):
        at = step % STAGES
        keys = both_at(ks, at)
        place = (chunk * HEADS + head + step).to(gl.int64)
        u, du = us.index(at).reshape([BLOCK, P]), dus.index(at).reshape([BLOCK, P])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        received = warpgroup_mma(u, du.permute((1, 0)), none, use_acc=False, is_async=True)
        decay, last, earlier = _weights(sums, weighted, at, BLOCK)
        mbarrier.wait(made.index(at), step // STAGES & 1)
        product = meet(keys, both_at(qs, at), none)
        own = owns.index(at).load(ROW)
        received = warpgroup_mma_wait(2, (received,))
        _tell(received, decay, own, pairs, step, (weighed, free))
        product = warpgroup_mma_wait(0, (product,))
        mine = trace(product)
        weights, gave = _exchange(product * decay, received, gained[0], pairs.dtype)
        # What went through the state.
        state = meet(keys, halves_at(dhs, at), none)
        state = warpgroup_mma_wait(0, (state,)) * gl.exp2(last - earlier)[:, None]
        dinput = warpgroup_mma(weights, du, state, is_async=True)
        given = widened(u.load(SQUARE))
        through = gl.sum(state * given, 1)
        gave += through
        answers = widened(du.load(SQUARE))
        direct = gl.sum(given * answers, 1)
        leave_total(gained[1].index(0), through)
        leave_total(gained[1].index(1), direct)
        gl.store(dscales + place * BLOCK + j, gave * gl.exp2(earlier - sums.index(at).load(ROW)))
        gl.store(downs + place * BLOCK + j, mine * direct)
        mine = _own_weights(mine, gained[1].index(1), own, D, head + step, dD, place)
        mbarrier.wait(asked.index(at), step // STAGES & 1)
        stays = total_of(gained[1].index(0)) + total_of(answered[1].index(at))
        ddecay = square_of(gained[0]) - gave + answered[0].index(at).load(ROW)
        gl.store(ddecays + place * BLOCK + j, ddecay + gl.where(j == BLOCK - 1, stays, 0.0))
        dinput = warpgroup_mma_wait(0, (dinput,)) + mine[:, None] * answers
        mbarrier.arrive(empty.index(at), count=1)
        _store_rows(dx + (start.to(gl.int64) * DX + (head + step) * P), dinput, start, end, DX, SQUARE)


@gluon.jit
def _turned_back(dk, ks, cs, ss, db1, db2, HALF: gl.constexpr, wide: gl.constexpr, narrow: gl.constexpr):
    """Gradients of angles, and sums over the heads of those of keys before they were turned.

    With keys and queries as the products had them, rounded, what two entries say to each other cancels.
    """
    dk1, dk2 = halves(dk, HALF, narrow)
    k1, k2 = halves(widened(ks.load(wide)), HALF, narrow)
    dphi = dk2 * k1 - dk1 * k2
    c, s = trig(cs, narrow), trig(ss, narrow)
    return dphi, db1 + dk1 * c + dk2 * s, db2 + dk2 * c - dk1 * s


@gluon.jit
def _leave_sums(out, room, a, b):
    """Leave sums over the tokens of each warp of two tiles of columns, if anybody asks for them."""
    if out is not None:
        room.store(gl.join(by_warp(a), by_warp(b)).permute((2, 0, 1)))


@gluon.jit
def _room_for_biases(HALF: gl.constexpr):
    """Room for the sums of two tiles of columns of B, and of C."""
    return room_for_columns(2, HALF), room_for_columns(2, HALF)


@gluon.jit
def _store_sums(out, at, room):
    """Sums over all tokens of two tiles of columns that follow each other."""
    if out is not None:
        total = columns_of(room)
        HALF: gl.constexpr = total.shape[1]
        tile = gl.arange(0, 2, gl.SliceLayout(1, total.type.layout))
        n = gl.arange(0, HALF, gl.SliceLayout(0, total.type.layout))
        gl.store(out + at + (tile[:, None] * HALF + n[None, :]), total)


@gluon.jit
def _turning(
    tiles, vectors, pairs, rooms, barriers, dB, dC, dB_bias, dC_bias, chunk, start, end, total, head, group, split,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr,
    BLOCK: gl.constexpr, INTERLEAVED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of the columns of B and C that turn, summed over the heads, and of angles."""
    us, dus, ks, qs, hs, dhs = tiles
    sums, weighted, _, _, cs, ss, _, _ = vectors
    full, angled, empty, made, weighed, free = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    side: gl.constexpr = gl.SliceLayout(1, wide)
    nothing = gl.zeros((BLOCK, 2 * HALF), gl.float32, wide)
    db1, db2 = gl.zeros((BLOCK, HALF), gl.float32, narrow), gl.zeros((BLOCK, HALF), gl.float32, narrow)
    dc1, dc2 = gl.zeros((BLOCK, HALF), gl.float32, narrow), gl.zeros((BLOCK, HALF), gl.float32, narrow)
    for step in range(EACH):
        at = step % STAGES
        bias = (chunk * HEADS + head + step) * (4 * HALF)
        u, du = us.index(at).reshape([BLOCK, P]), dus.index(at).reshape([BLOCK, P])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        dk = warpgroup_mma(u, dhs.index(2 * at), nothing, use_acc=False, is_async=True)
        last = _last(sums, at, BLOCK)
        weight = gl.exp2(last - weighted.index(at).load(side))
        dk = warpgroup_mma_wait(0, (dk,)) * weight[:, None]
        mbarrier.wait(angled.index(at), step // STAGES & 1)
        mbarrier.wait(made.index(at), step // STAGES & 1)
        mbarrier.wait(weighed.index(0), step & 1)
        dk = warpgroup_mma(pairs, qs[0].index(at), dk, is_async=True)
        dk = warpgroup_mma_wait(0, (dk,))
        dphi, db1, db2 = _turned_back(dk, ks[0].index(at), cs.index(at), ss.index(at), db1, db2, HALF, wide, narrow)
        dq = warpgroup_mma(du, hs.index(2 * at), nothing, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,)) * gl.exp2(sums.index(at).load(side))[:, None]
        dq = warpgroup_mma(pairs.permute((1, 0)), ks[0].index(at), dq, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(free.index(0), count=1)
        dphi2, dc1, dc2 = _turned_back(dq, qs[0].index(at), cs.index(at), ss.index(at), dc1, dc2, HALF, wide, narrow)
        # In two parts of 16 bits, in the place of cosines and sines, which nobody needs any more.
        dphi += dphi2
        coarse = dphi.to(pairs.dtype)
        cs.index(at).store(coarse)
        ss.index(at).store((dphi - coarse.to(gl.float32)).to(pairs.dtype))
        fence_async_shared()
        mbarrier.arrive(empty.index(at), count=1)
        _leave_sums(dB_bias, rooms[0], db1, db2)
        _leave_sums(dC_bias, rooms[1], dc1, dc2)
        _store_sums(dB_bias, bias, rooms[0])
        _store_sums(dC_bias, bias, rooms[1])
    row = ((split.to(gl.int64) * total + start) * GROUPS + group) * (4 * HALF)
    _store_halves(dB + row, db1, db2, start, end, GROUPS, HALF, INTERLEAVED, narrow)
    _store_halves(dC + row, dc1, dc2, start, end, GROUPS, HALF, INTERLEAVED, narrow)


@gluon.jit
def _store_halves(
    out, first, second, start, end, GROUPS: gl.constexpr, HALF: gl.constexpr, INTERLEAVED: gl.constexpr,
    narrow: gl.constexpr,
):  # fmt: skip
    """Columns that turn, in the order of the caller."""
    t, n = gl.arange(0, first.shape[0], gl.SliceLayout(1, narrow)), gl.arange(0, HALF, gl.SliceLayout(0, narrow))
    place, there = t[:, None] * (GROUPS * 4 * HALF) + n[None, :], (start + t < end)[:, None]
    dtype: gl.constexpr = out.dtype.element_ty
    if INTERLEAVED:
        place += n[None, :]
    gl.store(out + place, first.to(dtype), mask=there)
    gl.store(out + (1 if INTERLEAVED else 2 * HALF) + place, second.to(dtype), mask=there)


@gluon.jit
def _numbers(steps, STAGES: gl.constexpr, BLOCK: gl.constexpr):
    """Room for numbers per token: sums of log decays, those less log scales, own weights, dt."""
    sums = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], steps.layout)
    weighted = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], steps.layout)
    owns = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], steps.layout)
    return sums, weighted, owns, gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], steps.layout)


@gluon.jit
def _biases(steps, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Room for biases of heads, by head, by pieces of HALF, and of twice as many."""
    all = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * HALF], steps.layout)
    fine = all._reinterpret(gl.float32, [4 * STAGES, HALF], steps.layout)
    return all, fine, all._reinterpret(gl.float32, [2 * STAGES, 2 * HALF], steps.layout)


@gluon.jit
def _answer(tiles, du, sums, last, answered, made, phase, at):
    """What the state that enters says of decays, to the tokens and to the state that leaves."""
    qs, hs, dhs = tiles
    BLOCK: gl.constexpr = du.shape[0]
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    kept = across(hs, dhs, at, none)
    kept = trace(warpgroup_mma_wait(0, (kept,)))
    mbarrier.wait(made, phase)
    answers = meet(both_at(qs, at), halves_at(hs, at), none)
    leave_total(answered[1].index(at), kept * gl.exp2(last))
    answers = warpgroup_mma_wait(0, (answers,))
    answered[0].index(at).store(inner(answers, du) * gl.exp2(sums.index(at).load(ROW)))


@gluon.jit
def _standing(
    tiles, vectors, pairs, answered, rooms, barriers, dB, dC, dB_bias, dC_bias, chunk, start, end, total, head, group,
    split, HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr,
    BLOCK: gl.constexpr, INTERLEAVED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of the columns of B and C that stand still, summed over the heads; and what the
    entering state says of decays."""
    us, dus, ks, qs, hs, dhs = tiles
    sums, weighted = vectors[:2]
    full, empty, made, weighed, free, asked = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    side: gl.constexpr = gl.SliceLayout(1, wide)
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    nothing = gl.zeros((BLOCK, 2 * HALF), gl.float32, wide)
    db, dc = gl.zeros((BLOCK, 2 * HALF), gl.float32, wide), gl.zeros((BLOCK, 2 * HALF), gl.float32, wide)
    for step in range(EACH):
        at = step % STAGES
        bias = (chunk * HEADS + head + step) * (4 * HALF) + 2 * HALF
        u, du = us.index(at).reshape([BLOCK, P]), dus.index(at).reshape([BLOCK, P])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        last = _last(sums, at, BLOCK)
        _answer((qs, hs, dhs), du, sums, last, answered, made.index(at), step // STAGES & 1, at)
        mbarrier.arrive(asked.index(at), count=1)
        dk = warpgroup_mma(u, dhs.index(2 * at + 1), nothing, use_acc=False, is_async=True)
        weight = gl.exp2(last - weighted.index(at).load(side))
        dk = warpgroup_mma_wait(0, (dk,)) * weight[:, None]
        mbarrier.wait(weighed.index(0), step & 1)
        dk = warpgroup_mma(pairs, qs[1].index(at), dk, is_async=True)
        weight = gl.exp2(sums.index(at).load(side))
        dk = warpgroup_mma_wait(0, (dk,))
        db += dk
        dq = warpgroup_mma(du, hs.index(2 * at + 1), nothing, use_acc=False, is_async=True)
        b1, b2 = halves(db, HALF, narrow)
        _leave_sums(dB_bias, rooms[0], b1, b2)
        dq = warpgroup_mma_wait(0, (dq,)) * weight[:, None]
        dq = warpgroup_mma(pairs.permute((1, 0)), ks[1].index(at), dq, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(free.index(0), count=1)
        mbarrier.arrive(empty.index(at), count=1)
        dc += dq
        b1, b2 = halves(dc, HALF, narrow)
        _leave_sums(dC_bias, rooms[1], b1, b2)
        _store_sums(dB_bias, bias, rooms[0])
        _store_sums(dC_bias, bias, rooms[1])
    row = ((split.to(gl.int64) * total + start) * GROUPS + group) * (4 * HALF)
    _store_still(dB + row, db, start, end, GROUPS, HALF, INTERLEAVED, wide)
    _store_still(dC + row, dc, start, end, GROUPS, HALF, INTERLEAVED, wide)


@gluon.jit
def _store_still(
    out, value, start, end, GROUPS: gl.constexpr, HALF: gl.constexpr, INTERLEAVED: gl.constexpr, wide: gl.constexpr
):  # fmt: skip
    """Columns that stand still, in the order of the caller."""
    t, n = gl.arange(0, value.shape[0], gl.SliceLayout(1, wide)), gl.arange(0, 2 * HALF, gl.SliceLayout(0, wide))
    column = n + 2 * HALF if INTERLEAVED else n + HALF + n // HALF * HALF
    place = t[:, None] * (GROUPS * 4 * HALF) + column[None, :]
    gl.store(out + place, value.to(out.dtype.element_ty), mask=(start + t < end)[:, None])


@gluon.jit
def gradients_kernel(
    x, dy, steps, B, C, entering, leaving, cos, sin, B_bias, C_bias, D, omega, later, dx, ddecays, dscales, downs, dD,
    dB, dC, dB_bias, dC_bias, domega, ddt, chunks, total, length, omega_token,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    SPLITS: gl.constexpr, DX: gl.constexpr, INTERLEAVED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads."""
    EACH: gl.constexpr = HEADS // GROUPS // SPLITS
    chunk, part = gl.program_id(0) // (GROUPS * SPLITS), gl.program_id(0) % (GROUPS * SPLITS)
    group, split, head = part // SPLITS, part % SPLITS, part * EACH
    start, end = gl.load(chunks + 2 * chunk), gl.load(chunks + 2 * chunk + 1)
    sequence, first = start // length, start % length
    us = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, P], x.layout)
    dus = gl.allocate_shared_memory(x.dtype, [STAGES, 1, BLOCK, P], dy.layout)
    tile: gl.constexpr = gl.NVMMASharedLayout(4 * HALF, 16, 2)
    ks = two_stacks(x.dtype, STAGES, BLOCK, 2 * HALF, tile)
    qs = two_stacks(x.dtype, STAGES, BLOCK, 2 * HALF, tile)
    hs, dhs = two_stacks(x.dtype, 2 * STAGES, P, 2 * HALF, tile)
    bases = gl.allocate_shared_memory(x.dtype, [4, BLOCK, 2 * HALF], B.layout)
    pairs = gl.allocate_shared_memory(x.dtype, [BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    answered = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], steps.layout), room_for_totals(STAGES)
    gained = room_for_square(), room_for_totals(2)
    rooms, rooms2 = _room_for_biases(HALF), _room_for_biases(HALF)
    sums, weighted, owns, dts = _numbers(steps, STAGES, BLOCK)
    bs, bs2 = _biases(steps, HALF, STAGES), _biases(steps, HALF, STAGES)
    cs = gl.allocate_shared_memory(cos.dtype, [STAGES, BLOCK, HALF], cos.layout)
    ss = gl.allocate_shared_memory(cos.dtype, [STAGES, BLOCK, HALF], cos.layout)
    full, angled, empty = barriers_of(STAGES, 1), barriers_of(STAGES, 1), barriers_of(STAGES, 3)
    made, asked = barriers_of(STAGES, 1), barriers_of(STAGES, 1)
    weighed, free, ready = barriers_of(1, 1), barriers_of(1, 2), barriers_of(1, 1)
    fence_async_shared()
    tiles, vectors = (us, dus, ks, qs, hs, dhs), (sums, weighted, owns, dts, cs, ss, bs, bs2)
    tensors = (x, dy, steps, B, C, entering, leaving, cos, sin, B_bias, C_bias)
    gl.warp_specialize(
        [
            (_inputs, (tiles, vectors, pairs, answered, gained, (full, empty, made, weighed, free, asked), dx, D,
                       ddecays, dscales, downs, dD, chunk, start, end, head, HEADS, EACH, P, DX, BLOCK, STAGES)),
            (_turning, (tiles, vectors, pairs, rooms, (full, angled, empty, made, weighed, free), dB, dC,
                        dB_bias, dC_bias, chunk, start, end, total, head, group, split,
                        HEADS, GROUPS, EACH, P, HALF, BLOCK, INTERLEAVED, STAGES)),
            (_standing, (tiles, vectors, pairs, answered, rooms2, (full, empty, made, weighed, free, asked),
                         dB, dC, dB_bias, dC_bias, chunk, start, end, total, head, group, split,
                         HEADS, GROUPS, EACH, P, HALF, BLOCK, INTERLEAVED, STAGES)),
            (_make, (tensors, tiles, vectors, (full, angled, empty, made, ready), bases, omega, later, domega,
                     ddt, chunk, sequence, first, start, end, total, head, group, part, omega_token,
                     HEADS, GROUPS, EACH, P, HALF, BLOCK, STAGES)),
        ],
        [4, 4, 4],
        [152, 112, 88],
    )  # fmt: skip
