"""The gradients of the trapezoid on a Hopper GPU: one kernel for all that a chunk says by itself.

Groups of four warps share the work of a program, which takes the heads of a chunk one after the other. One moves tiles
into shared memory ahead of time, makes cosines, sines, keys and queries of the next head, and sums gradients of angles.
One finds the gradients of inputs, and on the way what pairs of entries say to each other; with that one finds those of
the columns of B and C that turn, one those of the others, and what the entering state says of decays. So every tile is
read from memory once, and keys and queries are never written there. Sizes and tiles are those of
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
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
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
from everstate.ops.trapezoid.triton_hopper_angles import ones_up_to, trig_by_products
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
from everstate.ops.trapezoid.triton_keys import DT, NUMBERS, OWN, SCALE, SUM, WEIGHTED
from everstate.ops.trapezoid.triton_values import InputGradients, KeyGradients
from everstate.ops.triton_hopper import (
    COLUMN,
    ROW,
    SQUARE,
    VECTOR,
    barriers_of,
    halves_of,
    in_parts,
    inner,
    load_tile,
    recast,
    tiles_of,
    trace,
    widened,
)
from everstate.ops.triton_launch import Form, Tiles, launch
from everstate.ops.triton_segments import CHUNK

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call

_BOTH = gl.NVMMASharedLayout(0, 32, 2)
"""How both biases of a head lie in shared memory."""
_NUMBERS = Form(SCALE.value * CHUNK, layout=VECTOR)
"""Numbers per token of a head, but the last."""


def gradients(
    call: Call, dy: Tensor, entering: Tensor, leaving: Tensor, angles: Tensor, splits: int, into: Tensor | None
) -> tuple[InputGradients, KeyGradients]:
    """Those of inputs; those of B, C and omega, by part of the heads, and of dt, given the phases before each chunk and
    what later ones say of angles. That of x is written `into` memory of the caller, if there is such.

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
        rows(call, call.x), rows(call, dy.squeeze(1)), _numbers_of(steps), tiles_of(call.B, 2), tiles_of(call.C, 2),
        halves_of(entering), halves_of(leaving), _angles_of(angles), _biases_of(call.B_bias, call.C_bias), call.D,
        call.rates, inputs.x, inputs.decays, inputs.scales, inputs.owns, inputs.D, dB, dC, dB_bias, dC_bias, domega,
        ddt, call.plan.chunks, total, call.length,
        **sizes_of(call), SPLITS=splits, DX=dx.stride(0), INTERLEAVED=call.interleaved, STAGES=2,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return inputs, KeyGradients(dB, dC, dB_bias, dC_bias, domega, ddt)


def _numbers_of(steps: Tensor) -> Tiles:
    """Those of a head."""
    return Tiles(steps, (steps.numel(),), (1,), _NUMBERS)


@cache
def _form_of_angles(pairs: int) -> Form:
    return Form(2 * pairs, layout=VECTOR)


def _angles_of(t: Float[Tensor, "chunks h 2 s"]) -> Tiles:
    """Phases before a chunk, and what later ones say of angles, of a head."""
    return Tiles(t, (t.numel(),), (1,), _form_of_angles(t.shape[-1]))


@cache
def _form_of_biases(width: int) -> Form:
    return Form(2, width, layout=_BOTH)


def _biases_of(B: Tensor | None, C: Tensor | None) -> Tiles | None:
    """Both biases of a head; they are one tensor."""
    if B is None or C is None:
        return None
    return Tiles(B, (2, B.numel()), (B.numel(), 1), _form_of_biases(B.shape[-1]))


@gluon.jit
def _ask(tensors, tiles, bar, at, place, sequence, start, head, P: gl.constexpr):
    """Inputs, their gradients and states of a head, into their places."""
    x, dy, _, _, _, entering, leaving, _, _ = tensors
    us, dus, _, hs, dhs = tiles
    mbarrier.expect(bar, 2 * x.block_type.nbytes + 2 * entering.block_type.nbytes)
    load_tile(x, [sequence, start, head * P], bar, us.index(at))
    load_tile(dy, [sequence, start, head * P], bar, dus.index(at))
    load_tile(entering, [0, place * P, 0], bar, _room_for_halves(hs, at, entering))
    load_tile(leaving, [0, place * P, 0], bar, _room_for_halves(dhs, at, leaving))


