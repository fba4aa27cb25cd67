"""Keys and queries of a chunk on a GPU, rebuilt where they are used: rows of B or C, the bias of the head, its angle.

Every head has its own, so that in memory they would be many times the input. A chunk is a tile of entries: the ranks of
a token follow each other, filled up to a power of two. The first 2 s columns of a tile turn, pairs side by side
(`turned`); the others stand still, and are a tile of their own (`still`) that may be missing.

Angles are *phases*: 32-bit fractions of a turn. Integers wrap by themselves and their sums are exact, so the angle of a
token does not depend on how a sequence was cut, and no sequence is too long.
"""

import triton
import triton.language as tl

from everstate.ops.triton_common import INTERPRETED, dot

TURNS: tl.constexpr = tl.constexpr(0.15915494309189535)
"""1 / (2 pi)."""
PHASES: tl.constexpr = tl.constexpr(4294967296.0)
"""Phases of a turn."""
RADIANS: tl.constexpr = tl.constexpr(6.283185307179586 / 4294967296.0)
"""The angle of one phase."""
COARSE: tl.constexpr = tl.constexpr(3072.0)
"""A float32 of this size ends at 2^-12: adding it leaves that many digits of a fraction in the lowest bits."""
FINE: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it leaves an integer in the lowest bits."""


NUMBERS: tl.constexpr = tl.constexpr(5)
"""Numbers per token and head, made by `steps_kernel`, logarithms to the base 2:"""
SUM: tl.constexpr = tl.constexpr(0)
"""the sum of log decays since the start of the chunk;"""
WEIGHTED: tl.constexpr = tl.constexpr(1)
"""that less the log of the scale, which is what the token adds to later ones;"""
SCALE: tl.constexpr = tl.constexpr(2)
"""the scale;"""
OWN: tl.constexpr = tl.constexpr(3)
"""the part of it that the token adds to its own output, `lam dt`;"""
DT: tl.constexpr = tl.constexpr(4)
"""and dt."""


@triton.jit
def phase_of(angle, LONG: tl.constexpr):
    """The phase of an angle: LONG where thousands of them are summed, else right to 1e-7 of it, for up to 1,000 turns.

    The first 12 bits and the others come from two float32 additions, which are several times as fast as conversions.
    """
    if LONG:
        return tl.floor(angle.to(tl.float64) * (TURNS * PHASES) + 0.5).to(tl.int64).to(tl.int32)
    else:
        turns = angle * TURNS
        coarse = turns + COARSE
        fine = (turns - (coarse - COARSE)) * PHASES + FINE
        # The bits of COARSE itself are shifted out; those of FINE are the constant.
        return (coarse.to(tl.int32, bitcast=True) << 20) + (fine.to(tl.int32, bitcast=True) - 0x4B400000)


@triton.jit
def angle_of(phase):
    """The angle of a phase, between -pi and pi."""
    return phase.to(tl.float32) * RADIANS


@triton.jit
def cosine(angle):
    """Right to 5e-7 for angles between -pi and pi: one instruction."""
    if INTERPRETED:
        return tl.cos(angle)
    else:
        return tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)


@triton.jit
def sine(angle):
    if INTERPRETED:
        return tl.sin(angle)
    else:
        return tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)


@triton.jit
def load_rates(omega, start, end, tokens, pairs, omega_token, PAIRS: tl.constexpr):
    """The rows of omega of a chunk, zeros where there are none."""
    at = omega + start.to(tl.int64) * omega_token + (tokens[:, None] * omega_token + pairs[None, :])
    return tl.load(at, mask=where_given(start + tokens < end, pairs, PAIRS), other=0.0).to(tl.float32)


@triton.jit
def turning(
    steps, phases, omega, place, start, end, omega_token,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of a chunk of a head, by entry and pair; `place` is chunk * HEADS + head."""
    tokens, pairs = tl.arange(0, TOKENS), tl.arange(0, BLOCK_T // 2)
    rate = load_rates(omega, start, end, tokens, pairs, omega_token, PAIRS)
    turns = phase_of(load_step(steps, place, tokens, TOKENS, DT)[:, None] * rate, False)
    before = tl.load(phases + place * PAIRS + pairs, mask=pairs < PAIRS, other=0)
    angle = angle_of(tl.cumsum(turns, 0) + before[None, :])
    return by_entry(cosine(angle), RANKS), by_entry(sine(angle), RANKS)


@triton.jit
def where_given(rows, columns, WIDTH: tl.constexpr):
    """The mask of a tile: rows that exist, and columns below WIDTH."""
    mask = rows[:, None]
    if columns.shape[0] != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return mask


@triton.jit
def by_entry(tile, RANKS: tl.constexpr):
    """Rows of tokens, once for each rank."""
    if RANKS == 1:
        return tile
    else:
        tile = tl.broadcast_to(tile[:, None, :], (tile.shape[0], RANKS, tile.shape[1]))
        return tl.reshape(tile, (tile.shape[0] * RANKS, tile.shape[2]))


@triton.jit
def of_ranks(tile, TOKENS: tl.constexpr):
    """Rows of ranks, once for each token."""
    WIDTH: tl.constexpr = tile.shape[1]
    RANKS: tl.constexpr = tile.shape[0]
    return tl.reshape(tl.broadcast_to(tile[None, :, :], (TOKENS, RANKS, WIDTH)), (TOKENS * RANKS, WIDTH))


@triton.jit
def by_token(tile, RANKS: tl.constexpr):
    """Rows of entries, summed over the ranks of each token."""
    if RANKS == 1:
        return tile
    elif len(tile.shape) == 1:
        return tl.sum(tl.reshape(tile, (tile.shape[0] // RANKS, RANKS)), 1)
    else:
        return tl.sum(tl.reshape(tile, (tile.shape[0] // RANKS, RANKS, tile.shape[1])), 1)


@triton.jit
def by_rank(tile, RANKS: tl.constexpr):
    """Rows of entries, summed over the tokens of each rank."""
    if RANKS == 1:
        return tl.sum(tile, 0)[None, :]
    else:
        return tl.sum(tl.reshape(tile, (tile.shape[0] // RANKS, RANKS, tile.shape[1])), 0)


@triton.jit
def pairs_of(tile):
    """First and second numbers of the pairs of a tile."""
    ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.reshape(tile, (ROWS, HALF, 2)))


@triton.jit
def paired(first, second):
    """The reverse of `pairs_of`."""
    ROWS: tl.constexpr = first.shape[0]
    WIDTH: tl.constexpr = first.shape[1] * 2
    return tl.reshape(tl.join(first, second), (ROWS, WIDTH))


@triton.jit
def entries(start, end, TOKENS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The rows of a chunk: its first token; of each entry the token within it, the rank, and whether it exists."""
    entry = tl.arange(0, TOKENS * RANKS)
    token, rank = entry // RANKS, entry % RANKS
    return start, token, rank, (start + token < end) & (rank < RANK)


@triton.jit
def _load_biased(
    base, bias, rows, head, columns, stride, rank_stride,
    WIDTH: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    start, token, rank, inside = rows
    mask, at = where_given(inside, columns, WIDTH), (token * stride + rank * rank_stride)[:, None]
    tile = tl.load(base + start.to(tl.int64) * stride + (at + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        if RANK == 1:
            tile += tl.load(bias + head * N + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]
        else:
            ranks = tl.arange(0, RANKS)
            given = where_given(ranks < RANK, columns, WIDTH)
            own = tl.load(bias + head * (RANK * N) + (ranks[:, None] * N + columns[None, :]), mask=given, other=0.0)
            tile += of_ranks(own.to(tl.float32), tile.shape[0] // RANKS)
    return tile


@triton.jit
def turned(
    base, bias, rows, head, cos, sin, stride, rank_stride,
    N: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PAIRS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The columns of keys or queries that turn; `base` is B or C of the group."""
    columns = tl.arange(0, 2 * cos.shape[1])
    a, b = pairs_of(_load_biased(base, bias, rows, head, columns, stride, rank_stride, 2 * PAIRS, N, RANK, RANKS))
    return paired(a * cos - b * sin, a * sin + b * cos).to(DTYPE)


@triton.jit
def still(
    base, bias, rows, head, stride, rank_stride,
    N: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The columns that stand still, or 0 where all turn."""
    if BLOCK_S == 0:
        return 0.0
    else:
        columns = tl.arange(0, BLOCK_S)
        own = None if bias is None else bias + 2 * PAIRS
        base += 2 * PAIRS
        return _load_biased(base, own, rows, head, columns, stride, rank_stride, N - 2 * PAIRS, N, RANK, RANKS).to(
            DTYPE
        )


@triton.jit
def load_inputs(
    x, mimo_x, rows, head, p, x_token, x_head, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """The inputs of a chunk by entry: those of the token, times the factors of the rank."""
    start, token, _, inside = rows
    at = x + start.to(tl.int64) * x_token + head * x_head
    u = tl.load(at + (token[:, None] * x_token + p[None, :]), mask=where_given(inside, p, P), other=0.0)
    if mimo_x is not None:
        u = (u.to(tl.float32) * load_factors(mimo_x, head, p, u.shape[0], P, RANK, RANKS)).to(u.dtype)
    return u


@triton.jit
def load_factors(mimo_x, head, p, ROWS: tl.constexpr, P: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The factors of the inputs, by entry."""
    ranks = tl.arange(0, RANKS)
    at = mimo_x + head * (RANK * P) + (ranks[:, None] * P + p[None, :])
    factors = tl.load(at, mask=where_given(ranks < RANK, p, P), other=0.0).to(tl.float32)
    return of_ranks(factors, ROWS // RANKS)


@triton.jit
def load_entries(base, rows, columns, stride, rank_stride, WIDTH: tl.constexpr):
    """Rows of a tensor that has its own for each rank; `base` is that of the head."""
    start, token, rank, inside = rows
    at = (token * stride + rank * rank_stride)[:, None] + columns[None, :]
    return tl.load(base + start.to(tl.int64) * stride + at, mask=where_given(inside, columns, WIDTH), other=0.0)


@triton.jit
def store_entries(base, rows, columns, stride, value, WIDTH: tl.constexpr, RANK: tl.constexpr):
    """Rows of a dense tensor by token and rank, `stride` numbers apart; those that exist."""
    start, token, rank, inside = rows
    at = base + start.to(tl.int64) * (RANK * stride) + (((token * RANK + rank) * stride)[:, None] + columns[None, :])
    tl.store(at, value.to(base.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_step(steps, place, token, TOKENS: tl.constexpr, NUMBER: tl.constexpr):
    """One of the numbers per token and head, by entry."""
    return tl.load(steps + place * (NUMBERS * TOKENS) + NUMBER * TOKENS + token)


@triton.jit
def load_part(base, p, n, P: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """Rows p and `WIDTH` columns of a state of P x N."""
    place = p[:, None] * N + n[None, :]
    if p.shape[0] == P and n.shape[0] == WIDTH:
        return tl.load(base + place)
    return tl.load(base + place, mask=where_given(p < P, n, WIDTH), other=0.0)


@triton.jit
def load_halves(
    base, p, P: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """A state as the columns that turn, and those that stand still."""
    turned = load_part(base, p, tl.arange(0, BLOCK_T), P, N, 2 * PAIRS)
    still = 0.0
    if BLOCK_S > 0:
        still = load_part(base + 2 * PAIRS, p, tl.arange(0, BLOCK_S), P, N, N - 2 * PAIRS)
    return turned, still


@triton.jit
def store_halves(
    base, p, turned, still, P: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BLOCK_T)
    mask = where_given(p < P, n, 2 * PAIRS)
    tl.store(base + (p[:, None] * N + n[None, :]), turned.to(base.dtype.element_ty), mask=mask)
    if BLOCK_S > 0:
        n = tl.arange(0, BLOCK_S)
        mask = where_given(p < P, n, N - 2 * PAIRS)
        tl.store(base + 2 * PAIRS + (p[:, None] * N + n[None, :]), still.to(base.dtype.element_ty), mask=mask)


@triton.jit
def across(turned, still, other_turned, other_still, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr):
    """Products of the rows of one matrix with the rows of another, both in two parts."""
    dtype: tl.constexpr = turned.dtype
    out = dot(turned, tl.trans(other_turned.to(dtype)), None, PRECISION)
    if BLOCK_S > 0:
        out = dot(still, tl.trans(other_still.to(dtype)), out, PRECISION)
    return out


@triton.jit
def added_to(turned, still, decay, added, keys, still_keys, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr):
    """A state after a chunk: what it keeps, and `added @ keys`."""
    turned = dot(added, keys, turned * decay, PRECISION)
    if BLOCK_S > 0:
        still = dot(added, still_keys, still * decay, PRECISION)
    return turned, still


@triton.jit
def factors(sums, weighted, own, later, earlier):
    """What token i receives from token j before it, `scale_j exp(sum_i - sum_j)`; `own_i` from itself; else zero."""
    return tl.where(later > earlier, tl.exp2(sums - weighted), tl.where(later == earlier, own, 0.0))
