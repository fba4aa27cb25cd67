"""The trapezoid backwards on a GPU: every chunk by itself, given the state that enters it and what comes back of it."""

import triton
import triton.language as tl

from everstate.ops.triton_common import LOG2E, dot
from everstate.ops.trapezoid.triton_keys import (
    across,
    by_rank,
    by_token,
    decays,
    load_entries,
    load_factors,
    load_halves,
    load_inputs,
    load_steps,
    paired,
    pairs_of,
    rebuilt,
    turning,
    where_given,
)


@triton.jit
def inputs_kernel(
    x, mimo_x, dy, steps, omega, phases, B, C, B_bias, C_bias, D, entering, leaving,
    dx, ddecays, dscales, downs, dmimo_x, dD, chunks,
    x_token, x_head, dy_token, dy_rank, dy_head, omega_token, B_token, B_rank, B_group, C_token, C_rank, C_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and head: the gradients of x, its factors, D, the decays, the scales and the own weights.

    Matrices over pairs of entries are transposed, `[j, i]` for what i receives from j.
    """
    chunk, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    DTYPE: tl.constexpr = x.dtype.element_ty
    group, place = head // (HEADS // GROUPS), chunk * HEADS + head
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    entry, tokens, pairs = tl.arange(0, TOKENS * RANKS), tl.arange(0, TOKENS), tl.arange(0, BLOCK_T // 2)
    token, rank, p = entry // RANKS, entry % RANKS, tl.arange(0, BLOCK_P)
    inside = (start + token < end) & (rank < RANK)
    cos, sin = turning(
        steps, phases, omega, place, start, tokens, start + tokens < end, pairs, omega_token, TOKENS, RANKS, PAIRS
    )
    cs, scale, own, last = load_steps(steps, place, token, TOKENS)
    k, ks = rebuilt(
        B + group * B_group, B_bias, start, token, rank, inside, head, cos, sin, B_token, B_rank,
        N, RANK, PAIRS, BLOCK_T, BLOCK_S, DTYPE,
    )  # fmt: skip
    u = load_inputs(x, mimo_x, start, token, rank, inside, head, p, x_token, x_head, P, RANK)
    # The gradient of s x, first as far as it went through the state.
    dh, dhs = load_halves(leaving + place * P * N, p, P, N, PAIRS, BLOCK_T, BLOCK_S)
    dadded = across(k, ks, dh, dhs, BLOCK_S, PRECISION) * tl.exp2((last - cs) * LOG2E)[:, None]
    dscale = tl.sum(dadded * u.to(tl.float32), 1)
    h, hs = load_halves(entering + place * P * N, p, P, N, PAIRS, BLOCK_T, BLOCK_S)
    kept = tl.sum(tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1), 0)
    if BLOCK_S > 0:
        kept += tl.sum(tl.sum(hs.to(tl.float32) * dhs.to(tl.float32), 1), 0)
    dlast = tl.sum(scale * dscale, 0) + tl.exp2(last * LOG2E) * kept
    q, qs = rebuilt(
        C + group * C_group, C_bias, start, token, rank, inside, head, cos, sin, C_token, C_rank,
        N, RANK, PAIRS, BLOCK_T, BLOCK_S, DTYPE,
    )  # fmt: skip
    du = load_entries(dy + head * dy_head, start, token, rank, inside, p, dy_token, dy_rank, P)
    # How much a larger sum of decays would change: all that an entry received, less all that it gave.
    ddecay = tl.sum(across(q, qs, h, hs, BLOCK_S, PRECISION) * du.to(tl.float32), 1) * tl.exp2(cs * LOG2E)
    product = across(k, ks, q, qs, BLOCK_S, PRECISION)
    weights = product * decays(cs[None, :], cs[:, None], token[None, :], token[:, None])
    received = dot(u, tl.trans(du), None, PRECISION)
    dscale += tl.sum(received * weights, 1)
    ddecay += tl.sum(received * weights * scale[:, None], 0) - scale * dscale
    mine = tl.where(token[:, None] == token[None, :], product, 0.0)
    at = place * TOKENS + tokens
    tl.store(ddecays + at, by_token(ddecay, RANKS) + tl.where(tokens == TOKENS - 1, dlast, 0.0))
    tl.store(dscales + at, by_token(dscale, RANKS))
    tl.store(downs + at, by_token(tl.sum(mine * received, 1), RANKS))
    weights = (weights * scale[:, None] + mine * own[:, None]).to(DTYPE)
    dinput = dot(weights, du, dadded * scale[:, None], PRECISION)
    _store_input_gradients(
        x, mimo_x, D, dx, dmimo_x, dD, u, du, dinput, place, start, end, token, rank, inside, tokens, head, p,
        x_token, x_head, HEADS, P, RANK, RANKS,
    )  # fmt: skip


@triton.jit
def _store_input_gradients(
    x, mimo_x, D, dx, dmimo_x, dD, u, du, dinput, place, start, end, token, rank, inside, tokens, head, p,
    x_token, x_head, HEADS: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """From the gradient of each rank's input, but for D, to those of x, the factors and D."""
    if D is not None:
        dinput += tl.load(D + head).to(tl.float32) * du.to(tl.float32)
        tl.store(dD + place, tl.sum(tl.sum(u.to(tl.float32) * du.to(tl.float32), 1), 0))
    if mimo_x is not None:
        raw = load_inputs(x, None, start, token, rank, inside, head, p, x_token, x_head, P, RANK).to(tl.float32)
        factors = by_rank(dinput * raw, RANKS)
        ranks = tl.arange(0, RANKS)
        at = dmimo_x + place * (RANK * P) + (ranks[:, None] * P + p[None, :])
        tl.store(at, factors, mask=where_given(ranks < RANK, p, P) & (p < P)[None, :])
        dinput *= load_factors(mimo_x, rank, head, p, P, RANK)
    out = dx + start.to(tl.int64) * (HEADS * P) + head * P + ((tokens * (HEADS * P))[:, None] + p[None, :])
    mask = (start + tokens < end)[:, None] & (p < P)[None, :]
    tl.store(out, by_token(tl.where(inside[:, None], dinput, 0.0), RANKS).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def keys_kernel(
    x, mimo_x, dy, steps, omega, phases, B, C, B_bias, C_bias, entering, leaving, dlast_k,
    dB, dC, dB_bias, dC_bias, domega, ddt, dturns, chunks, homes,
    x_token, x_head, dy_token, dy_rank, dy_head, omega_token, B_token, B_rank, B_group, C_token, C_rank, C_group, total,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads: the gradients of B, C and omega, summed over the heads; of
    the biases, to be summed over the chunks; and of the angles, as far as the chunk goes."""
    EACH: tl.constexpr = HEADS // GROUPS // SPLITS
    TURNING: tl.constexpr = 2 * PAIRS
    DTYPE: tl.constexpr = x.dtype.element_ty
    chunk, part = (tl.program_id(0) // (GROUPS * SPLITS)).to(tl.int64), tl.program_id(0) % (GROUPS * SPLITS)
    group, split = part // SPLITS, part % SPLITS
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    entry, tokens, pairs = tl.arange(0, TOKENS * RANKS), tl.arange(0, TOKENS), tl.arange(0, BLOCK_T // 2)
    token, rank, p = entry // RANKS, entry % RANKS, tl.arange(0, BLOCK_P)
    exists, inside = start + tokens < end, (start + token < end) & (rank < RANK)
    n, ns = tl.arange(0, BLOCK_T), TURNING + tl.arange(0, BLOCK_S if BLOCK_S > 0 else 1)
    # The key of the last token of a sequence is in its final state.
    sequence, closing = tl.load(homes + 3 * chunk).to(tl.int64), start + token + 1 == tl.load(homes + 3 * chunk + 2)
    B += group * B_group
    C += group * C_group
    db, dc = tl.zeros((TOKENS * RANKS, BLOCK_T), tl.float32), tl.zeros((TOKENS * RANKS, BLOCK_T), tl.float32)
    dbs, dcs, drate = 0.0, 0.0, tl.zeros((TOKENS, BLOCK_T // 2), tl.float32)
    if BLOCK_S > 0:
        dbs, dcs = tl.zeros((TOKENS * RANKS, BLOCK_S), tl.float32), tl.zeros((TOKENS * RANKS, BLOCK_S), tl.float32)
    for i in range(EACH):
        head = group * (HEADS // GROUPS) + split * EACH + i
        place = chunk * HEADS + head
        cos, sin = turning(steps, phases, omega, place, start, tokens, exists, pairs, omega_token, TOKENS, RANKS, PAIRS)
        k, ks = rebuilt(
            B, B_bias, start, token, rank, inside, head, cos, sin, B_token, B_rank, N, RANK, PAIRS, BLOCK_T, BLOCK_S, DTYPE
        )
        q, qs = rebuilt(
            C, C_bias, start, token, rank, inside, head, cos, sin, C_token, C_rank, N, RANK, PAIRS, BLOCK_T, BLOCK_S, DTYPE
        )
        cs, scale, own, last = load_steps(steps, place, token, TOKENS)
        u = load_inputs(x, mimo_x, start, token, rank, inside, head, p, x_token, x_head, P, RANK)
        du = load_entries(dy + head * dy_head, start, token, rank, inside, p, dy_token, dy_rank, P)
        factors = decays(cs[None, :], cs[:, None], token[None, :], token[:, None]) * scale[:, None]
        factors += tl.where(token[:, None] == token[None, :], own[:, None], 0.0)
        weights = (dot(u, tl.trans(du), None, PRECISION) * factors).to(DTYPE)
        u = (u * (scale * tl.exp2((last - cs) * LOG2E))[:, None]).to(DTYPE)
        du = (du * tl.exp2(cs * LOG2E)[:, None]).to(DTYPE)
        h, hs = load_halves(entering + place * P * N, p, P, N, PAIRS, BLOCK_T, BLOCK_S)
        dh, dhs = load_halves(leaving + place * P * N, p, P, N, PAIRS, BLOCK_T, BLOCK_S)
        last_k = dlast_k + (sequence * RANK * HEADS + head) * N
        dk = dot(weights, q, dot(u, dh, _last_keys(last_k, rank, closing & inside, n, HEADS * N, TURNING), PRECISION), PRECISION)
        dq = dot(tl.trans(weights), k, dot(du, h, None, PRECISION), PRECISION)
        dangle, dk, dq = _turned_back(dk, dq, k, q, cos, sin)
        db += dk
        dc += dq
        _store_bias_gradient(dB_bias, dk, place, n, RANK, RANKS, N, TURNING)
        _store_bias_gradient(dC_bias, dq, place, n, RANK, RANKS, N, TURNING)
        drate += _store_angle_gradients(
            dangle, steps, omega, dturns, ddt, place, start, tokens, exists, pairs, omega_token, TOKENS, RANKS, PAIRS
        )
        if BLOCK_S > 0:
            dk = dot(weights, qs, dot(u, dhs, _last_keys(last_k, rank, closing & inside, ns, HEADS * N, N), PRECISION), PRECISION)
            dq = dot(tl.trans(weights), ks, dot(du, hs, None, PRECISION), PRECISION)
            dbs += dk
            dcs += dq
            _store_bias_gradient(dB_bias, dk, place, ns, RANK, RANKS, N, N)
            _store_bias_gradient(dC_bias, dq, place, ns, RANK, RANKS, N, N)
    _store_keys(dB, db, start, token, rank, inside, group, split, n, total, GROUPS, RANK, N, TURNING)
    _store_keys(dC, dc, start, token, rank, inside, group, split, n, total, GROUPS, RANK, N, TURNING)
    if BLOCK_S > 0:
        _store_keys(dB, dbs, start, token, rank, inside, group, split, ns, total, GROUPS, RANK, N, N)
        _store_keys(dC, dcs, start, token, rank, inside, group, split, ns, total, GROUPS, RANK, N, N)
    out = domega + part.to(tl.int64) * total * PAIRS + start.to(tl.int64) * PAIRS
    tl.store(out + (tokens[:, None] * PAIRS + pairs[None, :]), drate, mask=where_given(exists, pairs, PAIRS))


@triton.jit
def _last_keys(dlast_k, rank, closing, n, stride, END: tl.constexpr):
    """What the final state says of the keys of the last token, zero for other tokens."""
    mask = closing[:, None] & (n < END)[None, :]
    return tl.load(dlast_k + (rank[:, None] * stride + n[None, :]), mask=mask, other=0.0)


@triton.jit
def _turned_back(dk, dq, k, q, cos, sin):
    """The gradient of the angle by entry and pair, and those of keys and queries before they were turned.

    With k and q as the products had them, rounded, what two entries say to each other cancels to the bit.
    """
    ka, kb = pairs_of(k)
    qa, qb = pairs_of(q)
    dka, dkb = pairs_of(dk)
    dqa, dqb = pairs_of(dq)
    dangle = dkb * ka.to(tl.float32) - dka * kb.to(tl.float32)
    dangle += dqb * qa.to(tl.float32) - dqa * qb.to(tl.float32)
    dk = paired(dka * cos + dkb * sin, dkb * cos - dka * sin)
    return dangle, dk, paired(dqa * cos + dqb * sin, dqb * cos - dqa * sin)


@triton.jit
def _store_angle_gradients(
    dangle, steps, omega, dturns, ddt, place, start, tokens, exists, pairs, omega_token,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A turn moves all angles from its token on: sums from the right, within the chunk. Returns those of omega."""
    dangle = by_token(dangle, RANKS)
    tl.store(dturns + place * PAIRS + pairs, tl.sum(dangle, 0), mask=pairs < PAIRS)
    dturn = tl.cumsum(dangle, 0, reverse=True)
    rate = omega + start.to(tl.int64) * omega_token + (tokens[:, None] * omega_token + pairs[None, :])
    rate = tl.load(rate, mask=where_given(exists, pairs, PAIRS), other=0.0).to(tl.float32)
    tl.store(ddt + place * TOKENS + tokens, tl.sum(dturn * rate, 1))
    return dturn * tl.load(steps + place * (4 * TOKENS) + 3 * TOKENS + tokens)[:, None]


@triton.jit
def _store_bias_gradient(out, gradient, place, n, RANK: tl.constexpr, RANKS: tl.constexpr, N: tl.constexpr, END: tl.constexpr):
    if out is not None:
        ranks = tl.arange(0, RANKS)
        mask = (ranks < RANK)[:, None] & (n < END)[None, :]
        tl.store(out + place * (RANK * N) + (ranks[:, None] * N + n[None, :]), by_rank(gradient, RANKS), mask=mask)


@triton.jit
def _store_keys(
    out, gradient, start, token, rank, inside, group, split, n, total,
    GROUPS: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    at = out + ((split.to(tl.int64) * total + start) * (RANK * GROUPS) + group) * N
    at += ((token * RANK + rank) * (GROUPS * N))[:, None] + n[None, :]
    tl.store(at, gradient.to(out.dtype.element_ty), mask=inside[:, None] & (n < END)[None, :])
