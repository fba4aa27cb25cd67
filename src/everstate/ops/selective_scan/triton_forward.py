"""The sweep of the selective scan that gives outputs, and those that find what segments add and pass it on."""

import triton
import triton.language as tl

from everstate.ops.triton_common import INTERPRETED, LOG2E, softplus


@triton.jit
def load_tile(base, channels, at, inside, STRIDE: tl.constexpr):
    """Numbers `(channel, token)` of the tokens from `base` on, in float32."""
    place = (base + channels)[:, None] + (at * STRIDE)[None, :]
    return tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_tile(base, channels, at, inside, value, STRIDE: tl.constexpr):
    place = (base + channels)[:, None] + (at * STRIDE)[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside[:, None])


@triton.jit
def of_token(tile, at, token):
    """One token of a tile. A thread holds all of them, so a compiler only sees zeros added to the bits of a number."""
    return tl.sum(tl.where((at == token)[None, :], tile.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp2(-x * LOG2E))
    # A division would scale its operands first.
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + tl.exp2(-x * LOG2E)], tl.float32, True, 1
    )


@triton.jit
def bytes_of(pointer):
    """Bytes of a number."""
    return pointer.dtype.element_ty.primitive_bitwidth // 8


@triton.jit
def _rows_of(BC, x, dt, z, N: tl.constexpr, X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr,
             DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Where the first rows of all that is read begin, and the bytes from row to row: a quarter of a warp for each."""
    if INTERPRETED:
        return 0, 0
    d = tl.program_id(0) % ((DIM + BLOCK_D - 1) // BLOCK_D) * BLOCK_D
    which = tl.arange(0, 32) // 8
    base, stride = (
        tl.where(which == 0, BC.to(tl.int64), (x + d).to(tl.int64)),
        tl.where(which == 0, 8 * N, X * bytes_of(x)),
    )
    base, stride = tl.where(which == 2, (dt + d).to(tl.int64), base), tl.where(which == 2, DT * bytes_of(dt), stride)
    if z is not None:
        base, stride = tl.where(which == 3, (z + d).to(tl.int64), base), tl.where(which == 3, Z * bytes_of(z), stride)
    return base, stride


@triton.jit
def fetch(rows, strides, token, first, end, COUNT: tl.constexpr):
    """Have the cache of the multiprocessor fetch `COUNT` rows of each tensor, as far as they lie in `[first, end)`."""
    if INTERPRETED:
        return
    at = tl.minimum(tl.maximum(token + tl.arange(0, 32) % COUNT, first), end - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [rows + at * strides], tl.int32, False, 1
    )


@triton.jit
def own(segments, unit, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of this program: its segment, its channels, which of them exist."""
    BLOCKS: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    segment = (tl.program_id(0) // BLOCKS).to(tl.int64)
    channels = (tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)) * unit
    if DIM % BLOCK_D == 0:
        return segment, channels, tl.full((BLOCK_D,), 1, tl.int1)
    return segment, channels, channels < DIM


@triton.jit
def vector(D, channels, inside):
    """D, or zeros."""
    skip = tl.zeros(channels.shape, tl.float32)
    if D is not None:
        skip = tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)
    return skip


@triton.jit
def states_at(base, index, n, channels, DIM: tl.constexpr, N: tl.constexpr):
    """Pointers to a state, laid out `(n, channel)` in memory."""
    return (base + index.to(tl.int64) * (N * DIM) + channels)[:, None] + (n * DIM)[None, :]


@triton.jit
def _inputs(x, dt, z, token, channels, inside, TILE: tl.constexpr, X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr):
    """x, dt and z of the tokens from `token` on, as they lie in memory; x for z where there is none."""
    at = tl.arange(0, TILE)
    x_tile = tl.load((x + token * X + channels)[:, None] + (at * X)[None, :], mask=inside[:, None], other=0.0)
    dt_tile = tl.load((dt + token * DT + channels)[:, None] + (at * DT)[None, :], mask=inside[:, None], other=0.0)
    z_tile = x_tile
    if z is not None:
        z_tile = tl.load((z + token * Z + channels)[:, None] + (at * Z)[None, :], mask=inside[:, None], other=0.0)
    return x_tile, dt_tile, z_tile


