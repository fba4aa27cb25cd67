"""What the kernels of the trapezoid need before they start, what they leave to do, and the gradients of both.

Small tensors only: numbers per token and head, angles per chunk and head, and the state at the ends of sequences.
"""

import triton
import triton.language as tl

from everstate.ops.trapezoid.triton_keys import (
    DT,
    NUMBERS,
    OWN,
    SCALE,
    SUM,
    WEIGHTED,
    angle_of,
    cosine,
    load_rates,
    load_step,
    phase_of,
    place_of,
    sine,
    source_of,
    where_given,
)
from everstate.ops.triton_common import LOG2E, dot

NOTHING: tl.constexpr = tl.constexpr(1e-30)
"""The least scale: instead of zero, which has no logarithm, and by which gradients could not be divided."""


VECTORS: tl.constexpr = tl.constexpr(7)
"""Numbers per token and head of `numbers_kernel`."""


@triton.jit
def _tokens(
    dt, A, lam, rows, heads, exists, follows, dt_token, dt_head, A_token, A_head, lam_token, lam_head
):  # fmt: skip
    """dt, log decays, own weights `lam dt` and scales of tokens and heads."""
    dt += rows * dt_token + (heads * dt_head)[None, :]
    lam += rows * lam_token + (heads * lam_head)[None, :]
    step = tl.load(dt, mask=exists, other=0.0).to(tl.float32)
    decay = tl.load(A + rows * A_token + (heads * A_head)[None, :], mask=exists, other=0.0).to(tl.float32) * step
    own = tl.load(lam, mask=exists, other=0.0).to(tl.float32) * step
    ahead = 1.0 - tl.load(lam + lam_token, mask=follows, other=1.0).to(tl.float32)
    ahead *= tl.load(dt + dt_token, mask=follows, other=0.0).to(tl.float32)
    return step, decay, own, tl.maximum(own + ahead, NOTHING)


@triton.jit
def rates_kernel(omega, rates, chunks, omega_token, TOKENS: tl.constexpr, PAIRS: tl.constexpr):
    """One program per chunk: its omega, zeros beyond the end."""
    chunk, at, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, TOKENS), tl.arange(0, PAIRS)
    rate = load_rates(
        omega, tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1), at, pairs, omega_token, PAIRS
    )
    tl.store(rates + (chunk * TOKENS + at[:, None]) * PAIRS + pairs[None, :], rate)


