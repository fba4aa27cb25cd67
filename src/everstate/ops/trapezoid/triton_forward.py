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
    load_halves,
    load_inputs,
    load_step,
    still,
    store_entries,
    store_halves,
    turned,
    turning,
)
from everstate.ops.triton_common import LOG2E, dot


@triton.jit
def scan_kernel(
    x, mimo_x, steps, omega, phases, B, C, B_bias, C_bias, D, entering, y, final, chunks, segments,
    x_token, x_head, omega_token, B_token, B_rank, B_group, C_token, C_rank, C_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per segment, head and tile of p."""
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    DTYPE: tl.constexpr = x.dtype.element_ty
    head, tile = tl.program_id(0) // TILES % HEADS, tl.program_id(0) % TILES
    segment = (tl.program_id(0) // TILES // HEADS).to(tl.int64)
    B += head // (HEADS // GROUPS) * B_group
    C += head // (HEADS // GROUPS) * C_group
    first, count = tl.load(segments + 5 * segment), tl.load(segments + 5 * segment + 1)
    token, p = tl.arange(0, TOKENS * RANKS) // RANKS, tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h, hs = load_halves(entering + (segment * HEADS + head) * P * N, p, P, N, PAIRS, BLOCK_T, BLOCK_S)
    for step in range(count):
        chunk = (first + step).to(tl.int64)
        start, end, place = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1), chunk * HEADS + head
        rows = entries(start, end, TOKENS, RANK, RANKS)
        cos, sin = turning(steps, phases, omega, place, start, end, omega_token, TOKENS, RANKS, PAIRS, BLOCK_T)
        k = turned(B, B_bias, rows, head, cos, sin, B_token, B_rank, N, RANK, RANKS, PAIRS, DTYPE)
        ks = still(B, B_bias, rows, head, B_token, B_rank, N, RANK, RANKS, PAIRS, BLOCK_S, DTYPE)
        q = turned(C, C_bias, rows, head, cos, sin, C_token, C_rank, N, RANK, RANKS, PAIRS, DTYPE)
        qs = still(C, C_bias, rows, head, C_token, C_rank, N, RANK, RANKS, PAIRS, BLOCK_S, DTYPE)
        u = load_inputs(x, mimo_x, rows, head, p, x_token, x_head, P, RANK, RANKS)
        sums, own = load_step(steps, place, token, TOKENS, SUM), load_step(steps, place, token, TOKENS, OWN)
        weighted = load_step(steps, place, token, TOKENS, WEIGHTED)
        last = load_step(steps, place, TOKENS - 1, TOKENS, SUM)
        given = factors(sums[:, None], weighted[None, :], own[:, None], token[:, None], token[None, :])
        weights = (across(q, qs, k, ks, BLOCK_S, PRECISION) * given).to(DTYPE)
        out = across(q, qs, h, hs, BLOCK_S, PRECISION) * tl.exp2(sums)[:, None]
        out = dot(weights, u, out, PRECISION)
        if D is not None:
            out += tl.load(D + head).to(tl.float32) * u.to(tl.float32)
        store_entries(y + head * P, rows, p, HEADS * P, out, P, RANK)
        added = tl.trans((u * tl.exp2(last - weighted)[:, None]).to(DTYPE))
        h, hs = added_to(h, hs, tl.exp2(last), added, k, ks, BLOCK_S, PRECISION)
    if tl.load(segments + 5 * segment + 4) == 1:
        sequence = tl.load(segments + 5 * segment + 2).to(tl.int64)
        store_halves(final + (sequence * HEADS + head) * P * N, p, h, hs, P, N, PAIRS, BLOCK_T, BLOCK_S)


@triton.jit
def sweep_kernel(
    x, mimo_x, steps, omega, phases, B, B_bias, entering, boundaries, ends, kept, chunks, segments,
    x_token, x_rank, x_head, omega_token, B_token, B_rank, B_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Only the state, forwards; or only its gradient, backwards, with dy for x and C for B.

    Without `boundaries` it starts from zero and leaves in `ends` what each segment adds, in `kept` the log of how much
    of an older state it keeps. With it, the state before each chunk goes there, and that after the last segment to
    `ends`.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    DTYPE: tl.constexpr = x.dtype.element_ty
    head, tile = tl.program_id(0) // TILES % HEADS, tl.program_id(0) % TILES
    segment = (tl.program_id(0) // TILES // HEADS).to(tl.int64)
    B += head // (HEADS // GROUPS) * B_group
    first, count = tl.load(segments + 5 * segment), tl.load(segments + 5 * segment + 1)
    token, p = tl.arange(0, TOKENS * RANKS) // RANKS, tile * BLOCK_P + tl.arange(0, BLOCK_P)
    h, hs, decayed = tl.zeros((BLOCK_P, BLOCK_T), tl.float32), 0.0, 0.0
    if BLOCK_S > 0:
        hs = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)
    if entering is not None:
        h, hs = load_halves(entering + (segment * HEADS + head) * P * N, p, P, N, PAIRS, BLOCK_T, BLOCK_S)
    for step in range(count):
        chunk = (first + (count - 1 - step if REVERSE else step)).to(tl.int64)
        start, end, place = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1), chunk * HEADS + head
        if boundaries is not None:
            store_halves(boundaries + place * P * N, p, h, hs, P, N, PAIRS, BLOCK_T, BLOCK_S)
        rows = entries(start, end, TOKENS, RANK, RANKS)
        cos, sin = turning(steps, phases, omega, place, start, end, omega_token, TOKENS, RANKS, PAIRS, BLOCK_T)
        k = turned(B, B_bias, rows, head, cos, sin, B_token, B_rank, N, RANK, RANKS, PAIRS, DTYPE)
        ks = still(B, B_bias, rows, head, B_token, B_rank, N, RANK, RANKS, PAIRS, BLOCK_S, DTYPE)
        last = load_step(steps, place, TOKENS - 1, TOKENS, SUM)
        if REVERSE:
            u = load_entries(x + head * x_head, rows, p, x_token, x_rank, P)
            weight = tl.exp2(load_step(steps, place, token, TOKENS, SUM))
        else:
            u = load_inputs(x, mimo_x, rows, head, p, x_token, x_head, P, RANK, RANKS)
            weight = tl.exp2(last - load_step(steps, place, token, TOKENS, WEIGHTED))
        added = tl.trans((u * weight[:, None]).to(DTYPE))
        h, hs = added_to(h, hs, tl.exp2(last), added, k, ks, BLOCK_S, PRECISION)
        decayed += last
    if boundaries is None:
        store_halves(ends + (segment * HEADS + head) * P * N, p, h, hs, P, N, PAIRS, BLOCK_T, BLOCK_S)
        tl.store(kept + segment * HEADS + head, decayed / LOG2E)
    elif tl.load(segments + 5 * segment + (3 if REVERSE else 4)) == 1:
        sequence = tl.load(segments + 5 * segment + 2).to(tl.int64)
        store_halves(ends + (sequence * HEADS + head) * P * N, p, h, hs, P, N, PAIRS, BLOCK_T, BLOCK_S)
