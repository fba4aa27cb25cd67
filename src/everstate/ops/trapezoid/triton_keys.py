"""Keys and queries of a chunk on a GPU, rebuilt where they are used: rows of B or C, the bias of the head, its angle.

A chunk is a tile of entries: the ranks of a token follow each other, filled up to a power of two. Columns of keys,
queries and states lie in *parts*, each filled up to a power of two with zeros: the first members of the pairs that
turn, their second members, and the columns that stand still, a part that may be missing. So the two numbers that a turn
mixes are at the same place of two tiles. `triton_prepare` brings B, C and biases into this order, and states and
gradients back.

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
LONGEST: tl.constexpr = tl.constexpr(6755399441055744.0)
"""1.5 * 2^52: the same for a float64."""
FINE: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it leaves an integer in the lowest bits."""


NUMBERS: tl.constexpr = tl.constexpr(5)
"""Numbers per token and head, made by `steps_kernel`, logarithms to the base 2:"""
SUM: tl.constexpr = tl.constexpr(0)
"""the sum of log decays since the start of the chunk;"""
WEIGHTED: tl.constexpr = tl.constexpr(1)
"""that less the log of the scale, which is what the token adds to later ones;"""
OWN: tl.constexpr = tl.constexpr(2)
"""the part of the scale that the token adds to its own output, `lam dt`;"""
DT: tl.constexpr = tl.constexpr(3)
"""dt;"""
SCALE: tl.constexpr = tl.constexpr(4)
"""and the scale, which kernels for Hopper do not read: the copy engine brings them the numbers before it at once."""


@triton.jit
def phase_of(angle, LONG: tl.constexpr):
    """The phase of an angle: LONG where thousands of them are summed, else right to 1e-7 of it, for up to 1,000 turns.

    LONG adds a float64 that leaves an integer in the lowest bits. Else the first 12 bits and the others come from two
    float32 additions: conversions take several times as long.
    """
    if LONG:
        return (angle.to(tl.float64) * (TURNS * PHASES) + LONGEST).to(tl.int64, bitcast=True).to(tl.int32)
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
def where_given(rows, columns, WIDTH: tl.constexpr):
    """The mask of a tile: rows that exist, and columns below WIDTH."""
    mask = rows[:, None]
    if columns.shape[0] != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return mask


@triton.jit
def of_ranks(tile, TOKENS: tl.constexpr):
    """Rows of ranks, once for each token."""
    WIDTH: tl.constexpr = tile.shape[1]
    RANKS: tl.constexpr = tile.shape[0]
    return tl.reshape(tl.broadcast_to(tile[None, :, :], (TOKENS, RANKS, WIDTH)), (TOKENS * RANKS, WIDTH))