@triton.jit
def steps_kernel(
    dt, A, lam, steps, chunks, homes, dt_token, dt_head, A_token, A_head, lam_token, lam_head,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per chunk and some heads: the numbers of `triton_keys`. The scale of a token is what it adds now and
    with the next token.

    Tokens that a short chunk does not have keep the last sum and add nothing, so nobody has to ask for them.
    """
    chunk, at = tl.program_id(0).to(tl.int64), tl.arange(0, TOKENS)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    tokens = tl.load(chunks + 2 * chunk) + at
    exists = (tokens < tl.load(chunks + 2 * chunk + 1))[:, None] & (heads < HEADS)[None, :]
    follows = exists & (tokens + 1 < tl.load(homes + 3 * chunk + 2))[:, None]
    rows = tokens.to(tl.int64)[:, None]
    step, decay, own, scale = _tokens(
        dt, A, lam, rows, heads, exists, follows, dt_token, dt_head, A_token, A_head, lam_token, lam_head
    )
    out = steps + (chunk * HEADS + heads[None, :]) * (NUMBERS * TOKENS) + at[:, None]
    mask, sums = (heads < HEADS)[None, :], tl.cumsum(decay, 0) * LOG2E
    tl.store(out + SUM * TOKENS, sums, mask=mask)
    tl.store(out + WEIGHTED * TOKENS, sums - tl.log2(scale), mask=mask)
    tl.store(out + SCALE * TOKENS, scale, mask=mask)
    tl.store(out + OWN * TOKENS, own, mask=mask)
    tl.store(out + DT * TOKENS, step, mask=mask)


@triton.jit
def numbers_kernel(
    dt, A, lam, B, C, B_bias, C_bias, D, out, chunks, homes,
    dt_token, dt_head, A_token, A_head, lam_token, lam_head, B_token, C_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per chunk and some heads of a group: what the outputs need of each token of a chunk, for rank 1.

    The sum of log decays and that less the log of the scale, as `steps_kernel`; what the token reads of the state
    before the chunk; what of its own input it gives, `lam dt k.q + D`, where turning both k and q changes nothing; what
    the state after the chunk has of it; what that keeps of the state before, the same for all; dt.
    """
    EACH: tl.constexpr = HEADS // GROUPS
    BLOCKS: tl.constexpr = (EACH + BLOCK_H - 1) // BLOCK_H
    chunk, group = tl.program_id(0).to(tl.int64), tl.program_id(1) // BLOCKS
    at, n, mine = tl.arange(0, TOKENS), tl.arange(0, N), tl.program_id(1) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    heads, real = group * EACH + mine, mine < EACH
    tokens = tl.load(chunks + 2 * chunk) + at
    exists = (tokens < tl.load(chunks + 2 * chunk + 1))[:, None]
    follows = exists & (tokens + 1 < tl.load(homes + 3 * chunk + 2))[:, None] & real[None, :]
    rows = tokens.to(tl.int64)[:, None]
    b = tl.load(B + rows * B_token + (group * N + n)[None, :], mask=exists, other=0.0)
    c = tl.load(C + rows * C_token + (group * N + n)[None, :], mask=exists, other=0.0)
    product = _products(b, c, B_bias, C_bias, heads, real, n, N)
    step, decay, own, scale = _tokens(
        dt, A, lam, rows, heads, exists & real[None, :], follows,
        dt_token, dt_head, A_token, A_head, lam_token, lam_head,
    )  # fmt: skip
    direct = own * product
    if D is not None:
        direct += tl.load(D + heads, mask=real, other=0.0).to(tl.float32)[None, :]
    out += (chunk * HEADS + heads[None, :]) * (VECTORS * TOKENS) + at[:, None]
    mask, sums = real[None, :], tl.cumsum(decay, 0) * LOG2E
    weighted = sums - tl.log2(scale)
    last = tl.sum(tl.where(at[:, None] == TOKENS - 1, sums, 0.0), 0)[None, :]
    tl.store(out, sums, mask=mask)
    tl.store(out + TOKENS, weighted, mask=mask)
    tl.store(out + 2 * TOKENS, tl.exp2(sums), mask=mask)
    tl.store(out + 3 * TOKENS, direct, mask=mask)
    tl.store(out + 4 * TOKENS, tl.exp2(last - weighted), mask=mask)
    tl.store(out + 5 * TOKENS, tl.exp2(last) + 0.0 * sums, mask=mask)
    tl.store(out + 6 * TOKENS, step, mask=mask)


@triton.jit
def _products(b, c, B_bias, C_bias, heads, real, n, N: tl.constexpr):
    """k.q of each token and head, before both are turned: the biases in two parts of 16 bits."""
    alone = tl.sum(b.to(tl.float32) * c.to(tl.float32), 1)
    product = alone[:, None] + tl.zeros((b.shape[0], heads.shape[0]), tl.float32)
    if B_bias is not None:
        mine = tl.load(B_bias + heads[:, None] * N + n[None, :], mask=real[:, None], other=0.0)
        product = _with_bias(product, c, mine)
    if C_bias is not None:
        other = tl.load(C_bias + heads[:, None] * N + n[None, :], mask=real[:, None], other=0.0)
        product = _with_bias(product, b, other)
        if B_bias is not None:
            product += tl.sum(mine * other, 1)[None, :]
    return product


@triton.jit
def _with_bias(product, rows, bias):
    coarse = bias.to(rows.dtype)
    product = dot(rows, tl.trans(coarse), product, "tf32")
    return dot(rows, tl.trans((bias - coarse.to(tl.float32)).to(rows.dtype)), product, "tf32")


@triton.jit
def turns_kernel(
    steps, omega, phases, chunks, omega_token,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per chunk and some heads: how far the chunk turns each pair."""
    chunk, at, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, TOKENS), tl.arange(0, BLOCK_PAIRS)
    start = tl.load(chunks + 2 * chunk)
    rate = load_rates(omega, start, tl.load(chunks + 2 * chunk + 1), at, pairs, omega_token, PAIRS)
    first = tl.program_id(1) * BLOCK_H
    for head in range(first, tl.minimum(first + BLOCK_H, HEADS)):
        turns = phase_of(load_step(steps, chunk * HEADS + head, at, TOKENS, DT)[:, None] * rate, True)
        tl.store(phases + (chunk * HEADS + head) * PAIRS + pairs, tl.sum(turns, 0), mask=pairs < PAIRS)


@triton.jit
def chunks_kernel(
    source, out, chunks, token_stride, rank_stride, group_stride,
    RANK: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per chunk and group: B or C by entry with its columns in parts, zeros where there is no entry."""
    chunk, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    at, entry = tl.arange(0, BLOCK_N), tl.arange(0, TOKENS * RANKS)
    column, exists = source_of(at, N, PAIRS, HALF, INTERLEAVED)
    token, rank = entry // RANKS, entry % RANKS
    start = tl.load(chunks + 2 * chunk)
    inside = (start + token < tl.load(chunks + 2 * chunk + 1)) & (rank < RANK)
    row = source + start.to(tl.int64) * token_stride + group * group_stride
    row += (token * token_stride + rank * rank_stride)[:, None] + column[None, :]
    tile = tl.load(row, mask=inside[:, None] & (exists & (at < WIDTH))[None, :], other=0.0)
    place = tl.program_id(0).to(tl.int64) * (TOKENS * RANKS * WIDTH) + (entry[:, None] * WIDTH + at[None, :])
    tl.store(out + place, tile, mask=(at < WIDTH)[None, :] & (entry >= 0)[:, None])


@triton.jit
def sources_kernel(
    B, C, B_bias, C_bias, out, bias_out, chunks, count, B_token, B_group, C_token, C_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """For rank 1 and half of the columns: what `chunks_kernel` makes of B and C, and `arrange_kernel` of biases.

    One program per chunk and group, and for B or C; and one more for their biases.
    """
    at, which = tl.arange(0, TOKENS), tl.program_id(1)
    if tl.program_id(0) < count:
        chunk, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
        start = tl.load(chunks + 2 * chunk)
        given, first = start + at < tl.load(chunks + 2 * chunk + 1), start.to(tl.int64)
        out += (which.to(tl.int64) * count + tl.program_id(0)) * (TOKENS * 4 * HALF)
        if which == 0:
            _put_in_parts(B + first * B_token + group * B_group, B_token, given, out, at, at >= 0, HALF, INTERLEAVED)
        else:
            _put_in_parts(C + first * C_token + group * C_group, C_token, given, out, at, at >= 0, HALF, INTERLEAVED)
    else:
        for block in range(0, HEADS, TOKENS):
            heads = block + at
            given = heads < HEADS
            if which == 0:
                if B_bias is not None:
                    _put_in_parts(B_bias, 4 * HALF, given, bias_out, heads, given, HALF, INTERLEAVED)
            elif C_bias is not None:
                to = bias_out + HEADS * 4 * HALF
                _put_in_parts(C_bias, 4 * HALF, given, to, heads, given, HALF, INTERLEAVED)


@triton.jit
def _put_in_parts(source, stride, given, out, rows, wanted, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The wanted rows with their columns in parts, zeros for those that are not given."""
    n, mask = tl.arange(0, HALF), given[:, None]
    row, to = source + rows[:, None] * stride, out + (rows[:, None] * (4 * HALF) + n[None, :])
    dtype: tl.constexpr = out.dtype.element_ty
    if INTERLEAVED:
        both = tl.load(row + tl.arange(0, 2 * HALF)[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(both, (rows.shape[0], HALF, 2)))
        third = tl.load(row + (2 * HALF + n)[None, :], mask=mask, other=0.0)
    else:
        first = tl.load(row + n[None, :], mask=mask, other=0.0)
        second = tl.load(row + (2 * HALF + n)[None, :], mask=mask, other=0.0)
        third = tl.load(row + (HALF + n)[None, :], mask=mask, other=0.0)
    last = tl.load(row + (3 * HALF + n)[None, :], mask=mask, other=0.0)
    tl.store(to, first.to(dtype), mask=wanted[:, None])
    tl.store(to + HALF, second.to(dtype), mask=wanted[:, None])
    tl.store(to + 2 * HALF, third.to(dtype), mask=wanted[:, None])
    tl.store(to + 3 * HALF, last.to(dtype), mask=wanted[:, None])


@triton.jit
def arrange_kernel(
    source, out, rows, token_stride, rank_stride, group_stride,
    RANK: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of biases or states with their columns in parts, dense; or, BACK, as the caller has them."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, BLOCK_N)
    column, exists = source_of(at, N, PAIRS, HALF, INTERLEAVED)
    there, inside = exists & (at < WIDTH), (row < rows)[:, None]
    if BACK:
        tile = tl.load(source + (row[:, None] * WIDTH + at[None, :]), mask=inside & there[None, :], other=0.0)
        place, mask = out + (row[:, None] * N + column[None, :]), inside & there[None, :]
    else:
        each = row // GROUPS // RANK * token_stride + row // GROUPS % RANK * rank_stride + row % GROUPS * group_stride
        tile = tl.load(source + (each[:, None] + column[None, :]), mask=inside & there[None, :], other=0.0)
        place, mask = out + (row[:, None] * WIDTH + at[None, :]), inside & (at < WIDTH)[None, :]
    tl.store(place, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def halves_kernel(source, out, rows, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """What `arrange_kernel` makes, for rank 1 and half of the columns, of rows that lie one after the other."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _put_in_parts(source, 4 * HALF, row < rows, out, row, row < rows, HALF, INTERLEAVED)


@triton.jit
def bias_gradients_kernel(
    dB, dC, B_out, C_out, count, rows, BEFORE: tl.constexpr, PART: tl.constexpr, N: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program per row and some of its columns, of either: sums over the chunks, as the caller has the columns.

    With BEFORE, a row holds the sum of all in its PART up to it, of which the last before it is BEFORE rows away.
    """
    row, at = tl.program_id(0) % rows, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = row * WIDTH + at
    column, exists = source_of(at, N, PAIRS, HALF, INTERLEAVED)
    if tl.program_id(0) < rows:
        if B_out is not None:
            summed = _sum_over_chunks(dB, place, row, count, rows, at < WIDTH, BEFORE, PART, WIDTH, BLOCK)
            tl.store(B_out + row * N + column, summed, mask=exists & (at < WIDTH))
    elif C_out is not None:
        summed = _sum_over_chunks(dC, place, row, count, rows, at < WIDTH, BEFORE, PART, WIDTH, BLOCK)
        tl.store(C_out + row * N + column, summed, mask=exists & (at < WIDTH))


@triton.jit
def _sum_over_chunks(
    parts, place, row, count, rows, inside, BEFORE: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    summed = tl.zeros((BLOCK, place.shape[0]), tl.float32)
    for first in range(0, count, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        source = parts + chunk.to(tl.int64)[:, None] * (rows * WIDTH) + place[None, :]
        mask = (chunk < count)[:, None] & inside[None, :]
        own = tl.load(source, mask=mask, other=0.0)
        if BEFORE > 0:
            own -= tl.load(source - BEFORE * WIDTH, mask=mask & (row % PART >= BEFORE), other=0.0)
        summed += own
    return tl.sum(summed, 0)


@triton.jit
def phases_kernel(
    phases, angle, ends, spans,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence and head: from how far each chunk turns to where it starts, in place, and `ends`."""
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    first, count = tl.load(spans + 2 * sequence).to(tl.int64), tl.load(spans + 2 * sequence + 1)
    at, pairs = tl.arange(0, BLOCK), tl.arange(0, BLOCK_PAIRS)
    home = (sequence * HEADS + head) * PAIRS + pairs
    now = phase_of(tl.load(angle + home, mask=pairs < PAIRS, other=0.0), True)
    for block in range(0, count, BLOCK):
        place = phases + ((first + block + at[:, None]) * HEADS + head) * PAIRS + pairs[None, :]
        mask = where_given(block + at < count, pairs, PAIRS)
        turns = tl.load(place, mask=mask, other=0)
        tl.store(place, tl.cumsum(turns, 0) - turns + now[None, :], mask=mask)
        now += tl.sum(turns, 0)
    tl.store(ends + home, now, mask=pairs < PAIRS)


@triton.jit
def pass_turning_kernel(
    ends, kept, turns, state, angle, entering, starts, sequences, pieces,
    HEADS: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, STILL: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and part of its states: from what pieces add, made as if their angles started from
    zero, to the states that enter segments, and the phases with which they start. Members of a pair lie side by side.
    """
    N: tl.constexpr = 2 * PAIRS + STILL
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    first, count = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    p, pair, rest = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, PAIRS), tl.arange(0, STILL)
    turning, still = p[:, None] * N + 2 * pair[None, :], p[:, None] * N + 2 * PAIRS + rest[None, :]
    home = sequence * HEADS + head
    phase, base = phase_of(tl.load(angle + home * PAIRS + pair), True), state + home * (P * N)
    a, b, h = tl.load(base + turning), tl.load(base + turning + 1), tl.load(base + still)
    for step in range(count):
        segment = first + step
        place = segment.to(tl.int64) * HEADS + head
        base = entering + place * (P * N)
        tl.store(base + turning, a)
        tl.store(base + turning + 1, b)
        tl.store(base + still, h)
        tl.store(starts + place * PAIRS + pair, phase, mask=(pair >= 0) & (tl.program_id(1) == 0))
        start = tl.load(pieces + 2 * segment)
        for part in range(tl.load(pieces + 2 * segment + 1)):
            place = (start + part).to(tl.int64) * HEADS + head
            base, now = ends + place * (P * N), angle_of(phase)
            added, other, rested = tl.load(base + turning), tl.load(base + turning + 1), tl.load(base + still)
            keeps, c, s = tl.exp2(tl.load(kept + place) * LOG2E), cosine(now)[None, :], sine(now)[None, :]
            a, b, h = a * keeps + added * c - other * s, b * keeps + added * s + other * c, h * keeps + rested
            phase += tl.load(turns + place * PAIRS + pair)


@triton.jit
def angle_gradients_kernel(
    turned, ended, dended, dleaving, dangle, phases, later, spans,
    HEADS: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence and head: what all that comes after a chunk says of angles, and of the one that enters.

    Turning all that comes after a boundary is turning back the state that enters there, and turning the state at the
    end: so the sum of all later gradients is known at each boundary from two states, and the rounding errors of
    thousands of tokens do not add up. `dleaving` is that of the angle at the end; without it and `dended`, zeros. Given
    phases, `later` gets those before each chunk too, in front of its own numbers.
    """
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    first, count = tl.load(spans + 2 * sequence).to(tl.int64), tl.load(spans + 2 * sequence + 1)
    pairs, home, p = tl.arange(0, HALF), sequence * HEADS + head, tl.arange(0, BLOCK_P)
    leaving = tl.zeros((HALF,), tl.float32)
    if dleaving is not None:
        leaving = tl.load(dleaving + home * PAIRS + pairs, mask=pairs < PAIRS, other=0.0)
    total = leaving
    if dended is not None:
        state = home * (P * WIDTH) + (p[:, None] * WIDTH + pairs[None, :])
        mask = (p < P)[:, None] & (pairs < PAIRS)[None, :]
        h1, h2 = tl.load(ended + state, mask=mask, other=0.0), tl.load(ended + HALF + state, mask=mask, other=0.0)
        dh1, dh2 = tl.load(dended + state, mask=mask, other=0.0), tl.load(dended + HALF + state, mask=mask, other=0.0)
        total += tl.sum(dh2 * h1 - dh1 * h2, 0)
    at, tiles = tl.arange(0, BLOCK), tl.arange(0, TILES)
    entering = turned + (first * HEADS + head) * (TILES * HALF) + (tiles[:, None] * HALF + pairs[None, :])
    tl.store(dangle + home * PAIRS + pairs, total - tl.sum(tl.load(entering), 0), mask=pairs < PAIRS)
    for block in range(0, count, BLOCK):
        chunk = first + block + at[:, None]
        follows = (block + at + 1 < count)[:, None]
        after = tl.zeros((BLOCK, HALF), tl.float32)
        for tile in tl.static_range(TILES):
            own = (((chunk + 1) * HEADS + head) * TILES + tile) * HALF + pairs[None, :]
            after += tl.load(turned + own, mask=follows, other=0.0)
        value = tl.where(follows, total[None, :] - after, leaving[None, :])
        inside = (block + at < count)[:, None] & (pairs < PAIRS)[None, :]
        place = (chunk * HEADS + head) * PAIRS + pairs[None, :]
        if phases is not None:
            phase = tl.load(phases + place, mask=inside, other=0)
            place += (chunk * HEADS + head) * PAIRS
            tl.store(later + place, phase.to(tl.float32, bitcast=True), mask=inside)
            place += PAIRS
        tl.store(later + place, value, mask=inside)


@triton.jit
def enter_kernel(
    dt, lam, ssm, k, x, mimo_x, entered, spans, chunks, dt_token, dt_head, lam_token, lam_head,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, PAIRS: tl.constexpr,
    HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per sequence and head: the state that enters, with what the token before still owes it, in parts."""
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    column, exists = source_of(n, N, PAIRS, HALF, INTERLEAVED)
    exists, home = exists & (n < WIDTH), sequence * HEADS + head
    token = tl.load(chunks + 2 * tl.load(spans + 2 * sequence)).to(tl.int64)
    owed = 1.0 - tl.load(lam + token * lam_token + head * lam_head).to(tl.float32)
    owed *= tl.load(dt + token * dt_token + head * dt_head).to(tl.float32)
    h = tl.load(
        ssm + home * (P * N) + (p[:, None] * N + column[None, :]), mask=(p < P)[:, None] & exists[None, :], other=0.0
    )
    u = tl.load(x + home * P + p, mask=p < P, other=0.0) * owed
    for rank in tl.static_range(RANK):
        key = tl.load(k + ((sequence * RANK + rank) * HEADS + head) * N + column, mask=exists, other=0.0)
        factor = u
        if mimo_x is not None:
            factor = u * tl.load(mimo_x + (head * RANK + rank) * P + p, mask=p < P, other=0.0).to(tl.float32)
        h += factor[:, None] * key[None, :]
    place = home * (P * WIDTH) + (p[:, None] * WIDTH + n[None, :])
    tl.store(entered + place, h, mask=(p < P)[:, None] & (n < WIDTH)[None, :])


@triton.jit
def _halves_of(row, HALF: tl.constexpr):
    """First and second members of pairs that lie side by side, and the columns behind them, of rows of `4 HALF`."""
    both = tl.arange(0, 2 * HALF)
    at = row[:, None] + both[None, :]
    first, second = tl.split(tl.reshape(tl.load(at), (row.shape[0], HALF, 2)))
    return first, second, tl.load(at + 2 * HALF)


@triton.jit
def enter_halves_kernel(
    dt, lam, ssm, k, x, entered, spans, chunks, dt_token, dt_head, lam_token, lam_head,
    HEADS: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`enter_kernel` for rank 1, where half of the columns turn and the members of a pair lie side by side; one program
    for BLOCK_P rows of a state."""
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    p, n, m = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    home, one = sequence * HEADS + head, tl.arange(0, 1)
    token = tl.load(chunks + 2 * tl.load(spans + 2 * sequence)).to(tl.int64)
    owed = 1.0 - tl.load(lam + token * lam_token + head * lam_head).to(tl.float32)
    owed *= tl.load(dt + token * dt_token + head * dt_head).to(tl.float32)
    h1, h2, h3 = _halves_of(ssm + (home * P + p) * (4 * HALF), HALF)
    k1, k2, k3 = _halves_of(k + (home + one) * (4 * HALF), HALF)
    u = (tl.load(x + home * P + p) * owed)[:, None]
    out = entered + ((home * P + p) * (4 * HALF))[:, None] + n[None, :]
    tl.store(out, h1 + u * k1)
    tl.store(out + HALF, h2 + u * k2)
    tl.store(entered + ((home * P + p) * (4 * HALF))[:, None] + (2 * HALF + m)[None, :], h3 + u * k3)


@triton.jit
def enter_halves_gradients_kernel(
    dt, lam, dentered, k, x, dssm, dowed, dk, dx, spans, chunks, dt_token, dt_head, lam_token, lam_head,
    HEADS: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """`enter_gradients_kernel`, likewise."""
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    p, n, m = tl.arange(0, P), tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    home, one = sequence * HEADS + head, tl.arange(0, 1)
    token = tl.load(chunks + 2 * tl.load(spans + 2 * sequence)).to(tl.int64)
    owed = 1.0 - tl.load(lam + token * lam_token + head * lam_head).to(tl.float32)
    owed *= tl.load(dt + token * dt_token + head * dt_head).to(tl.float32)
    row = ((home * P + p) * (4 * HALF))[:, None]
    d1, d2 = tl.load(dentered + row + n[None, :]), tl.load(dentered + row + (HALF + n)[None, :])
    d3 = tl.load(dentered + row + (2 * HALF + m)[None, :])
    tl.store(dssm + row + m[None, :], tl.reshape(tl.join(d1, d2), (P, 2 * HALF)))
    tl.store(dssm + row + (2 * HALF + m)[None, :], d3)
    u = tl.load(x + home * P + p)
    k1, k2, k3 = _halves_of(k + (home + one) * (4 * HALF), HALF)
    received = tl.sum(d1 * k1 + d2 * k2, 1) + tl.sum(d3 * k3, 1)
    tl.store(dx + home * P + p, received * owed)
    tl.store(dowed + home, tl.sum(received * u, 0))
    u = (u * owed)[:, None]
    to = dk + home * (4 * HALF)
    tl.store(to + 2 * n, tl.sum(d1 * u, 0))
    tl.store(to + 2 * n + 1, tl.sum(d2 * u, 0))
    tl.store(to + 2 * HALF + m, tl.sum(d3 * u, 0))


@triton.jit
def enter_gradients_kernel(
    dt, lam, dentered, k, x, mimo_x, dssm, dowed, dk, dx, dmimo_x, spans, chunks,
    dt_token, dt_head, lam_token, lam_head,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, PAIRS: tl.constexpr,
    HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The reverse of `enter_kernel`, given the gradient of the state; `dowed` is that of dt (1 - lam)."""
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    exists, home = n < N, sequence * HEADS + head
    token = tl.load(chunks + 2 * tl.load(spans + 2 * sequence)).to(tl.int64)
    owed = 1.0 - tl.load(lam + token * lam_token + head * lam_head).to(tl.float32)
    owed *= tl.load(dt + token * dt_token + head * dt_head).to(tl.float32)
    mask = (p < P)[:, None] & exists[None, :]
    column = place_of(n, N, PAIRS, HALF, INTERLEAVED)
    dh = tl.load(dentered + home * (P * WIDTH) + (p[:, None] * WIDTH + column[None, :]), mask=mask, other=0.0)
    tl.store(dssm + home * (P * N) + (p[:, None] * N + n[None, :]), dh, mask=mask)
    u = tl.load(x + home * P + p, mask=p < P, other=0.0)
    total, du = 0.0, tl.zeros((BLOCK_P,), tl.float32)
    for rank in tl.static_range(RANK):
        at = ((sequence * RANK + rank) * HEADS + head) * N + n
        key = tl.load(k + at, mask=exists, other=0.0)
        mine, factor = u, u * 0.0 + 1.0
        if mimo_x is not None:
            factor = tl.load(mimo_x + (head * RANK + rank) * P + p, mask=p < P, other=0.0).to(tl.float32)
            mine = u * factor
        received = tl.sum(dh * key[None, :], 1)
        total += tl.sum(received * mine, 0)
        tl.store(dk + at, tl.sum(dh * mine[:, None], 0) * owed, mask=exists)
        du += received * factor * owed
        if mimo_x is not None:
            tl.store(dmimo_x + (home * RANK + rank) * P + p, received * u * owed, mask=p < P)
    tl.store(dx + home * P + p, du, mask=p < P)
    tl.store(dowed + home, total)


@triton.jit
def _turn_by(angle, home, n, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """For each column of the parts: the other one of its pair, and cosine and sine; 1 and 0 where it stands still."""
    turns = (n < 2 * HALF) & (n % HALF < PAIRS)
    turned = tl.load(angle + home * PAIRS + n % HALF, mask=turns, other=0.0)
    other = tl.where(n < HALF, n + HALF, tl.where(n < 2 * HALF, n - HALF, n))
    return other, cosine(turned), tl.where(n < HALF, -1.0, 1.0) * sine(turned)


@triton.jit
def leave_kernel(
    x, B, B_bias, angle, last_k, last_x, homes, spans, x_token, x_head, B_token, B_rank, B_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per sequence and head: the key and the input of the last token, given the angle after it."""
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    column, exists = source_of(n, N, PAIRS, HALF, INTERLEAVED)
    exists, home = exists & (n < WIDTH), sequence * HEADS + head
    token = tl.load(homes + 3 * tl.load(spans + 2 * sequence) + 2).to(tl.int64) - 1
    now = tl.load(x + token * x_token + head * x_head + p, mask=p < P, other=0.0)
    tl.store(last_x + home * P + p, now.to(tl.float32), mask=p < P)
    other, cos, sin = _turn_by(angle, home, n, PAIRS, HALF)
    opposite, _ = source_of(other, N, PAIRS, HALF, INTERLEAVED)
    for rank in tl.static_range(RANK):
        row = B + token * B_token + rank * B_rank + head // (HEADS // GROUPS) * B_group
        a = tl.load(row + column, mask=exists, other=0.0).to(tl.float32)
        b = tl.load(row + opposite, mask=exists, other=0.0).to(tl.float32)
        if B_bias is not None:
            own = B_bias + (head * RANK + rank) * N
            a += tl.load(own + column, mask=exists, other=0.0).to(tl.float32)
            b += tl.load(own + opposite, mask=exists, other=0.0).to(tl.float32)
        out = last_k + ((sequence * RANK + rank) * HEADS + head) * N + column
        tl.store(out, a * cos + b * sin, mask=exists)


@triton.jit
def leave_gradients_kernel(
    k, angle, dk, dangle, dB, leaving,
    HEADS: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The reverse of `leave_kernel` for the key: dB before it was turned, for each head, and with dangle that of the
    angle in `leaving`."""
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    n, pair, home = tl.arange(0, BLOCK_N), tl.arange(0, HALF), sequence * HEADS + head
    column, exists = source_of(n, N, PAIRS, HALF, INTERLEAVED)
    exists, turns = exists & (n < WIDTH), pair < PAIRS
    other, cos, sin = _turn_by(angle, home, n, PAIRS, HALF)
    opposite, _ = source_of(other, N, PAIRS, HALF, INTERLEAVED)
    first, _ = source_of(pair, N, PAIRS, HALF, INTERLEAVED)
    second, _ = source_of(pair + HALF, N, PAIRS, HALF, INTERLEAVED)
    total = tl.load(dangle + home * PAIRS + pair, mask=turns, other=0.0)
    for rank in tl.static_range(RANK):
        at = ((sequence * RANK + rank) * HEADS + head) * N
        a, b = tl.load(k + at + first, mask=turns, other=0.0), tl.load(k + at + second, mask=turns, other=0.0)
        da, db = tl.load(dk + at + first, mask=turns, other=0.0), tl.load(dk + at + second, mask=turns, other=0.0)
        total += db * a - da * b
        mine = tl.load(dk + at + column, mask=exists, other=0.0) * cos
        tl.store(dB + at + column, mine - tl.load(dk + at + opposite, mask=exists, other=0.0) * sin, mask=exists)
    tl.store(leaving + home * PAIRS + pair, total, mask=turns)


@triton.jit
def steps_gradients_kernel(
    dt, A, lam, ddecays, dscales, downs, dsteps, dowed, ddt, dA, dlam, chunks, homes,
    dt_token, dt_head, A_token, A_head, lam_token, lam_head,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The reverse of `steps_kernel`, given what chunks say of sums, scales and own weights, and the angles of dt.

    A token hears of its scale in two places: its own weight `lam dt` is in its own, its look-ahead `dt (1 - lam)` in
    that of the token before, or in the state that entered the sequence.
    """
    chunk, at = tl.program_id(0).to(tl.int64), tl.arange(0, TOKENS)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    start = tl.load(chunks + 2 * chunk)
    sequence, first = tl.load(homes + 3 * chunk).to(tl.int64), tl.load(homes + 3 * chunk + 1)
    real, rows = heads < HEADS, (start + at).to(tl.int64)[:, None]
    exists = (start + at < tl.load(chunks + 2 * chunk + 1))[:, None] & real[None, :]
    step = tl.load(dt + rows * dt_token + (heads * dt_head)[None, :], mask=exists, other=0.0).to(tl.float32)
    decay = tl.load(A + rows * A_token + (heads * A_head)[None, :], mask=exists, other=0.0).to(tl.float32)
    part = tl.load(lam + rows * lam_token + (heads * lam_head)[None, :], mask=exists, other=0.0).to(tl.float32)
    own = (chunk * HEADS + heads[None, :]) * TOKENS + at[:, None]
    dsum = tl.cumsum(tl.load(ddecays + own, mask=real[None, :], other=0.0), 0, reverse=True)
    dscale = tl.load(dscales + own, mask=real[None, :], other=0.0)
    before = own - 1 + tl.where(at == 0, TOKENS - HEADS * TOKENS, 0)[:, None]
    dahead = tl.load(dscales + before, mask=real[None, :] & (start + at > first)[:, None], other=0.0)
    entering = tl.load(dowed + sequence * HEADS + heads, mask=real, other=0.0)
    dahead += tl.where(start + at == first, 1.0, 0.0)[:, None] * entering[None, :]
    dweight = dscale + tl.load(downs + own, mask=real[None, :], other=0.0)
    dstep = tl.load(dsteps + own, mask=real[None, :], other=0.0) + decay * dsum + part * dweight + (1.0 - part) * dahead
    out = rows * HEADS + heads[None, :]
    tl.store(ddt + out, dstep, mask=exists)
    tl.store(dA + out, step * dsum, mask=exists)
    tl.store(dlam + out, step * (dweight - dahead), mask=exists)
