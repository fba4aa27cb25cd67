"""The trapezoid backwards on a GPU: every chunk by itself, given the state that enters it and what comes back of it.

Matrices over pairs of entries are transposed, `[j, i]` for what i receives from j.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.ops.trapezoid.triton_keys import (
    DT,
    NUMBERS,
    OWN,
    SCALE,
    SUM,
    WEIGHTED,
    across,
    by_rank,
    by_token,
    entries,
    factors,
    load_entries,
    load_factors,
    load_inputs,
    load_step,
    load_tile,
    load_tiles,
    make_keys,
    make_trig,
    still_keys,
    store_entries,
    turning_keys,
)
from everstate.ops.trapezoid.triton_values import InputGradients
from everstate.ops.triton_common import dot, sum_of
from everstate.ops.triton_launch import launch
from everstate.ops.triton_segments import only

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call


@triton.jit
def inputs_kernel(
    x, mimo_x, dy, steps, omega, phases, B, C, B_bias, C_bias, D, entering, leaving,
    dx, ddecays, dscales, downs, dmimo_x, dD, chunks, x_token, x_head, dy_token, dy_rank, dy_head, omega_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and head: the gradients of x, its factors, D, the decays, scales and own weights."""
    chunk, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    DTYPE: tl.constexpr = x.dtype.element_ty
    ENTRIES: tl.constexpr = TOKENS * RANKS
    place, p, entry = chunk * HEADS + head, tl.arange(0, BLOCK_P), tl.arange(0, ENTRIES)
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    rows, token = entries(start, end, TOKENS, RANK, RANKS), entry // RANKS
    row = (chunk * GROUPS + head // (HEADS // GROUPS)) * ENTRIES
    trig = make_trig(steps, omega, phases, place, rows, end, omega_token, TOKENS, RANKS, PAIRS, HALF)
    k = make_keys(B, row, B_bias, trig, rows[2], head, RANK, STILL, DTYPE)
    dh = load_tiles(leaving, place * BLOCK_P, BLOCK_P, HALF, STILL)
    u = load_inputs(x, mimo_x, rows, head, p, x_token, x_head, P, RANK, RANKS)
    h = load_tiles(entering, place * BLOCK_P, BLOCK_P, HALF, STILL)
    du = load_entries(dy + head * dy_head, rows, p, dy_token, dy_rank, P)
    sums, weighted = load_step(steps, place, token, TOKENS, SUM), load_step(steps, place, token, TOKENS, WEIGHTED)
    last = load_step(steps, place, TOKENS - 1, TOKENS, SUM)
    # The gradient of x, first as far as it went through the state.
    dinput = across(k, dh, STILL, PRECISION) * tl.exp2(last - weighted)[:, None]
    dlast = sum_of(dinput * u.to(tl.float32))
    inner = tl.where(p[:, None] == p[None, :], across(h, dh, STILL, PRECISION), 0.0)
    dlast += tl.exp2(last) * sum_of(inner)
    q = make_keys(C, row, C_bias, trig, rows[2], head, RANK, STILL, DTYPE)
    received = across(q, h, STILL, PRECISION) * tl.exp2(sums)[:, None]
    product = across(k, q, STILL, PRECISION)
    later = token[None, :] > token[:, None]
    weights = (product * tl.where(later, tl.exp2(sums[None, :] - weighted[:, None]), 0.0)).to(DTYPE)
    dinput = dot(weights, du, dinput, PRECISION)
    # How much a larger sum of decays would change: all that an entry received, less all that it gave. Both sides with
    # the same rounded weights: then two entries of the same decay cancel, as they must.
    gave = tl.sum(dinput * u.to(tl.float32), 1)
    received = dot(tl.trans(weights), u, received, PRECISION)
    ddecay = tl.sum(received * du.to(tl.float32), 1) - gave
    scale = load_step(steps, place, token, TOKENS, SCALE)
    dinput, down = _add_own(dinput, product, u, du, steps, D, dD, place, head, token, TOKENS, RANK, PRECISION)
    tokens = tl.arange(0, TOKENS)
    at = place * TOKENS + tokens
    tl.store(ddecays + at, by_token(ddecay, RANKS) + tl.where(tokens == TOKENS - 1, dlast, 0.0))
    tl.store(dscales + at, by_token(gave / scale, RANKS))
    tl.store(downs + at, by_token(down, RANKS))
    _store_input_gradients(
        x, mimo_x, dx, dmimo_x, dinput, place, rows, end, head, p, x_token, x_head, HEADS, P, RANK, RANKS
    )


@triton.jit
def _add_own(
    dinput, product, u, du, steps, D, dD, place, head, token,
    TOKENS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what inputs gave to the outputs of their own token, and through D; with the gradients of own weights."""
    own = load_step(steps, place, token, TOKENS, OWN)
    if RANK == 1:
        mine = tl.sum(tl.where(token[:, None] == token[None, :], product, 0.0), 1)
        both = tl.sum(u.to(tl.float32) * du.to(tl.float32), 1)
        down = mine * both
        mine *= own
        if D is not None:
            mine += tl.load(D + head).to(tl.float32)
            tl.store(dD + place, tl.sum(both, 0))
        dinput += mine[:, None] * du.to(tl.float32)
    else:
        mine = tl.where(token[:, None] == token[None, :], product, 0.0)
        down = tl.sum(mine * dot(u, tl.trans(du), None, PRECISION), 1)
        dinput = dot((mine * own[:, None]).to(u.dtype), du, dinput, PRECISION)
        if D is not None:
            dinput += tl.load(D + head).to(tl.float32) * du.to(tl.float32)
            tl.store(dD + place, tl.sum(tl.sum(u.to(tl.float32) * du.to(tl.float32), 1), 0))
    return dinput, down


@triton.jit
def _store_input_gradients(
    x, mimo_x, dx, dmimo_x, dinput, place, rows, end, head, p, x_token, x_head,
    HEADS: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """From the gradient of each rank's input to those of x and the factors."""
    start, _, _, inside = rows
    if mimo_x is not None:
        raw = load_inputs(x, None, rows, head, p, x_token, x_head, P, RANK, RANKS).to(tl.float32)
        ranks = tl.arange(0, RANKS)
        at = dmimo_x + place * (RANK * P) + (ranks[:, None] * P + p[None, :])
        tl.store(at, by_rank(dinput * raw, RANKS), mask=(ranks < RANK)[:, None] & (p < P)[None, :])
        dinput *= load_factors(mimo_x, head, p, dinput.shape[0], P, RANK, RANKS)
    tokens = tl.arange(0, dinput.shape[0] // RANKS)
    out = dx + start.to(tl.int64) * (HEADS * P) + head * P + ((tokens * (HEADS * P))[:, None] + p[None, :])
    mask = (start + tokens < end)[:, None] & (p < P)[None, :]
    if RANK != RANKS:
        dinput = tl.where(inside[:, None], dinput, 0.0)
    tl.store(out, by_token(dinput, RANKS).to(dx.dtype.element_ty), mask=mask)


def rank_gradients(
    call: "Call", du: Float[Tensor, "t r h p"], numbers: Float[Tensor, "numbers chunks h e"], dD: Tensor | None
) -> InputGradients:
    """Gradients of inputs, decays, scales and own weights from those of entries."""
    count, steps = len(call.plan.chunks), call.steps
    dx = call.x.new_empty(call.batch * call.length, call.heads, call.headdim)
    sums = steps.new_empty(3, count, call.heads, call.tokens)
    dmimo_x = None if call.mimo_x is None else steps.new_empty(count, call.heads, call.rank, call.headdim)
    launch(
        ranks_kernel, (count * call.heads,),
        call.x, call.mimo_x, du, numbers, dx, sums, dmimo_x, call.plan.chunks, count, *call.x.stride()[:2],
        **only(call.sizes, ranks_kernel), BLOCK_P=call.block_p, num_warps=2, num_stages=1,
    )  # fmt: skip
    return InputGradients(dx, sums[0], sums[1], sums[2], dmimo_x, dD)


@triton.jit
def ranks_kernel(
    x, mimo_x, du, numbers, dx, sums, dmimo_x, chunks, count, x_token, x_head,
    HEADS: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per chunk and head: from the gradients of entries to those of x and its factors, and sums over the
    ranks of three numbers."""
    chunk, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    place, p = chunk * HEADS + head, tl.arange(0, BLOCK_P)
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    rows = entries(start, end, TOKENS, RANK, RANKS)
    dinput = load_entries(du + head * P, rows, p, RANK * HEADS * P, HEADS * P, P).to(tl.float32)
    _store_input_gradients(
        x, mimo_x, dx, dmimo_x, dinput, place, rows, end, head, p, x_token, x_head, HEADS, P, RANK, RANKS
    )
    entry, token = tl.arange(0, TOKENS * RANKS), tl.arange(0, TOKENS)
    for number in tl.static_range(3):
        each = tl.load(numbers + (number * count * HEADS + place) * (TOKENS * RANKS) + entry)
        tl.store(sums + (number * count * HEADS + place) * TOKENS + token, by_token(each, RANKS))


@triton.jit
def keys_kernel(
    x, mimo_x, dy, steps, omega, phases, B, C, B_bias, C_bias, entering, leaving, dB, dC, dB_bias, dC_bias, dangles,
    chunks, x_token, x_head, dy_token, dy_rank, dy_head, omega_token, total,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads: with TURN the gradients of the columns of B, C (summed over
    heads) and biases (to be summed over chunks) that turn, and of angles; without it those of the others."""
    EACH: tl.constexpr = HEADS // GROUPS // SPLITS
    ENTRIES: tl.constexpr = TOKENS * RANKS
    WIDTH: tl.constexpr = 2 * HALF + STILL
    FIRST: tl.constexpr = 0 if TURN else 2 * HALF
    SIZE: tl.constexpr = HALF if TURN else STILL
    part = tl.program_id(0) % (GROUPS * SPLITS) + tl.program_id(1)  # + 0: a loop for one head, too (kernels.md, traps)
    chunk, group, split = (tl.program_id(0) // (GROUPS * SPLITS)).to(tl.int64), part // SPLITS, part % SPLITS
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    rows, p, entry = entries(start, end, TOKENS, RANK, RANKS), tl.arange(0, BLOCK_P), tl.arange(0, ENTRIES)
    token, n, row = entry // RANKS, tl.arange(0, SIZE), (chunk * GROUPS + group) * ENTRIES
    db = tl.zeros((ENTRIES, SIZE), tl.float32)
    db2, dc, dc2 = tl.zeros_like(db), tl.zeros_like(db), tl.zeros_like(db)
    for head in range(part * EACH, (part + 1) * EACH):  # group by group, split by split
        place = chunk * HEADS + head
        u = load_inputs(x, mimo_x, rows, head, p, x_token, x_head, P, RANK, RANKS)
        du = load_entries(dy + head * dy_head, rows, p, dy_token, dy_rank, P)
        weights, gave, took = _weigh(u, du, steps, place, token, TOKENS, PRECISION)
        c, s = 1.0, 0.0  # what stands still asks for neither
        if TURN:
            c, s = make_trig(steps, omega, phases, place, rows, end, omega_token, TOKENS, RANKS, PAIRS, HALF)
        k, k2 = _some_keys(B, row, B_bias, (c, s), rows[2], head, RANK, HALF, STILL, u.dtype, TURN)
        q, q2 = _some_keys(C, row, C_bias, (c, s), rows[2], head, RANK, HALF, STILL, u.dtype, TURN)
        dk, dq = _columns(u, du, weights, gave, took, k, q, entering, leaving, place, FIRST, WIDTH, PRECISION)
        if TURN:
            dk2, dq2 = _columns(u, du, weights, gave, took, k2, q2, entering, leaving, place, HALF, WIDTH, PRECISION)
            _store_angle_gradients(dangles + place * (ENTRIES * HALF), k, q, k2, q2, dk, dq, dk2, dq2)
            dk, dk2, dq, dq2 = dk * c + dk2 * s, dk2 * c - dk * s, dq * c + dq2 * s, dq2 * c - dq * s
            db2 += dk2
            dc2 += dq2
            _store_bias_gradient(dB_bias, dk2, place, HALF, u.dtype, RANK, RANKS, WIDTH, PRECISION)
            _store_bias_gradient(dC_bias, dq2, place, HALF, u.dtype, RANK, RANKS, WIDTH, PRECISION)
        db += dk
        dc += dq
        _store_bias_gradient(dB_bias, dk, place, FIRST, u.dtype, RANK, RANKS, WIDTH, PRECISION)
        _store_bias_gradient(dC_bias, dq, place, FIRST, u.dtype, RANK, RANKS, WIDTH, PRECISION)
    base = (split.to(tl.int64) * total * (RANK * GROUPS) + group) * WIDTH + FIRST
    store_entries(dB + base, rows, n, GROUPS * WIDTH, db, SIZE, RANK)
    store_entries(dC + base, rows, n, GROUPS * WIDTH, dc, SIZE, RANK)
    if TURN:
        store_entries(dB + base + HALF, rows, n, GROUPS * WIDTH, db2, SIZE, RANK)
        store_entries(dC + base + HALF, rows, n, GROUPS * WIDTH, dc2, SIZE, RANK)


@triton.jit
def _some_keys(
    source, row, bias, trig, rank, head, RANK: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr,
    DTYPE: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Both parts of the columns that turn; or those that stand still, which are one."""
    if TURN:
        first, second = turning_keys(source, row, bias, trig, rank, head, RANK, STILL, DTYPE)
    else:
        first = still_keys(source, row, bias, rank, head, RANK, HALF, STILL, DTYPE)
        second = first
    return first, second


@triton.jit
def _store_angle_gradients(out, k, q, k2, q2, dk, dq, dk2, dq2):
    """Of each entry and pair. With keys and queries as the products had them, rounded, what two entries say to each
    other cancels."""
    dangle = dk2 * k.to(tl.float32) - dk * k2.to(tl.float32)
    dangle += dq2 * q.to(tl.float32) - dq * q2.to(tl.float32)
    entry, pair = tl.arange(0, k.shape[0]), tl.arange(0, k.shape[1])
    tl.store(out + (entry[:, None] * k.shape[1] + pair[None, :]), dangle)


@triton.jit
def _weigh(u, du, steps, place, token, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
    """What takes queries to the gradients of keys, `[j, i]`; what of an input the state after the chunk keeps, and how
    much of the state before it an entry reads."""
    sums, own = load_step(steps, place, token, TOKENS, SUM), load_step(steps, place, token, TOKENS, OWN)
    weighted = load_step(steps, place, token, TOKENS, WEIGHTED)
    last = load_step(steps, place, TOKENS - 1, TOKENS, SUM)
    given = factors(sums[None, :], weighted[:, None], own[:, None], token[None, :], token[:, None])
    weights = (dot(u, tl.trans(du), None, PRECISION) * given).to(u.dtype)
    return weights, tl.exp2(last - weighted)[:, None], tl.exp2(sums)[:, None]


@triton.jit
def _columns(
    u, du, weights, gave, took, k, q, entering, leaving, place,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of some columns of keys and queries, as they were turned: of those from FIRST on."""
    SIZE: tl.constexpr = k.shape[1]
    BLOCK_P: tl.constexpr = u.shape[1]
    dh = load_tile(leaving, place * BLOCK_P, FIRST, BLOCK_P, SIZE, WIDTH)
    dk = dot(weights, q, dot(u, dh, None, PRECISION) * gave, PRECISION)
    h = load_tile(entering, place * BLOCK_P, FIRST, BLOCK_P, SIZE, WIDTH)
    dq = dot(tl.trans(weights), k, dot(du, h, None, PRECISION) * took, PRECISION)
    return dk, dq


@triton.jit
def _store_bias_gradient(
    out, gradient, place, FIRST: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens of each rank, as a product: a sum over rows would take three times the instructions."""
    if out is not None:
        LEAST: tl.constexpr = 32 if tl.float32 == DTYPE else 16
        row, entry, n = tl.arange(0, LEAST), tl.arange(0, gradient.shape[0]), tl.arange(0, gradient.shape[1])
        mine = tl.where(row[:, None] == (entry % RANKS)[None, :], 1.0, 0.0).to(DTYPE)
        total = dot(mine, gradient.to(DTYPE), None, PRECISION)
        at = out + place * (RANK * WIDTH) + FIRST + (row[:, None] * WIDTH + n[None, :])
        tl.store(at, total, mask=(row < RANK)[:, None])


@triton.jit
def turn_gradients_kernel(
    dangles, steps, omega, later, ddt, domega, chunks, omega_token, total,
    HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per chunk and part of the heads: a turn moves all angles from its token on, so its gradient is a sum
    from the right; a product with ones, in two parts of 16 bits, is the cheapest way to it."""
    EACH: tl.constexpr = HEADS // SPLITS
    chunk, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    tokens, pairs = tl.arange(0, BLOCK), tl.arange(0, HALF)
    here, given = (tokens < TOKENS)[:, None], (pairs < PAIRS)[None, :]
    exists = (here & (start + tokens < end)[:, None]) & given
    at = omega + start.to(tl.int64) * omega_token + (tokens[:, None] * omega_token + pairs[None, :])
    rate = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    ones = tl.where(tokens[:, None] <= tokens[None, :], 1.0, 0.0).to(DTYPE)
    drate = tl.zeros((BLOCK, HALF), tl.float32)
    for head in range(split * EACH, (split + 1) * EACH):
        place = chunk * HEADS + head
        row = dangles + place * (TOKENS * RANKS * HALF) + (tokens[:, None] * (RANKS * HALF) + pairs[None, :])
        dangle = tl.load(row, mask=here, other=0.0)
        for rank in tl.static_range(1, RANKS):
            dangle += tl.load(row + rank * HALF, mask=here, other=0.0)
        coarse = dangle.to(DTYPE)
        dturn = dot(ones, coarse, None, PRECISION)
        if tl.float32 != DTYPE:
            dturn = dot(ones, (dangle - coarse.to(tl.float32)).to(DTYPE), dturn, PRECISION)
        dturn += tl.load(later + place * PAIRS + pairs, mask=pairs < PAIRS, other=0.0)[None, :]
        tl.store(ddt + place * TOKENS + tokens, tl.sum(dturn * rate, 1), mask=tokens < TOKENS)
        dt = tl.load(steps + place * (NUMBERS * TOKENS) + DT * TOKENS + tokens, mask=tokens < TOKENS, other=0.0)
        drate += dturn * dt[:, None]
    out = domega + (split.to(tl.int64) * total + start) * PAIRS + (tokens[:, None] * PAIRS + pairs[None, :])
    tl.store(out, drate, mask=exists)