@triton.jit
def _scan_tile(
    h, a, skip, bias, inputs, steps, gate, BC, y, token, channels, inside, n,
    DIM: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Outputs of the tokens of one tile, and the state after them."""
    at = tl.arange(0, TILE)
    u, steps = inputs.to(tl.float32), steps.to(tl.float32)
    if BIAS:
        steps = softplus(steps + bias[:, None])
    written = u * steps
    out = u * skip[:, None]
    BC += token * 2 * N
    for t in tl.static_range(TILE):
        k, q = tl.load(BC + 2 * N * t + n), tl.load(BC + 2 * N * t + N + n)
        h = h * tl.exp2(a * of_token(steps, at, t)[:, None]) + k[None, :] * of_token(written, at, t)[:, None]
        out += tl.where((at == t)[None, :], tl.sum(h * q[None, :], 1)[:, None], 0.0)
    if GATE:
        opened = gate.to(tl.float32)
        out *= opened * sigmoid(opened)
    store_tile(y + token * DIM, channels, at, inside, out, DIM)
    return h


@triton.jit(do_not_specialize=["unit"])
def scan_kernel(
    x, dt, A, BC, D, z, dt_bias, state, entering, y, final, segments, sequences, unit,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One program per block of channels and segment, or `WHOLE` sequence; `KEEP` the states that enter its segments."""
    segment, channels, inside = own(segments, unit, DIM, BLOCK_D)
    n = tl.arange(0, N)
    a = tl.load(states_at(A, segment * 0, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    if WHOLE:
        h = tl.load(states_at(state, segment, n, channels, DIM, N), mask=inside[:, None], other=0.0)
        first, count = tl.load(sequences + 2 * segment).to(tl.int64), tl.load(sequences + 2 * segment + 1)
    else:
        h = tl.load(states_at(entering, segment, n, channels, DIM, N), mask=inside[:, None], other=0.0)
        first, count = segment, 1
    skip = vector(D, channels, inside)
    BIAS: tl.constexpr = dt_bias is not None
    GATE: tl.constexpr = z is not None
    bias = vector(dt_bias, channels, inside)
    rows, strides = _rows_of(BC, x, dt, z, N, X, DT, Z, DIM, BLOCK_D)
    for piece in range(count):
        segment = first + piece
        if KEEP:
            tl.store(states_at(entering, segment, n, channels, DIM, N), h, mask=inside[:, None])
        token, end = tl.load(segments + 6 * segment).to(tl.int64), tl.load(segments + 6 * segment + 1).to(tl.int64)
        tiles = (end - token) // TILE
        # The next tile is on its way while this one is computed, into registers too: without, it takes twice as long.
        next_x, next_dt, next_z = _inputs(x, dt, z, token, channels, inside & (tiles > 0), TILE, X, DT, Z)
        for i in range(tiles):
            now, more = token + i * TILE, inside & (i + 1 < tiles)
            fetch(rows, strides, now + TILE, token, end, 8)
            now_x, now_dt, now_z = next_x, next_dt, next_z
            next_x, next_dt, next_z = _inputs(x, dt, z, now + TILE, channels, more, TILE, X, DT, Z)
            h = _scan_tile(
                h, a, skip, bias, now_x, now_dt, now_z, BC, y, now, channels, inside, n, DIM, N, TILE, BIAS, GATE
            )  # fmt: skip
        for i in range(tiles * TILE, end - token):
            now = token + i
            now_x, now_dt, now_z = _inputs(x, dt, z, now, channels, inside, 1, X, DT, Z)
            h = _scan_tile(
                h, a, skip, bias, now_x, now_dt, now_z, BC, y, now, channels, inside, n, DIM, N, 1, BIAS, GATE
            )  # fmt: skip
    last = first + count - 1
    if tl.load(segments + 6 * last + 4) == 1:
        sequence = tl.load(segments + 6 * last + 2)
        tl.store(states_at(final, sequence, n, channels, DIM, N), h, mask=inside[:, None])


@triton.jit
def _ends_tile(
    h, span, a, bias, inputs, steps, gate, BC, token, n,
    N: tl.constexpr, TILE: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, TILE)
    written, steps = inputs.to(tl.float32), steps.to(tl.float32)
    if BIAS:
        steps = softplus(steps + bias[:, None])
    if REVERSE and GATE:
        opened = gate.to(tl.float32)
        written *= opened * sigmoid(opened)
    elif not REVERSE:
        written *= steps
    BC += token * 2 * N
    for i in tl.static_range(TILE):
        t = TILE - 1 - i if REVERSE else i
        step = of_token(steps, at, t)
        # Not tl.sum(steps, 1): Triton 3.6 mixes channels and tokens in a sum along a tile as it was loaded, in a loop.
        span += step
        decay = tl.exp2(a * step[:, None])
        k = tl.load(BC + 2 * N * t + (N if REVERSE else 0) + n)
        added = k[None, :] * of_token(written, at, t)[:, None]
        h = (h + added) * decay if REVERSE else h * decay + added
    return h, span


@triton.jit(do_not_specialize=["unit"])
def ends_kernel(
    x, dt, A, BC, z, dt_bias, ends, spans, segments, unit,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each segment adds to a state of zeros, and the sum of its steps.

    Reversed, with the gradient of y for x: what each adds to a gradient of zeros.
    """
    segment, channels, inside = own(segments, unit, DIM, BLOCK_D)
    n = tl.arange(0, N)
    first, end = tl.load(segments + 6 * segment).to(tl.int64), tl.load(segments + 6 * segment + 1).to(tl.int64)
    if tl.load(segments + 6 * segment + (3 if REVERSE else 4)) == 1:
        end = first  # Nobody asks what it adds.
    a = tl.load(states_at(A, segment * 0, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    BIAS: tl.constexpr = dt_bias is not None
    GATE: tl.constexpr = z is not None
    bias = vector(dt_bias, channels, inside)
    h, span = tl.zeros((BLOCK_D, N), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    tiles, rest = (end - first) // TILE, (end - first) % TILE
    for i in range(rest if REVERSE else 0):
        now = end - 1 - i
        now_x, now_dt, now_z = _inputs(x, dt, z, now, channels, inside, 1, X, DT, Z)
        h, span = _ends_tile(h, span, a, bias, now_x, now_dt, now_z, BC, now, n, N, 1, BIAS, GATE, REVERSE)
    now = first + (TILE * (tiles - 1) if REVERSE else 0)
    rows, strides = _rows_of(BC, x, dt, z, N, X, DT, Z, DIM, BLOCK_D)
    for _ in range(tiles):
        ahead = now - TILE if REVERSE else now + TILE
        fetch(rows, strides, ahead, first, end, 8)
        now_x, now_dt, now_z = _inputs(x, dt, z, now, channels, inside, TILE, X, DT, Z)
        h, span = _ends_tile(h, span, a, bias, now_x, now_dt, now_z, BC, now, n, N, TILE, BIAS, GATE, REVERSE)
        now = ahead
    for i in range(0 if REVERSE else rest):
        now = end - rest + i
        now_x, now_dt, now_z = _inputs(x, dt, z, now, channels, inside, 1, X, DT, Z)
        h, span = _ends_tile(h, span, a, bias, now_x, now_dt, now_z, BC, now, n, N, 1, BIAS, GATE, REVERSE)
    tl.store(states_at(ends, segment, n, channels, DIM, N), h, mask=inside[:, None])
    tl.store(spans + segment * DIM + channels, span, mask=inside)


@triton.jit
def pass_kernel(
    ends, spans, A, state, sequences, DIM: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One program per sequence, n and some channels: from what segments add to what enters each, in place."""
    sequence, n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    first, count = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + n * DIM + d, mask=d < DIM, other=0.0)
    h = tl.load(state + (sequence * N + n) * DIM + d, mask=d < DIM, other=0.0)
    for base in range(0, count, AHEAD):
        # What lies in memory is asked for together, before the first of it is needed.
        added, spans_here = (), ()
        for i in tl.static_range(AHEAD):
            segment = (first + (count - 1 - base - i if REVERSE else base + i)).to(tl.int64)
            mine = (d < DIM) & (base + i < count)
            added = added + (tl.load(ends + (segment * N + n) * DIM + d, mask=mine, other=0.0),)
            spans_here = spans_here + (tl.load(spans + segment * DIM + d, mask=mine, other=0.0),)
        for i in tl.static_range(AHEAD):
            segment = (first + (count - 1 - base - i if REVERSE else base + i)).to(tl.int64)
            tl.store(ends + (segment * N + n) * DIM + d, h, mask=(d < DIM) & (base + i < count))
            h = h * tl.exp2(a * spans_here[i]) + added[i]
