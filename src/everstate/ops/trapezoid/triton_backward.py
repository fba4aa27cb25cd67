"""The trapezoid backwards on a GPU: every chunk by itself, given the state that enters it and what comes back of it.

Matrices over pairs of entries are transposed, `[j, i]` for what i receives from j.
"""

import triton
import triton.language as tl

from everstate.ops.trapezoid.triton_keys import (
    DT,
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
    load_halves,
    load_inputs,
    load_part,
    load_rates,
    load_step,
    paired,
    pairs_of,
    still,
    store_entries,
    turned,
    turning,
)
from everstate.ops.triton_common import dot


@triton.jit
def inputs_kernel(
    x, mimo_x, dy, steps, omega, phases, B, C, B_bias, C_bias, D, entering, leaving,
    dx, ddecays, dscales, downs, dmimo_x, dD, chunks,
    x_token, x_head, dy_token, dy_rank, dy_head, omega_token, B_token, B_rank, B_group, C_token, C_rank, C_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and head: the gradients of x, its factors, D, the decays, scales and own weights."""
    chunk, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    DTYPE: tl.constexpr = x.dtype.element_ty
    place, p = chunk * HEADS + head, tl.arange(0, BLOCK_P)
    B += head // (HEADS // GROUPS) * B_group
    C += head // (HEADS // GROUPS) * C_group
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    rows, token = entries(start, end, TOKENS, RANK, RANKS), tl.arange(0, TOKENS * RANKS) // RANKS
    cos, sin = turning(steps, phases, omega, place, start, end, omega_token, TOKENS, RANKS, PAIRS, BLOCK_T)
    sums, scale = load_step(steps, place, token, TOKENS, SUM), load_step(steps, place, token, TOKENS, SCALE)
    last = load_step(steps, place, TOKENS - 1, TOKENS, SUM)
    k = turned(B, B_bias, rows, head, cos, sin, B_token, B_rank, N, RANK, RANKS, PAIRS, DTYPE)
    ks = still(B, B_bias, rows, head, B_token, B_rank, N, RANK, RANKS, PAIRS, BLOCK_S, DTYPE)
    u = load_inputs(x, mimo_x, rows, head, p, x_token, x_head, P, RANK, RANKS)
    # The gradient of s x, first as far as it went through the state.
    dh, dhs = load_halves(leaving + place * P * N, p, P, N, PAIRS, BLOCK_T, BLOCK_S)
    dadded = across(k, ks, dh, dhs, BLOCK_S, PRECISION) * tl.exp2(last - sums)[:, None]
    dscale = tl.sum(dadded * u.to(tl.float32), 1)
    h, hs = load_halves(entering + place * P * N, p, P, N, PAIRS, BLOCK_T, BLOCK_S)
    dlast = tl.sum(scale * dscale, 0) + tl.exp2(last) * _inner(h, hs, dh, dhs, BLOCK_S)
    q = turned(C, C_bias, rows, head, cos, sin, C_token, C_rank, N, RANK, RANKS, PAIRS, DTYPE)
    qs = still(C, C_bias, rows, head, C_token, C_rank, N, RANK, RANKS, PAIRS, BLOCK_S, DTYPE)
    du = load_entries(dy + head * dy_head, rows, p, dy_token, dy_rank, P)
    # How much a larger sum of decays would change: all that an entry received, less all that it gave.
    ddecay = tl.sum(across(q, qs, h, hs, BLOCK_S, PRECISION) * du.to(tl.float32), 1) * tl.exp2(sums)
    product = across(k, ks, q, qs, BLOCK_S, PRECISION)
    weights = product * factors(sums[None, :], sums[:, None], 0.0, token[None, :], token[:, None])
    received = dot(u, tl.trans(du), None, PRECISION)
    dscale += tl.sum(received * weights, 1)
    ddecay += tl.sum(received * weights * scale[:, None], 0) - scale * dscale
    mine = tl.where(token[:, None] == token[None, :], product, 0.0)
    tokens = tl.arange(0, TOKENS)
    at = place * TOKENS + tokens
    tl.store(ddecays + at, by_token(ddecay, RANKS) + tl.where(tokens == TOKENS - 1, dlast, 0.0))
    tl.store(dscales + at, by_token(dscale, RANKS))
    tl.store(downs + at, by_token(tl.sum(mine * received, 1), RANKS))
    own = load_step(steps, place, token, TOKENS, OWN)
    weights = (weights * scale[:, None] + mine * own[:, None]).to(DTYPE)
    dinput = dot(weights, du, dadded * scale[:, None], PRECISION)
    _store_input_gradients(
        x, mimo_x, D, dx, dmimo_x, dD, u, du, dinput, place, rows, end, head, p, x_token, x_head, HEADS, P, RANK, RANKS
    )


@triton.jit
def _inner(h, hs, dh, dhs, BLOCK_S: tl.constexpr):
    """The inner product of two states."""
    total = tl.sum(tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1), 0)
    if BLOCK_S > 0:
        total += tl.sum(tl.sum(hs.to(tl.float32) * dhs.to(tl.float32), 1), 0)
    return total


@triton.jit
def _store_input_gradients(
    x, mimo_x, D, dx, dmimo_x, dD, u, du, dinput, place, rows, end, head, p, x_token, x_head,
    HEADS: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """From the gradient of each rank's input, but for D, to those of x, the factors and D."""
    start, _, _, inside = rows
    if D is not None:
        dinput += tl.load(D + head).to(tl.float32) * du.to(tl.float32)
        tl.store(dD + place, tl.sum(tl.sum(u.to(tl.float32) * du.to(tl.float32), 1), 0))
    if mimo_x is not None:
        raw = load_inputs(x, None, rows, head, p, x_token, x_head, P, RANK, RANKS).to(tl.float32)
        ranks = tl.arange(0, RANKS)
        at = dmimo_x + place * (RANK * P) + (ranks[:, None] * P + p[None, :])
        tl.store(at, by_rank(dinput * raw, RANKS), mask=(ranks < RANK)[:, None] & (p < P)[None, :])
        dinput *= load_factors(mimo_x, head, p, u.shape[0], P, RANK, RANKS)
    tokens = tl.arange(0, u.shape[0] // RANKS)
    out = dx + start.to(tl.int64) * (HEADS * P) + head * P + ((tokens * (HEADS * P))[:, None] + p[None, :])
    mask = (start + tokens < end)[:, None] & (p < P)[None, :]
    tl.store(out, by_token(tl.where(inside[:, None], dinput, 0.0), RANKS).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def keys_kernel(
    x, mimo_x, dy, steps, omega, phases, B, C, B_bias, C_bias, entering, leaving,
    dB, dC, dB_bias, dC_bias, domega, ddt, dturns, chunks,
    x_token, x_head, dy_token, dy_rank, dy_head, omega_token, B_token, B_rank, B_group, C_token, C_rank, C_group, total,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads: with TURN the gradients of the columns of B, C (summed over
    heads) and biases (to be summed over chunks) that turn, of omega and angles; without it those of the others."""
    EACH: tl.constexpr = HEADS // GROUPS // SPLITS
    FIRST: tl.constexpr = 0 if TURN else 2 * PAIRS
    WIDTH: tl.constexpr = 2 * PAIRS if TURN else N - 2 * PAIRS
    chunk, part = (tl.program_id(0) // (GROUPS * SPLITS)).to(tl.int64), tl.program_id(0) % (GROUPS * SPLITS)
    group, split = part // SPLITS, part % SPLITS
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    rows, p = entries(start, end, TOKENS, RANK, RANKS), tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_T if TURN else BLOCK_S)
    db = tl.zeros((TOKENS * RANKS, n.shape[0]), tl.float32)
    dc, drate = tl.zeros_like(db), tl.zeros((TOKENS, BLOCK_T // 2), tl.float32)
    B, C = B + group * B_group, C + group * C_group
    for head in range(part * EACH, (part + 1) * EACH):  # group by group, split by split
        place = chunk * HEADS + head
        u = load_inputs(x, mimo_x, rows, head, p, x_token, x_head, P, RANK, RANKS)
        du = load_entries(dy + head * dy_head, rows, p, dy_token, dy_rank, P)
        weights, u, du = _weighed(u, du, steps, place, TOKENS, RANKS, PRECISION)
        dk = dot(u, load_part(leaving + place * P * N + FIRST, p, n, P, N, WIDTH), None, PRECISION)
        if TURN:
            cos, sin = turning(steps, phases, omega, place, start, end, omega_token, TOKENS, RANKS, PAIRS, BLOCK_T)
            q = turned(C, C_bias, rows, head, cos, sin, C_token, C_rank, N, RANK, RANKS, PAIRS, u.dtype)
            k = turned(B, B_bias, rows, head, cos, sin, B_token, B_rank, N, RANK, RANKS, PAIRS, u.dtype)
            dangle, dk = _turned_back(dot(weights, q, dk, PRECISION), k, cos, sin)
        else:
            q = still(C, C_bias, rows, head, C_token, C_rank, N, RANK, RANKS, PAIRS, BLOCK_S, u.dtype)
            dk = dot(weights, q, dk, PRECISION)
            k = still(B, B_bias, rows, head, B_token, B_rank, N, RANK, RANKS, PAIRS, BLOCK_S, u.dtype)
        db += dk
        _store_bias_gradient(dB_bias, dk, place * (RANK * N) + FIRST, n, RANK, RANKS, N, WIDTH)
        dq = dot(du, load_part(entering + place * P * N + FIRST, p, n, P, N, WIDTH), None, PRECISION)
        dq = dot(tl.trans(weights), k, dq, PRECISION)
        if TURN:
            more, dq = _turned_back(dq, q, cos, sin)
            drate += _add_turns(dangle + more, steps, omega, dturns, ddt, place, start, end, omega_token, RANKS, PAIRS)
        dc += dq
        _store_bias_gradient(dC_bias, dq, place * (RANK * N) + FIRST, n, RANK, RANKS, N, WIDTH)
    base = (split.to(tl.int64) * total * (RANK * GROUPS) + group) * N + FIRST
    store_entries(dB + base, rows, n, GROUPS * N, db, WIDTH, RANK)
    store_entries(dC + base, rows, n, GROUPS * N, dc, WIDTH, RANK)
    _store_rates(domega + (part.to(tl.int64) * total + start) * PAIRS, drate, start, end, PAIRS, TURN)


@triton.jit
def _weighed(u, du, steps, place, TOKENS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr):
    """What takes queries to the gradients of keys: `[j, i]`, and for the states inputs and output gradients as these
    knew them."""
    token = tl.arange(0, TOKENS * RANKS) // RANKS
    sums, own = load_step(steps, place, token, TOKENS, SUM), load_step(steps, place, token, TOKENS, OWN)
    weighted, last = load_step(steps, place, token, TOKENS, WEIGHTED), load_step(steps, place, TOKENS - 1, TOKENS, SUM)
    weights = factors(sums[None, :], weighted[:, None], own[:, None], token[None, :], token[:, None])
    weights = (dot(u, tl.trans(du), None, PRECISION) * weights).to(u.dtype)
    return weights, (u * tl.exp2(last - weighted)[:, None]).to(u.dtype), (du * tl.exp2(sums)[:, None]).to(u.dtype)


@triton.jit
def _store_rates(out, drate, start, end, PAIRS: tl.constexpr, TURN: tl.constexpr):
    """The gradient of omega, summed over the heads of the program."""
    if TURN:
        tokens, pairs = tl.arange(0, drate.shape[0]), tl.arange(0, drate.shape[1])
        mask = (start + tokens < end)[:, None] & (pairs < PAIRS)[None, :]
        tl.store(out + (tokens[:, None] * PAIRS + pairs[None, :]), drate, mask=mask)


@triton.jit
def _turned_back(gradient, turned, cos, sin):
    """The gradient of the angle by entry and pair, and that of keys or queries before they were turned.

    With these as the products had them, rounded, what two entries say to each other cancels to the bit.
    """
    a, b = pairs_of(turned.to(tl.float32))
    da, db = pairs_of(gradient)
    return db * a - da * b, paired(da * cos + db * sin, db * cos - da * sin)


@triton.jit
def _add_turns(
    dangle, steps, omega, dturns, ddt, place, start, end, omega_token, RANKS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """A turn moves all angles from its token on: sums from the right, within the chunk. Returns those of omega."""
    dangle = by_token(dangle, RANKS)
    TOKENS: tl.constexpr = dangle.shape[0]
    tokens, pairs = tl.arange(0, TOKENS), tl.arange(0, dangle.shape[1])
    total = tl.sum(dangle, 0)
    tl.store(dturns + place * PAIRS + pairs, total, mask=pairs < PAIRS)
    dturn = total[None, :] - tl.cumsum(dangle, 0) + dangle  # a sum from the right is much slower
    rate = load_rates(omega, start, end, tokens, pairs, omega_token, PAIRS)
    tl.store(ddt + place * TOKENS + tokens, tl.sum(dturn * rate, 1))
    return dturn * load_step(steps, place, tokens, TOKENS, DT)[:, None]


@triton.jit
def _store_bias_gradient(
    out, gradient, base, n, RANK: tl.constexpr, RANKS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    if out is not None:
        ranks = tl.arange(0, RANKS)
        mask = (ranks < RANK)[:, None] & (n < WIDTH)[None, :]
        tl.store(out + base + (ranks[:, None] * N + n[None, :]), by_rank(gradient, RANKS), mask=mask)