@gluon.jit
def _room_for_halves(tiles, at, tensor):
    """Two tiles of a stack as the copy engine fills them with both halves of a state."""
    both: gl.constexpr = [tiles.shape[0] // 2, 2, tiles.shape[1], tiles.shape[2]]
    return recast(tiles, tiles.dtype, both, tensor.layout).index(at)


@gluon.jit
def _ask_numbers(tensors, vectors, bar, at, place, head, HALF: gl.constexpr, BLOCK: gl.constexpr):
    """Numbers per token of a head, those of its angles, and its biases."""
    steps, angles, biases = tensors[2], tensors[7], tensors[8]
    numbers, turns, _, _, bs = vectors
    line = recast(numbers, gl.float32, [numbers.shape[0] // SCALE, SCALE * BLOCK], VECTOR)
    given: gl.constexpr = 0 if biases is None else biases.block_type.nbytes
    mbarrier.expect(bar, steps.block_type.nbytes + angles.block_type.nbytes + given)
    load_tile(steps, [place * (NUMBERS * BLOCK)], bar, line.index(at))
    load_tile(angles, [place * (2 * HALF)], bar, turns.index(at))
    if biases is not None:
        load_tile(biases, [0, head * (4 * HALF)], bar, bs.index(at))


@gluon.jit
def _turn(bases, biases, cs, ss, keys, at, HALF: gl.constexpr, half: gl.constexpr, STAGES: gl.constexpr):
    """The keys of a head from B, and queries from C, by 32 rows; `biases` are those of all heads, if there are any.

    One loop, whose instructions are fetched once: written out they take longer.
    """
    dtype: gl.constexpr = bases.dtype
    side: gl.constexpr = gl.SliceLayout(0, half)
    bases = recast(bases, dtype, [8, 32, 2 * HALF], bases.layout)
    cs = recast(cs, cs.dtype, [2 * STAGES, 32, HALF], cs.layout)
    ss = recast(ss, ss.dtype, [2 * STAGES, 32, HALF], ss.layout)
    turning = recast(keys[0], dtype, [4 * STAGES, 32, 2 * HALF], keys[0].layout)
    standing = recast(keys[1], dtype, [4 * STAGES, 32, 2 * HALF], keys[1].layout)
    for piece in range(4):
        kind, part = piece // 2, piece % 2
        room = (kind * STAGES + at) * 2 + part
        c, s = trig(cs.index(2 * at + part), half), trig(ss.index(2 * at + part), half)
        a, b = halves(widened(bases.index(4 * kind + part).load(half)), HALF, half)
        still = bases.index(4 * kind + 2 + part).load(half)
        if biases is not None:
            fine = recast(biases, gl.float32, [8 * STAGES, HALF], VECTOR)
            wide = recast(biases, gl.float32, [4 * STAGES, 2 * HALF], VECTOR)
            mine = 2 * at + kind
            a += fine.index(4 * mine).load(side)[None, :]
            b += fine.index(4 * mine + 1).load(side)[None, :]
            still = (widened(still) + wide.index(2 * mine + 1).load(side)[None, :]).to(dtype)
        turned = gl.join((a * c - b * s).to(dtype), (a * s + b * c).to(dtype))
        turning.index(room).store(turned.permute((0, 2, 1)).reshape([32, 2 * HALF]))
        standing.index(room).store(still)


@gluon.jit
def trig(tile, layout: gl.constexpr):
    """Cosines or sines, which are float16."""
    return tile.load(layout).to(gl.float32)


@gluon.jit
def _make_next(
    bases, keys, vectors, barriers, rate, total, biases, step, HALF: gl.constexpr, half: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and queries of a head, once what they are made of is there."""
    told, made = barriers
    numbers, turns, cs, ss, bs = vectors
    narrow: gl.constexpr = rate.type.layout
    at = step % STAGES
    mbarrier.wait(told.index(at), step // STAGES & 1)
    dt = numbers.index(SCALE * at + DT).load(gl.SliceLayout(1, narrow))
    phases = recast(turns, gl.int32, [2 * STAGES, HALF], VECTOR).index(2 * at).load(gl.SliceLayout(0, narrow))
    trig_by_products(cs.index(at), ss.index(at), dt, rate, phases, total)
    _turn(bases, None if biases is None else bs, cs, ss, keys, at, HALF, half, STAGES)
    fence_async_shared()
    mbarrier.arrive(made.index(at), count=1)


@gluon.jit
def _add_turns(angles, step, rate, drate, later, ddt, total, dtype: gl.constexpr):
    """Gradients of the rates and of dt: a turn moves all angles from its token on, so they are sums from the right."""
    cs, ss = angles
    narrow: gl.constexpr = rate.type.layout
    BLOCK: gl.constexpr = rate.shape[0]
    t = gl.arange(0, BLOCK, gl.SliceLayout(1, narrow))
    dturn = gl.zeros(rate.shape, gl.float32, narrow) + later[None, :]
    ones = ones_up_to(total, dtype, narrow, BLOCK, True)
    dturn = warpgroup_mma(ones, _part(cs, dtype), dturn, is_async=True)
    dturn = warpgroup_mma(ones, _part(ss, dtype), dturn, is_async=True)
    dturn = warpgroup_mma_wait(0, (dturn,))
    gl.store(ddt + t, gl.sum(dturn * rate, 1))
    return drate + dturn * step[:, None]


@gluon.jit
def _leave_angles(dphi, cs, ss, dtype: gl.constexpr):
    """Leave gradients of angles in two parts of 16 bits, in the place of cosines and sines, which all have read."""
    coarse, fine = in_parts(dphi, dtype)
    _part(cs, dtype).store(coarse)
    _part(ss, dtype).store(fine)


@gluon.jit
def _part(tile, dtype: gl.constexpr):
    """Room for cosines or sines as room for a part of gradients of angles."""
    return recast(tile, dtype, tile.shape, tile.layout)


@gluon.jit
def _make(
    tensors, tiles, vectors, barriers, bases, rates, domega, ddt,
    chunk, sequence, first, start, end, total, head, group, part,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: what belongs to each head, as soon as there is room; its keys and queries; the gradient of omega."""
    full, told, empty, made, ready = barriers
    half: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    side: gl.constexpr = gl.SliceLayout(1, narrow)
    top: gl.constexpr = gl.SliceLayout(0, narrow)
    numbers, turns, cs, ss, _ = vectors
    keys, B, C, biases = tiles[2], tensors[3], tensors[4], tensors[8]
    later = recast(turns, gl.float32, [2 * STAGES, HALF], VECTOR)
    dtype: gl.constexpr = B.dtype
    row = (chunk * GROUPS + group) * BLOCK
    mbarrier.expect(ready.index(0), 4 * B.block_type.nbytes)
    for own in gl.static_range(2):
        load_tile(B, [row, own * 2 * HALF], ready.index(0), bases.index(own))
        load_tile(C, [row, own * 2 * HALF], ready.index(0), bases.index(2 + own))
    for step in gl.static_range(STAGES if EACH > 1 else 1):
        _ask_numbers(tensors, vectors, told.index(step), step, chunk * HEADS + head + step, head + step, HALF, BLOCK)
        _ask(tensors, tiles, full.index(step), step, chunk * HEADS + head + step, sequence, first, head + step, P)
    t, n = gl.arange(0, BLOCK, side), gl.arange(0, HALF, top)
    rate = gl.load(rates + (chunk.to(gl.int64) * (BLOCK * HALF) + (t[:, None] * HALF + n[None, :])))
    drate = gl.zeros((BLOCK, HALF), gl.float32, narrow)
    ddt += (chunk * HEADS + head) * BLOCK
    mbarrier.wait(ready.index(0), 0)
    _make_next(bases, keys, vectors, (told, made), rate, total, biases, 0, HALF, half, STAGES)
    for step in range(1, EACH):
        _make_next(bases, keys, vectors, (told, made), rate, total, biases, step, HALF, half, STAGES)
        before, place = (step - 1) % STAGES, chunk * HEADS + head + step
        mbarrier.wait(empty.index(before), (step - 1) // STAGES & 1)
        dt, after = numbers.index(SCALE * before + DT).load(side), later.index(2 * before + 1).load(top)
        if step + 1 < EACH:
            _ask_numbers(tensors, vectors, told.index(before), before, place + 1, head + step + 1, HALF, BLOCK)
            _ask(tensors, tiles, full.index(before), before, place + 1, sequence, first, head + step + 1, P)
        drate = _add_turns((cs.index(before), ss.index(before)), dt, rate, drate, after, ddt + (step - 1) * BLOCK,
                           total, dtype)  # fmt: skip
    last: gl.constexpr = (EACH - 1) % STAGES
    mbarrier.wait(empty.index(last), (EACH - 1) // STAGES & 1)
    dt, after = numbers.index(SCALE * last + DT).load(side), later.index(2 * last + 1).load(top)
    drate = _add_turns((cs.index(last), ss.index(last)), dt, rate, drate, after,
                       ddt + (EACH - 1) * BLOCK, total, dtype)  # fmt: skip
    _store_rows(domega + (part.to(gl.int64) * total + start) * HALF, drate, start, end, HALF, narrow)


@gluon.jit
def _store_rows(out, value, start, end, stride, layout: gl.constexpr):
    """Rows of a chunk, those that exist."""
    t = gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    n = gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    gl.store(out + (t[:, None] * stride + n[None, :]), value.to(out.dtype.element_ty), mask=(start + t < end)[:, None])


@gluon.jit
def _weights(numbers, at, BLOCK: gl.constexpr):
    """What i receives from j `[j, i]`, strictly before it; and the sums at the end and of each j."""
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    later, earlier = numbers.index(SCALE * at + SUM).load(COLUMN), numbers.index(SCALE * at + WEIGHTED).load(ROW)
    weights = gl.where(i[None, :] > j[:, None], gl.exp2(later[None, :] - earlier[:, None]), 0.0)
    return weights, _last(numbers, at, BLOCK), earlier


@gluon.jit
def _last(numbers, at, BLOCK: gl.constexpr):
    """The sum of the log decays of a chunk."""
    each = recast(numbers, gl.float32, [numbers.shape[0] * BLOCK, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return gl.sum(each.index((SCALE * at + SUM) * BLOCK + BLOCK - 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


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
    us, dus, ks, _, dhs = tiles
    numbers = vectors[0]
    full, told, empty, made, weighed, free, asked = barriers
    j = gl.arange(0, BLOCK, ROW)
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    for step in range(EACH):
        at = step % STAGES
        keys = both_at(ks, at)
        place = (chunk * HEADS + head + step).to(gl.int64)
        u, du = us.index(at).reshape([BLOCK, P]), dus.index(at).reshape([BLOCK, P])
        mbarrier.wait(full.index(at), step // STAGES & 1)
        received = warpgroup_mma(u, du.permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(told.index(at), step // STAGES & 1)
        decay, last, earlier = _weights(numbers, at, BLOCK)
        mbarrier.wait(made.index(at), step // STAGES & 1)
        product = meet(keys, both_at(ks, STAGES + at), none)
        own = numbers.index(SCALE * at + OWN).load(ROW)
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
        gl.store(dscales + place * BLOCK + j, gave * gl.exp2(earlier - numbers.index(SCALE * at + SUM).load(ROW)))
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
    us, dus, ks, hs, dhs = tiles
    numbers, _, cs, ss, _ = vectors
    full, told, empty, made, weighed, free = barriers
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
        mbarrier.wait(told.index(at), step // STAGES & 1)
        last = _last(numbers, at, BLOCK)
        weight = gl.exp2(last - numbers.index(SCALE * at + WEIGHTED).load(side))
        dk = warpgroup_mma_wait(0, (dk,)) * weight[:, None]
        mbarrier.wait(made.index(at), step // STAGES & 1)
        mbarrier.wait(weighed.index(0), step & 1)
        dk = warpgroup_mma(pairs, ks[0].index(STAGES + at), dk, is_async=True)
        dk = warpgroup_mma_wait(0, (dk,))
        dphi, db1, db2 = _turned_back(dk, ks[0].index(at), cs.index(at), ss.index(at), db1, db2, HALF, wide, narrow)
        dq = warpgroup_mma(du, hs.index(2 * at), nothing, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,)) * gl.exp2(numbers.index(SCALE * at + SUM).load(side))[:, None]
        dq = warpgroup_mma(pairs.permute((1, 0)), ks[0].index(at), dq, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(free.index(0), count=1)
        qs = ks[0].index(STAGES + at)
        dphi2, dc1, dc2 = _turned_back(dq, qs, cs.index(at), ss.index(at), dc1, dc2, HALF, wide, narrow)
        _leave_angles(dphi + dphi2, cs.index(at), ss.index(at), pairs.dtype)
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
def _vectors(BLOCK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Room for numbers per token, those of angles, cosines, sines and biases."""
    trig: gl.constexpr = gl.NVMMASharedLayout(2 * HALF, 16, 2)
    numbers = gl.allocate_shared_memory(gl.float32, [SCALE * STAGES, BLOCK], VECTOR)
    turns = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * HALF], VECTOR)
    cs = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK, HALF], trig)
    ss = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK, HALF], trig)
    return numbers, turns, cs, ss, gl.allocate_shared_memory(gl.float32, [STAGES, 2, 4 * HALF], _BOTH)


@gluon.jit
def _answer(tiles, du, numbers, last, answered, made, phase, at, STAGES: gl.constexpr):
    """What the state that enters says of decays, to the tokens and to the state that leaves."""
    ks, hs, dhs = tiles
    BLOCK: gl.constexpr = du.shape[0]
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    kept = across(hs, dhs, at, none)
    kept = trace(warpgroup_mma_wait(0, (kept,)))
    mbarrier.wait(made, phase)
    answers = meet(both_at(ks, STAGES + at), halves_at(hs, at), none)
    leave_total(answered[1].index(at), kept * gl.exp2(last))
    answers = warpgroup_mma_wait(0, (answers,))
    answered[0].index(at).store(inner(answers, du) * gl.exp2(numbers.index(SCALE * at + SUM).load(ROW)))


@gluon.jit
def _standing(
    tiles, vectors, pairs, answered, rooms, barriers, dB, dC, dB_bias, dC_bias, chunk, start, end, total, head, group,
    split, HEADS: gl.constexpr, GROUPS: gl.constexpr, EACH: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr,
    BLOCK: gl.constexpr, INTERLEAVED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: the gradients of the columns of B and C that stand still, summed over the heads; and what the
    entering state says of decays."""
    us, dus, ks, hs, dhs = tiles
    numbers = vectors[0]
    full, told, empty, made, weighed, free, asked = barriers
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
        mbarrier.wait(told.index(at), step // STAGES & 1)
        last = _last(numbers, at, BLOCK)
        _answer((ks, hs, dhs), du, numbers, last, answered, made.index(at), step // STAGES & 1, at, STAGES)
        mbarrier.arrive(asked.index(at), count=1)
        dk = warpgroup_mma(u, dhs.index(2 * at + 1), nothing, use_acc=False, is_async=True)
        weight = gl.exp2(last - numbers.index(SCALE * at + WEIGHTED).load(side))
        dk = warpgroup_mma_wait(0, (dk,)) * weight[:, None]
        mbarrier.wait(weighed.index(0), step & 1)
        dk = warpgroup_mma(pairs, ks[1].index(STAGES + at), dk, is_async=True)
        weight = gl.exp2(numbers.index(SCALE * at + SUM).load(side))
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
    x, dy, steps, B, C, entering, leaving, angles, biases, D, rates, dx, ddecays, dscales, downs, dD,
    dB, dC, dB_bias, dC_bias, domega, ddt, chunks, total, length,
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
    ks = two_stacks(x.dtype, 2 * STAGES, BLOCK, 2 * HALF, tile)  # keys, then queries
    hs, dhs = two_stacks(x.dtype, 2 * STAGES, P, 2 * HALF, tile)
    bases = gl.allocate_shared_memory(x.dtype, [4, BLOCK, 2 * HALF], B.layout)
    pairs = gl.allocate_shared_memory(x.dtype, [BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    answered = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], VECTOR), room_for_totals(STAGES)
    gained = room_for_square(), room_for_totals(2)
    rooms, rooms2 = _room_for_biases(HALF), _room_for_biases(HALF)
    vectors = _vectors(BLOCK, HALF, STAGES)
    full, told, empty = barriers_of(STAGES, 1), barriers_of(STAGES, 1), barriers_of(STAGES, 3)
    made, asked = barriers_of(STAGES, 1), barriers_of(STAGES, 1)
    weighed, free, ready = barriers_of(1, 1), barriers_of(1, 2), barriers_of(1, 1)
    fence_async_shared()
    tiles = (us, dus, ks, hs, dhs)
    tensors = (x, dy, steps, B, C, entering, leaving, angles, biases)
    gl.warp_specialize(
        [
            (_inputs, (tiles, vectors, pairs, answered, gained, (full, told, empty, made, weighed, free, asked), dx, D,
                       ddecays, dscales, downs, dD, chunk, start, end, head, HEADS, EACH, P, DX, BLOCK, STAGES)),
            (_turning, (tiles, vectors, pairs, rooms, (full, told, empty, made, weighed, free), dB, dC,
                        dB_bias, dC_bias, chunk, start, end, total, head, group, split,
                        HEADS, GROUPS, EACH, P, HALF, BLOCK, INTERLEAVED, STAGES)),
            (_standing, (tiles, vectors, pairs, answered, rooms2, (full, told, empty, made, weighed, free, asked),
                         dB, dC, dB_bias, dC_bias, chunk, start, end, total, head, group, split,
                         HEADS, GROUPS, EACH, P, HALF, BLOCK, INTERLEAVED, STAGES)),
            (_make, (tensors, tiles, vectors, (full, told, empty, made, ready), bases, rates, domega,
                     ddt, chunk, sequence, first, start, end, total, head, group, part,
                     HEADS, GROUPS, EACH, P, HALF, BLOCK, STAGES)),
        ],
        [4, 4, 4],
        [152, 104, 104],
    )  # fmt: skip