@triton.jit
def by_entry(tile, RANKS: tl.constexpr):
    """Rows of tokens, once for each rank."""
    if RANKS == 1:
        return tile
    else:
        TOKENS: tl.constexpr = tile.shape[0]
        WIDTH: tl.constexpr = tile.shape[1]
        several = tl.broadcast_to(tile[:, None, :], (TOKENS, RANKS, WIDTH))
        return tl.reshape(several, (TOKENS * RANKS, WIDTH))


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
def entries(start, end, TOKENS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The rows of a chunk: its first token; of each entry the token within it, the rank, and whether it exists."""
    entry = tl.arange(0, TOKENS * RANKS)
    token, rank = entry // RANKS, entry % RANKS
    return start, token, rank, (start + token < end) & (rank < RANK)


@triton.jit
def source_of(at, N: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The column outside of column `at` of the parts, and whether there is one."""
    pair, rest = at % HALF, at - 2 * HALF
    if INTERLEAVED:
        turning, still = 2 * pair + at // HALF, 2 * PAIRS + rest
    else:
        turning, still = pair + at // HALF * (N // 2), PAIRS + rest + tl.where(rest < N // 2 - PAIRS, 0, PAIRS)
    turns = at < 2 * HALF
    return tl.where(turns, turning, still), tl.where(turns, pair < PAIRS, rest < N - 2 * PAIRS)


@triton.jit
def place_of(column, N: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The column of the parts for a column outside, the reverse of `source_of`."""
    if INTERLEAVED:
        pair, second, still = column // 2, column % 2, column - 2 * PAIRS
    else:
        second = tl.where(column < N // 2, 0, 1)
        pair, still = column - second * (N // 2), column - PAIRS - second * PAIRS
    return tl.where(pair < PAIRS, second * HALF + pair, 2 * HALF + still)


@triton.jit
def load_part(base, rows, GIVEN: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """SIZE columns from FIRST on of rows that are WIDTH numbers long, of which GIVEN are there."""
    at = rows[:, None] * WIDTH + (tl.arange(0, SIZE) + FIRST)[None, :]
    if rows.shape[0] == GIVEN:
        return tl.load(base + at)
    return tl.load(base + at, mask=(rows < GIVEN)[:, None], other=0.0)


@triton.jit
def load_parts(base, rows, GIVEN: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr):
    """A state, or keys, as three tiles."""
    WIDTH: tl.constexpr = 2 * HALF + STILL
    still = 0.0
    if STILL > 0:
        still = load_part(base, rows, GIVEN, WIDTH, 2 * HALF, STILL)
    return load_part(base, rows, GIVEN, WIDTH, 0, HALF), load_part(base, rows, GIVEN, WIDTH, HALF, HALF), still


@triton.jit
def load_tile(source, row, FIRST: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS from `row` on of a dense matrix WIDTH numbers wide, and SIZE columns from FIRST on."""
    return load_part(source + row.to(tl.int64) * WIDTH, tl.arange(0, ROWS), ROWS, WIDTH, FIRST, SIZE)


@triton.jit
def load_tiles(source, row, ROWS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr):
    """`load_parts` of ROWS from `row` on of a dense matrix."""
    return load_parts(source + row.to(tl.int64) * (2 * HALF + STILL), tl.arange(0, ROWS), ROWS, HALF, STILL)


@triton.jit
def _with_bias(tile, bias, rank, head, FIRST: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of B or C from FIRST on, with the bias of the head."""
    tile = tile.to(tl.float32)
    if bias is not None:
        columns = tl.arange(0, tile.shape[1]) + FIRST
        if RANK == 1:
            tile += tl.load(bias + head * WIDTH + columns)[None, :]
        else:
            own = bias + head * (RANK * WIDTH) + (rank[:, None] * WIDTH + columns[None, :])
            tile += tl.load(own, mask=(rank < RANK)[:, None], other=0.0)
    return tile


@triton.jit
def make_trig(
    steps, omega, phases, place, rows, end, omega_token,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of a chunk of a head, by entry and pair, from the phases with which it starts; `place` is
    chunk * HEADS + head."""
    token, pairs = tl.arange(0, TOKENS), tl.arange(0, HALF)
    rate = load_rates(omega, rows[0], end, token, pairs, omega_token, PAIRS)
    turns = phase_of(load_step(steps, place, token, TOKENS, DT)[:, None] * rate, False)
    before = tl.load(phases + place * PAIRS + pairs, mask=pairs < PAIRS, other=0)
    angle = angle_of(tl.cumsum(turns, 0) + before[None, :])
    return by_entry(cosine(angle), RANKS), by_entry(sine(angle), RANKS)


@triton.jit
def turning_keys(
    source, row, bias, trig, rank, head, RANK: tl.constexpr, STILL: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The columns of the keys of a chunk of a head that turn, from those of B, or of queries from C, in two parts;
    `row` is the first of the chunk."""
    c, s = trig
    HALF: tl.constexpr = c.shape[1]
    WIDTH: tl.constexpr = 2 * HALF + STILL
    a = load_tile(source, row, 0, c.shape[0], HALF, WIDTH)
    b = load_tile(source, row, HALF, c.shape[0], HALF, WIDTH)
    a = _with_bias(a, bias, rank, head, 0, RANK, WIDTH)
    b = _with_bias(b, bias, rank, head, HALF, RANK, WIDTH)
    return (a * c - b * s).to(DTYPE), (a * s + b * c).to(DTYPE)


@triton.jit
def still_keys(
    source, row, bias, rank, head, RANK: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Likewise the columns that stand still."""
    WIDTH: tl.constexpr = 2 * HALF + STILL
    still = load_tile(source, row, 2 * HALF, rank.shape[0], STILL, WIDTH)
    return _with_bias(still, bias, rank, head, 2 * HALF, RANK, WIDTH).to(DTYPE)


@triton.jit
def make_keys(source, row, bias, trig, rank, head, RANK: tl.constexpr, STILL: tl.constexpr, DTYPE: tl.constexpr):
    """All columns of the keys of a chunk of a head, or of queries, in three parts."""
    first, second = turning_keys(source, row, bias, trig, rank, head, RANK, STILL, DTYPE)
    rest = 0.0
    if STILL > 0:
        rest = still_keys(source, row, bias, rank, head, RANK, first.shape[1], STILL, DTYPE)
    return first, second, rest


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
def store_parts(base, rows, parts, GIVEN: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr):
    """The reverse of `load_parts`."""
    first, second, still = parts
    at = rows[:, None] * (2 * HALF + STILL) + tl.arange(0, HALF)[None, :]
    dtype: tl.constexpr = base.dtype.element_ty
    tl.store(base + at, first.to(dtype), mask=(rows < GIVEN)[:, None])
    tl.store(base + HALF + at, second.to(dtype), mask=(rows < GIVEN)[:, None])
    if STILL > 0:
        at = rows[:, None] * (2 * HALF + STILL) + tl.arange(0, STILL)[None, :]
        tl.store(base + 2 * HALF + at, still.to(dtype), mask=(rows < GIVEN)[:, None])


@triton.jit
def across(parts, others, STILL: tl.constexpr, PRECISION: tl.constexpr):
    """Products of the rows of one matrix with the rows of another."""
    dtype: tl.constexpr = parts[0].dtype
    out = dot(parts[0], tl.trans(others[0].to(dtype)), None, PRECISION)
    out = dot(parts[1], tl.trans(others[1].to(dtype)), out, PRECISION)
    if STILL > 0:
        out = dot(parts[2], tl.trans(others[2].to(dtype)), out, PRECISION)
    return out


@triton.jit
def added_to(state, decay, added, keys, STILL: tl.constexpr, PRECISION: tl.constexpr):
    """A state after a chunk: what it keeps, and `added @ keys`."""
    still = state[2]
    if STILL > 0:
        still = dot(added, keys[2], still * decay, PRECISION)
    first = dot(added, keys[0], state[0] * decay, PRECISION)
    return first, dot(added, keys[1], state[1] * decay, PRECISION), still


@triton.jit
def factors(sums, weighted, own, later, earlier):
    """What token i receives from token j before it, `scale_j exp(sum_i - sum_j)`; `own_i` from itself; else zero."""
    return tl.where(later > earlier, tl.exp2(sums - weighted), tl.where(later == earlier, own, 0.0))
