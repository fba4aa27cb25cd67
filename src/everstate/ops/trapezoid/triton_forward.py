"""The trapezoid forwards on a GPU: the state of a head in registers while its program walks along time."""

import triton
import triton.language as tl

from everstate.ops.trapezoid.triton_keys import (
    OWN,
    SUM,
    WEIGHTED,
    across,
    added_to,
    entries,
    factors,
    load_entries,
    load_inputs,
    load_part,
    load_parts,
    load_step,
    make_keys,
    make_trig,
    source_of,
    store_entries,
    store_parts,
)
from everstate.ops.triton_common import LOG2E, dot


@triton.jit
def _place(TILES: tl.constexpr, HEADS: tl.constexpr):
    """Which tile of which head of which segment a program has."""
    part = tl.program_id(0) // TILES
    return tl.program_id(0) % TILES, part % HEADS, (part // HEADS).to(tl.int64)


@triton.jit
def scan_kernel(
    x, mimo_x, steps, omega, phases, B, C, B_bias, C_bias, D, entering, y, final, chunks, segments,
    x_token, x_head, omega_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program per segment, head and tile of p."""
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    WIDTH: tl.constexpr = 2 * HALF + STILL
    DTYPE: tl.constexpr = x.dtype.element_ty
    tile, head, segment = _place(TILES, HEADS)
    group = head // (HEADS // GROUPS)
    first, count = tl.load(segments + 5 * segment), tl.load(segments + 5 * segment + 1)
    token, p = tl.arange(0, TOKENS * RANKS) // RANKS, tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h1, h2, h3 = load_parts(entering + (segment * HEADS + head) * (P * WIDTH), p, P, HALF, STILL)
    for step in range(count):
        chunk = (first + step).to(tl.int64)
        start, end, place = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1), chunk * HEADS + head
        rows = entries(start, end, TOKENS, RANK, RANKS)
        row, rank = (chunk * GROUPS + group) * (TOKENS * RANKS), rows[2]
        trig = make_trig(steps, omega, phases, place, rows, end, omega_token, TOKENS, RANKS, PAIRS, HALF)
        k = make_keys(B, row, B_bias, trig, rank, head, RANK, STILL, DTYPE)
        q = make_keys(C, row, C_bias, trig, rank, head, RANK, STILL, DTYPE)
        u = load_inputs(x, mimo_x, rows, head, p, x_token, x_head, P, RANK, RANKS)
        sums, own = load_step(steps, place, token, TOKENS, SUM), load_step(steps, place, token, TOKENS, OWN)
        weighted = load_step(steps, place, token, TOKENS, WEIGHTED)
        last = load_step(steps, place, TOKENS - 1, TOKENS, SUM)
        given = factors(sums[:, None], weighted[None, :], own[:, None], token[:, None], token[None, :])
        weights = (across(q, k, STILL, PRECISION) * given).to(DTYPE)
        out = across(q, (h1, h2, h3), STILL, PRECISION) * tl.exp2(sums)[:, None]
        out = dot(weights, u, out, PRECISION)
        if D is not None:
            out += tl.load(D + head).to(tl.float32) * u.to(tl.float32)
        store_entries(y + head * P, rows, p, HEADS * P, out, P, RANK)
        added = tl.trans((u * tl.exp2(last - weighted)[:, None]).to(DTYPE))
        h1, h2, h3 = added_to((h1, h2, h3), tl.exp2(last), added, k, STILL, PRECISION)
    if tl.load(segments + 5 * segment + 4) == 1:
        sequence = tl.load(segments + 5 * segment + 2).to(tl.int64)
        _store_final(
            final + (sequence * HEADS + head) * (P * N), p, (h1, h2, h3), P, N, PAIRS, HALF, STILL, INTERLEAVED
        )


@triton.jit
def _store_final(
    base, p, parts, P: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A state with its columns in the order of the caller."""
    column, exists = source_of(tl.arange(0, HALF), N, PAIRS, HALF, INTERLEAVED)
    mask = (p < P)[:, None] & exists[None, :]
    tl.store(base + (p[:, None] * N + column[None, :]), parts[0], mask=mask)
    column, exists = source_of(HALF + tl.arange(0, HALF), N, PAIRS, HALF, INTERLEAVED)
    tl.store(base + (p[:, None] * N + column[None, :]), parts[1], mask=mask)
    if STILL > 0:
        column, exists = source_of(2 * HALF + tl.arange(0, STILL), N, PAIRS, HALF, INTERLEAVED)
        tl.store(base + (p[:, None] * N + column[None, :]), parts[2], mask=(p < P)[:, None] & exists[None, :])


@triton.jit
def sweep_kernel(
    x, mimo_x, steps, omega, phases, B, B_bias, entering, boundaries, ends, kept, entered, turned, chunks, segments,
    x_token, x_rank, x_head, omega_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Only the state, forwards; or only its gradient, backwards, with dy for x and C for B.

    Without `boundaries` it starts from zero and leaves in `ends` what each segment adds, in `kept` the log of how much
    of an older state it keeps. With it, the state before each chunk goes there, and that after the last segment to
    `ends`. Backwards, given the states that enter the chunks in `entered`, `turned` gets what turning each of them
    would change.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    WIDTH: tl.constexpr = 2 * HALF + STILL
    DTYPE: tl.constexpr = x.dtype.element_ty
    tile, head, segment = _place(TILES, HEADS)
    first, count = tl.load(segments + 5 * segment), tl.load(segments + 5 * segment + 1)
    entry, p = tl.arange(0, TOKENS * RANKS), tile * BLOCK_P + tl.arange(0, BLOCK_P)
    # Tokens of a segment follow each other: asking for each chunk where it starts would hold up all other loads.
    begin, stop = tl.load(chunks + 2 * first), tl.load(chunks + 2 * (first + count) - 1)
    h1, h2, h3 = _start(entering, (segment * HEADS + head) * (P * WIDTH), p, P, HALF, STILL)
    decayed = 0.0
    for step in range(count):
        now = count - 1 - step if REVERSE else step
        chunk, start = (first + now).to(tl.int64), begin + now * TOKENS
        end, place = tl.minimum(start + TOKENS, stop), chunk * HEADS + head
        rows = entries(start, end, TOKENS, RANK, RANKS)
        if boundaries is not None:
            store_parts(boundaries + place * (TILES * BLOCK_P * WIDTH), p, (h1, h2, h3), TILES * BLOCK_P, HALF, STILL)
        s1, s2 = _turning(entered, place * (TILES * BLOCK_P), p, WIDTH, HALF)
        row = (chunk * GROUPS + head // (HEADS // GROUPS)) * (TOKENS * RANKS)
        trig = make_trig(steps, omega, phases, place, rows, end, omega_token, TOKENS, RANKS, PAIRS, HALF)
        k = make_keys(B, row, B_bias, trig, rows[2], head, RANK, STILL, DTYPE)
        last = load_step(steps, place, TOKENS - 1, TOKENS, SUM)
        weight = load_step(steps, place, entry // RANKS, TOKENS, SUM if REVERSE else WEIGHTED)
        if REVERSE:
            u = load_entries(x + head * x_head, rows, p, x_token, x_rank, P)
        else:
            u, weight = load_inputs(x, mimo_x, rows, head, p, x_token, x_head, P, RANK, RANKS), last - weight
        added = tl.trans((u * tl.exp2(weight)[:, None]).to(DTYPE))
        h1, h2, h3 = added_to((h1, h2, h3), tl.exp2(last), added, k, STILL, PRECISION)
        decayed += last
        _store_turned(turned, (place * TILES + tile) * HALF, h1, h2, s1, s2)
    h = (h1, h2, h3)
    _store_end(h, decayed, ends, kept, segments, boundaries, segment, head, p, HEADS, P, HALF, STILL, REVERSE)


@triton.jit
def _start(entering, offset, p, P: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr):
    """The state that enters a segment; without `entering` it is zero."""
    if entering is not None:
        h1, h2, h3 = load_parts(entering + offset, p, P, HALF, STILL)
    else:
        h1, h2, h3 = tl.zeros((p.shape[0], HALF), tl.float32), tl.zeros((p.shape[0], HALF), tl.float32), 0.0
        if STILL > 0:
            h3 = tl.zeros((p.shape[0], STILL), tl.float32)
    return h1, h2, h3


@triton.jit
def _turning(states, row, p, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """The columns of a state that turn; asked for long before they are needed, because nobody loads them ahead."""
    s1, s2 = 0.0, 0.0
    if states is not None:
        s1 = load_part(states + row * WIDTH, p, p.shape[0], WIDTH, 0, HALF)
        s2 = load_part(states + row * WIDTH, p, p.shape[0], WIDTH, HALF, HALF)
    return s1, s2


@triton.jit
def _store_turned(out, place, h1, h2, s1, s2):
    """What turning a state by a common angle would change, given the gradient of what it becomes."""
    if out is not None:
        change = tl.sum(h2 * s1.to(tl.float32) - h1 * s2.to(tl.float32), 0)
        tl.store(out + place + tl.arange(0, h1.shape[1]), change)


@triton.jit
def _store_end(
    parts, decayed, ends, kept, segments, boundaries, segment, head, p,
    HEADS: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a segment adds and keeps; or the state after the last one of a sequence."""
    WIDTH: tl.constexpr = 2 * HALF + STILL
    if boundaries is None:
        store_parts(ends + (segment * HEADS + head) * (P * WIDTH), p, parts, P, HALF, STILL)
        tl.store(kept + segment * HEADS + head, decayed / LOG2E)
    elif tl.load(segments + 5 * segment + (3 if REVERSE else 4)) == 1:
        sequence = tl.load(segments + 5 * segment + 2).to(tl.int64)
        store_parts(ends + (sequence * HEADS + head) * (P * WIDTH), p, parts, P, HALF, STILL)
