"""The sweeps of the selective scan that make gradients: forwards along states, backwards along their gradients."""

import triton
import triton.language as tl

from everstate.ops.selective_scan.triton_forward import (
    bytes_of,
    fetch,
    load_tile,
    of_token,
    own,
    sigmoid,
    states_at,
    store_tile,
    vector,
)
from everstate.ops.triton_common import INTERPRETED, softplus

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _at_token(value, at, token):
    """The bits of a tile with `value` at one token and zeros elsewhere: added as integers, zeros cost nothing."""
    return tl.where((at == token)[None, :], value.to(tl.int32, bitcast=True)[:, None], 0)


@triton.jit
def _halve(v, up, partner):
    """Half of the columns of `v` for half of the rows, each summed with the row `partner`."""
    low, high = tl.split(tl.trans(tl.reshape(v, (v.shape[0], 2, v.shape[1] // 2)), (0, 2, 1)))
    given = tl.where(up[:, None], low, high)
    return tl.where(up[:, None], high, low) + tl.gather(given, tl.broadcast_to(partner[:, None], given.shape), 0)


@triton.jit
def _over_channels(value, N: tl.constexpr):
    """The sum of `(channel, n)` over the channels: 32 numbers, one for each thread, that of n in thread `32 n / N`.

    Two threads that trade halves of what they hold need one exchange per two numbers, where summing each column by
    itself takes five for each number.
    """
    v = tl.sum(tl.reshape(value, (value.shape[0] // 32, 32, N)), 0)
    lane = tl.arange(0, 32)
    for step in tl.static_range(5):
        bit = 16 >> step
        if N >> step > 1:
            v = _halve(v, (lane & bit) != 0, lane ^ bit)
        else:
            v += tl.gather(v, tl.broadcast_to((lane ^ bit)[:, None], v.shape), 0)
    return tl.sum(v, 1)


@triton.jit
def _store_sums(out, sums, at, N: tl.constexpr):
    """`_over_channels` of each token of a tile. Stored together: a store keeps later loads from being asked for."""
    lane = tl.arange(0, 32)
    place = out + (lane // (32 // N))[:, None] + (at * N)[None, :]
    tl.store(place, sums.to(tl.float32, bitcast=True), mask=(lane % (32 // N) == 0)[:, None])


@triton.jit
def _steps(dt, dt_bias, channels, at, inside, DT: tl.constexpr):
    """The steps of a tile."""
    steps = load_tile(dt, channels, at, inside, DT)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
        steps = softplus(steps + bias[:, None])
    return steps


@triton.jit
def _gated(tile, z, token, channels, at, inside, Z: tl.constexpr):
    """A tile multiplied by `silu(z)`, where there is a z."""
    if z is not None:
        gate = load_tile(z + token * Z, channels, at, inside, Z)
        tile *= gate * sigmoid(gate)
    return tile


@triton.jit
def _rows_of(BC, x, dt, z, dy, reads, N: tl.constexpr, X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr,
             DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Where the first rows of all that is read begin, and the bytes from row to row: an eighth of a warp for each."""
    if INTERPRETED:
        return 0, 0
    d = tl.program_id(0) % ((DIM + BLOCK_D - 1) // BLOCK_D) * BLOCK_D
    which = tl.arange(0, 32) // 4
    base, stride = (
        tl.where(which == 0, BC.to(tl.int64), (x + d).to(tl.int64)),
        tl.where(which == 0, 8 * N, X * bytes_of(x)),
    )
    base, stride = tl.where(which == 2, (dt + d).to(tl.int64), base), tl.where(which == 2, DT * bytes_of(dt), stride)
    base, stride = tl.where(which == 3, (dy + d).to(tl.int64), base), tl.where(which == 3, DIM * bytes_of(dy), stride)
    if z is not None:
        base, stride = tl.where(which == 4, (z + d).to(tl.int64), base), tl.where(which == 4, Z * bytes_of(z), stride)
    if reads is not None:
        # Rows of 64 numbers in float32 are two lines of the cache.
        half = reads + tl.minimum(d + BLOCK_D // 2, DIM - 1)
        base, stride = tl.where(which == 5, (reads + d).to(tl.int64), base), tl.where(which == 5, 4 * DIM, stride)
        base, stride = tl.where(which == 6, half.to(tl.int64), base), tl.where(which == 6, 4 * DIM, stride)
    return base, stride


@triton.jit
def _states_tile(
    h, slope, dA, dD, span, a, skip, x, dt, BC, z, dt_bias, dy, dC, dz, reads, token, channels, inside, n,
    DIM: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Of the tokens of one tile: how their states are read. `slope` is the derivative of the state by A."""
    at = tl.arange(0, TILE)
    inputs = load_tile(x + token * X, channels, at, inside, X)
    steps = _steps(dt + token * DT, dt_bias, channels, at, inside, DT)
    outputs = _gated(load_tile(dy + token * DIM, channels, at, inside, DIM), z, token, channels, at, inside, Z)
    read, out = tl.zeros(inputs.shape, tl.int32), tl.zeros(inputs.shape, tl.int32)
    sums = tl.zeros((32, TILE), tl.int32)
    BC += token * 2 * N
    for t in tl.static_range(TILE):
        k, q = tl.load(BC + 2 * N * t + n), tl.load(BC + 2 * N * t + N + n)
        u, step, du = of_token(inputs, at, t), of_token(steps, at, t), of_token(outputs, at, t)
        span += step
        dD += du * u
        decay = tl.exp2(a * step[:, None])
        left = h * decay
        h = left + k[None, :] * (u * step)[:, None]
        if z is not None:
            out += _at_token(tl.sum(h * q[None, :], 1) + skip * u, at, t)
        seen = left * q[None, :]
        read += _at_token(tl.sum(seen * a, 1) * du, at, t)
        if EXACT:
            slope = slope * decay + left * step[:, None]
            dA += slope * (q[None, :] * du[:, None])
        else:
            dA += seen * (span * du)[:, None]
        sums += _at_token(_over_channels(h * du[:, None], N), at, t)
    _store_sums(dC + token * N, sums, at, N)
    store_tile(reads + token * DIM, channels, at, inside, read.to(tl.float32, bitcast=True), DIM)
    if z is not None:
        # Loaded again: in registers they would be in the way.
        gate = load_tile(z + token * Z, channels, at, inside, Z)
        open = sigmoid(gate)
        dgate = out.to(tl.float32, bitcast=True) * load_tile(dy + token * DIM, channels, at, inside, DIM) * open
        store_tile(dz + token * DIM, channels, at, inside, dgate + dgate * gate * (1.0 - open), DIM)
    return h, slope, dA, dD, span


@triton.jit(do_not_specialize=["unit"])
def states_kernel(
    x, dt, A, BC, D, z, dt_bias, dy, entering, leaving, kept, spans, reads, dA, dC, dD, dz, segments, total, unit,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr, CHUNK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Forwards: gradients of C, D and z, what reading adds to those of A and dt, and the state after each chunk."""
    segment, channels, inside = own(segments, unit, DIM, BLOCK_D)
    n = tl.arange(0, N)
    token, end = tl.load(segments + 6 * segment).to(tl.int64), tl.load(segments + 6 * segment + 1).to(tl.int64)
    chunk = tl.load(segments + 6 * segment + 5)
    a = tl.load(states_at(A, segment * 0, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    h = tl.load(states_at(entering, segment, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    skip = vector(D, channels, inside)
    sum_A, sum_D = tl.zeros((BLOCK_D, N), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    slope = tl.zeros((BLOCK_D, N), tl.float32)
    dC += (tl.program_id(0) % ((DIM + BLOCK_D - 1) // BLOCK_D)).to(tl.int64) * total * N
    rows, strides = _rows_of(BC, x, dt, z, dy, None, N, X, DT, Z, DIM, BLOCK_D)
    while token < end:
        until, span = tl.minimum(token + CHUNK, end), tl.zeros((BLOCK_D,), tl.float32)
        for _ in range((until - token) // TILE):
            fetch(rows, strides, token + TILE, token, end, 4)
            h, slope, sum_A, sum_D, span = _states_tile(
                h, slope, sum_A, sum_D, span, a, skip, x, dt, BC, z, dt_bias, dy, dC, dz, reads, token, channels,
                inside, n, DIM, N, TILE, X, DT, Z, EXACT,
            )  # fmt: skip
            token += TILE
        while token < until:
            h, slope, sum_A, sum_D, span = _states_tile(
                h, slope, sum_A, sum_D, span, a, skip, x, dt, BC, z, dt_bias, dy, dC, dz, reads, token, channels,
                inside, n, DIM, N, 1, X, DT, Z, EXACT,
            )  # fmt: skip
            token += 1
        tl.store(states_at(kept, chunk, n, channels, DIM, N), h, mask=inside[:, None])
        tl.store(spans + chunk.to(tl.int64) * DIM + channels, span, mask=inside)
        chunk += 1
    if EXACT:
        sum_A += slope * tl.load(states_at(leaving, segment, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    tl.store(states_at(dA, segment, n, channels, DIM, N), sum_A, mask=inside[:, None])
    if D is not None:
        tl.store(dD + segment * DIM + channels, sum_D, mask=inside)


@triton.jit
def _writes_tile(
    r, dlog, span, dA, dbias, a, skip, x, dt, BC, z, dt_bias, dy, reads, dx, ddt, dB, token, channels, inside, n,
    DIM: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Of the tokens of one tile, the last first: what was written to the state.

    r is the gradient of the state as the next token sees it, dlog that of the exponent of the next token's decay,
    times A and summed over n.
    """
    at = tl.arange(0, TILE)
    inputs = load_tile(x + token * X, channels, at, inside, X)
    steps = _steps(dt + token * DT, dt_bias, channels, at, inside, DT)
    outputs = _gated(load_tile(dy + token * DIM, channels, at, inside, DIM), z, token, channels, at, inside, Z)
    read = load_tile(reads + token * DIM, channels, at, inside, DIM)
    dinputs, dwritings = tl.zeros(inputs.shape, tl.int32), tl.zeros(inputs.shape, tl.int32)
    sums = tl.zeros((32, TILE), tl.int32)
    BC += token * 2 * N
    for i in tl.static_range(TILE):
        t = TILE - 1 - i
        k, q = tl.load(BC + 2 * N * t + n), tl.load(BC + 2 * N * t + N + n)
        u, step, du = of_token(inputs, at, t), of_token(steps, at, t), of_token(outputs, at, t)
        written = r * k[None, :]
        r += q[None, :] * du[:, None]
        sums += _at_token(_over_channels(r * (u * step)[:, None], N), at, t)
        dwritten = tl.sum(r * k[None, :], 1)
        dlog += of_token(read, at, t) - u * step * tl.sum(written * a, 1)
        dinputs += _at_token(dwritten * step + skip * du, at, t)
        dwritings += _at_token(dlog * LN2 + dwritten * u, at, t)
        if HALF:
            dA -= written * (span * u * step)[:, None]
            span -= step
        r *= tl.exp2(a * step[:, None])
    dsteps = dwritings.to(tl.float32, bitcast=True)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
        dsteps *= sigmoid(load_tile(dt + token * DT, channels, at, inside, DT) + bias[:, None])
        dbias += tl.sum(dsteps, 1)
    _store_sums(dB + token * N, sums, at, N)
    store_tile(ddt + token * DIM, channels, at, inside, dsteps, DIM)
    store_tile(dx + token * DIM, channels, at, inside, dinputs.to(tl.float32, bitcast=True), DIM)
    return r, dlog, span, dA, dbias


@triton.jit(do_not_specialize=["unit"])
def writes_kernel(
    x, dt, A, BC, D, z, dt_bias, dy, leaving, kept, spans, reads, dx, ddt, dA, dB, dbias, dstate, segments, total, unit,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Backwards: gradients of x, dt, B, the bias and the first state, and what writing takes from that of A."""
    segment, channels, inside = own(segments, unit, DIM, BLOCK_D)
    n = tl.arange(0, N)
    first, end = tl.load(segments + 6 * segment).to(tl.int64), tl.load(segments + 6 * segment + 1).to(tl.int64)
    a = tl.load(states_at(A, segment * 0, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    r = tl.load(states_at(leaving, segment, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    skip = vector(D, channels, inside)
    sum_A, sum_bias = tl.zeros((BLOCK_D, N), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    dB += (tl.program_id(0) % ((DIM + BLOCK_D - 1) // BLOCK_D)).to(tl.int64) * total * N
    HALF: tl.constexpr = dA is not None
    rows, strides = _rows_of(BC, x, dt, z, dy, reads, N, X, DT, Z, DIM, BLOCK_D)
    chunks = (end - first + CHUNK - 1) // CHUNK
    for back in range(chunks):
        number = chunks - 1 - back
        chunk, token = tl.load(segments + 6 * segment + 5) + number, first + number * CHUNK
        size = tl.minimum(end - token, CHUNK)
        span = tl.load(spans + chunk.to(tl.int64) * DIM + channels, mask=inside, other=0.0)
        met = r * tl.load(states_at(kept, chunk, n, channels, DIM, N), mask=inside[:, None], other=0.0)
        if HALF:
            sum_A += met * span[:, None]
        dlog = tl.sum(met * a, 1)
        for i in range(size % TILE):
            r, dlog, span, sum_A, sum_bias = _writes_tile(
                r, dlog, span, sum_A, sum_bias, a, skip, x, dt, BC, z, dt_bias, dy, reads, dx, ddt, dB,
                token + size - 1 - i, channels, inside, n, DIM, N, 1, X, DT, Z, HALF,
            )  # fmt: skip
        for i in range(size // TILE):
            fetch(rows, strides, token + (size // TILE - 2 - i) * TILE, first, end, 4)
            r, dlog, span, sum_A, sum_bias = _writes_tile(
                r, dlog, span, sum_A, sum_bias, a, skip, x, dt, BC, z, dt_bias, dy, reads, dx, ddt, dB,
                token + (size // TILE - 1 - i) * TILE, channels, inside, n, DIM, N, TILE, X, DT, Z, HALF,
            )  # fmt: skip
    if HALF:
        tl.store(states_at(dA, segment, n, channels, DIM, N), sum_A, mask=inside[:, None])
    if dt_bias is not None:
        tl.store(dbias + segment * DIM + channels, sum_bias, mask=inside)
    if tl.load(segments + 6 * segment + 3) == 1:
        sequence = tl.load(segments + 6 * segment + 2)
        tl.store(states_at(dstate, sequence, n, channels, DIM, N), r, mask=inside[:, None])
