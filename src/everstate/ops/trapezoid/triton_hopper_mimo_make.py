"""What makes keys of several ranks on a Hopper GPU: four warps, which the scan, its sweeps and its gradients have.

A chunk has 64 entries: the ranks of a token follow each other and share cosines, sines and numbers per token. Columns
lie in halves, first members of pairs and second members. Makers work ahead of those that multiply: they bring B, C and
x, and turn keys and queries in a loop of a few instructions. Written out, all turns are more than the memory of
instructions holds, and all groups of warps wait for theirs.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from everstate.ops.trapezoid.triton_hopper_angles import RADIANS, reduced, summed, trig_of
from everstate.ops.trapezoid.triton_keys import DT, NUMBERS, OWN
from everstate.ops.triton_hopper import VECTOR, barriers_of, load_tile, place_of, recast, widened

ENTRIES = gl.constexpr(64)
"""Entries of a chunk."""

PART = gl.constexpr(32)
"""Entries that are turned together."""

ROOMS = gl.constexpr(3)
"""Heads whose keys, queries and inputs of a chunk there is room for, in turn."""

THREADS = gl.constexpr(8)
"""Threads that hold a row of keys or inputs."""


def laid(ranks: int, width: int) -> gl.BlockedLayout:
    """How four warps hold rows of entries by token, rank and column.

    A thread has entries of one rank: what belongs to ranks is in a few registers.
    """
    rows = 32 // THREADS.value
    lanes = min(ranks, rows)
    threads, warps = [rows // lanes, lanes, THREADS.value], [4 * lanes // ranks, ranks // lanes, 1]
    return gl.BlockedLayout([1, 1, width // THREADS.value], threads, warps, [2, 1, 0])


@gluon.jit
def load_bias(bias, at, HALF: gl.constexpr):
    """What belongs to the first members of some pairs, and to the second; zeros if there is no bias."""
    if bias is None:
        return at.to(gl.float32) * 0.0, at.to(gl.float32) * 0.0
    else:
        return gl.load(bias + at), gl.load(bias + HALF + at)


@gluon.jit
def load_factors(mimo_x, head, RANKS: gl.constexpr, P: gl.constexpr, INPUTS: gl.constexpr):
    """The factors of the ranks of a head; ones if there are none."""
    by_rank: gl.constexpr = gl.SliceLayout(0, INPUTS)
    r, p = gl.arange(0, RANKS, gl.SliceLayout(1, by_rank)), gl.arange(0, P, gl.SliceLayout(0, by_rank))
    if mimo_x is None:
        return gl.zeros((RANKS, P), gl.float32, by_rank) + 1.0
    else:
        return gl.load(mimo_x + head * (RANKS * P) + (r[:, None] * P + p[None, :]))


@gluon.jit
def load_numbers(steps, TOKENS: gl.constexpr):
    """Numbers per token by entry: sums of log decays, those less log scales, own weights; and the sum of the chunk."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, ENTRIES, line) // (ENTRIES // TOKENS)
    sums, weighted, own = gl.load(steps + at), gl.load(steps + TOKENS + at), gl.load(steps + OWN * TOKENS + at)
    return sums, weighted, own, gl.load(steps + (TOKENS - 1))


@gluon.jit
def store_numbers(vectors, room, numbers):
    """These; how much the chunk keeps of what an entry gives, how much an entry reads of the state before, and how much
    the chunk keeps of that."""
    sums, weighted, own, last = numbers
    vectors[0].index(room).store(sums)
    vectors[1].index(room).store(weighted)
    vectors[2].index(room).store(own)
    vectors[3].index(room).store(gl.exp2(last - weighted))
    vectors[4].index(room).store(gl.exp2(sums))
    vectors[5].index(room).store(gl.exp2(last + 0.0 * sums))


@gluon.jit
def vectors_for(COUNT: gl.constexpr):
    """Room for them."""
    sums = gl.allocate_shared_memory(gl.float32, [COUNT, ENTRIES], VECTOR)
    weighted = gl.allocate_shared_memory(gl.float32, [COUNT, ENTRIES], VECTOR)
    owns = gl.allocate_shared_memory(gl.float32, [COUNT, ENTRIES], VECTOR)
    gives = gl.allocate_shared_memory(gl.float32, [COUNT, ENTRIES], VECTOR)
    takes = gl.allocate_shared_memory(gl.float32, [COUNT, ENTRIES], VECTOR)
    return sums, weighted, owns, gives, takes, gl.allocate_shared_memory(gl.float32, [COUNT, ENTRIES], VECTOR)


@gluon.jit
def store_inputs(inputs, us, RANKS: gl.constexpr, P: gl.constexpr, INPUTS: gl.constexpr):
    """Inputs of a head by entry: those of the token times the factors of the rank."""
    u = widened(inputs[0])[:, None, :] * inputs[1].to(gl.float32)[None, :, :]
    us.store(u.to(us.dtype).reshape([ENTRIES, P]))


@gluon.jit
def load_turns(rates, steps, phases, chunk, place, TOKENS: gl.constexpr, HALF: gl.constexpr):
    """What the angles of a chunk and head are made of: omega, dt, and the phases before it.

    A warp has all tokens of its pairs, so that none has to hear of others.
    """
    LANES: gl.constexpr = HALF // 8
    by_pair: gl.constexpr = gl.BlockedLayout([TOKENS * LANES // 32, 2], [32 // LANES, LANES], [1, 4], [1, 0])
    t, n = gl.arange(0, TOKENS, gl.SliceLayout(1, by_pair)), gl.arange(0, HALF, gl.SliceLayout(0, by_pair))
    rate = gl.load(rates + gl.to_tensor(chunk).to(gl.int64) * (TOKENS * HALF) + (t[:, None] * HALF + n[None, :]))
    place = gl.to_tensor(place).to(gl.int64)
    dt = gl.load(steps + place * (NUMBERS * TOKENS) + DT * TOKENS + t)
    return rate, dt, gl.load(phases + place * HALF + n)


@gluon.jit
def store_angles(turns, angles, at):
    """Cosines and sines."""
    rate, dt, before = turns
    sums = summed(reduced(dt[:, None] * rate))
    c, s = trig_of(sums + (before.to(gl.float32) * RADIANS)[None, :])
    angles.index(2 * at).store(c.to(angles.dtype))
    angles.index(2 * at + 1).store(s.to(angles.dtype))


@gluon.jit
def _by_rank(tile, RANKS: gl.constexpr, KEYS: gl.constexpr):
    """Rows of a tile of entries as float32, by token and rank."""
    WIDTH: gl.constexpr = tile.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([1, WIDTH // THREADS], [32 // THREADS, THREADS], [4, 1], [1, 0])
    rows = tile.load(flat).reshape([PART // RANKS, RANKS, WIDTH])
    return widened(gl.convert_layout(rows, KEYS))


@gluon.jit
def turn(bases, keys, angles, bias, source, target, at, RANKS: gl.constexpr, HALF: gl.constexpr, KEYS: gl.constexpr):
    """The keys or queries of a head into two tiles, of B or C: those of the first members of pairs, and of the second.

    A loop: all turns written out would be more than the memory of instructions holds.
    """
    by_token: gl.constexpr = gl.SliceLayout(1, KEYS)
    PARTS: gl.constexpr = ENTRIES // PART
    parts = recast(bases, bases.dtype, [bases.shape[0] * PARTS, PART, HALF], bases.layout)
    out = recast(keys, keys.dtype, [keys.shape[0] * PARTS, PART, HALF], keys.layout)
    pairs = recast(angles, angles.dtype, [4 * PARTS, PART // RANKS, HALF], angles.layout)
    for part in range(PARTS):
        a = _by_rank(parts.index(source * PARTS + part), RANKS, KEYS) + bias[0][None, :, :]
        b = _by_rank(parts.index((source + 1) * PARTS + part), RANKS, KEYS) + bias[1][None, :, :]
        c = pairs.index(2 * at * PARTS + part).load(by_token).to(gl.float32)[:, None, :]
        s = pairs.index((2 * at + 1) * PARTS + part).load(by_token).to(gl.float32)[:, None, :]
        first, second = (a * c - b * s).to(out.dtype), (a * s + b * c).to(out.dtype)
        out.index(target * PARTS + part).store(first.reshape([PART, HALF]))
        out.index((target + 1) * PARTS + part).store(second.reshape([PART, HALF]))


@gluon.jit
def rooms_for(x, keys, KINDS: gl.constexpr, RANKS: gl.constexpr, HALF: gl.constexpr):
    """Shared memory and barriers of the makers alone: B and C, inputs and angles of two heads, and what does not change
    along time: biases, and factors of the ranks."""
    TOKENS: gl.constexpr = ENTRIES // RANKS
    P: gl.constexpr = x.block_type.shape[2]
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    bases = gl.allocate_shared_memory(keys.dtype, [2 * KINDS, ENTRIES, HALF], keys.layout)
    xs = gl.allocate_shared_memory(keys.dtype, [2, 1, TOKENS, P], x.layout)
    angles = gl.allocate_shared_memory(gl.float16, [4, TOKENS, HALF], plain)
    biases = gl.allocate_shared_memory(gl.float32, [4 * KINDS, RANKS, HALF], plain)
    factors = gl.allocate_shared_memory(gl.float32, [2, RANKS, P], plain)
    brought, read, came, seen = barriers_of(KINDS, 1), barriers_of(KINDS, 2), barriers_of(2, 1), barriers_of(2, 1)
    return bases, xs, angles, biases, factors, brought, read, came, seen


@gluon.jit
def _keep_biases(given, head, biases, KINDS: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr, KEYS: gl.constexpr):
    """Those of two heads, which do not change along time."""
    by_rank: gl.constexpr = gl.SliceLayout(0, KEYS)
    r, n = gl.arange(0, RANKS, gl.SliceLayout(1, by_rank)), gl.arange(0, HALF, gl.SliceLayout(0, by_rank))
    each = r[:, None] * (2 * HALF) + n[None, :]
    for own in gl.static_range(2):
        for kind in gl.static_range(KINDS):
            bias = load_bias(given[kind], each + (head + own) * (RANKS * 2 * HALF), HALF)
            biases.index(4 * kind + 2 * own).store(bias[0])
            biases.index(4 * kind + 2 * own + 1).store(bias[1])


@gluon.jit
def _bring(source, out, at, row, bar):
    """The halves of the columns of a chunk of B or C."""
    HALF: gl.constexpr = source.block_type.shape[1]
    mbarrier.expect(bar, 2 * source.block_type.nbytes)
    load_tile(source, [row, 0], bar, out.index(at))
    load_tile(source, [row, HALF], bar, out.index(at + 1))


@gluon.jit
def bring_all(sources, out, row, brought, KINDS: gl.constexpr):
    """A chunk of B, and of C if there are two kinds."""
    for kind in gl.static_range(KINDS):
        _bring(sources[kind], out, 2 * kind, row, brought.index(kind))


@gluon.jit
def _bring_one(sources, out, row, brought, which, KINDS: gl.constexpr):
    """Of one kind."""
    for kind in gl.static_range(KINDS):
        if which == kind:
            _bring(sources[kind], out, 2 * kind, row, brought.index(kind))


@gluon.jit
def _bring_inputs(x, out, place, bar):
    mbarrier.expect(bar, x.block_type.nbytes)
    load_tile(x, place, bar, out)


@gluon.jit
def _bring_upstream(upstream, us, room, at, tile, bar):
    """Gradients of outputs of a head, and the state that its gradient meets, into their places."""
    dy, entered, states = upstream
    HALF: gl.constexpr = entered.block_type.shape[1]
    mbarrier.expect(bar, dy.block_type.nbytes + 2 * entered.block_type.nbytes)
    load_tile(dy, at, bar, us.index(room))
    load_tile(entered, [tile, 0], bar, states.index(2 * room))
    load_tile(entered, [tile, HALF], bar, states.index(2 * room + 1))


@gluon.jit
def _turn_kinds(
    sources, bases, keys, angles, biases, brought, read, step, own, room, more, row, KINDS: gl.constexpr,
    RANKS: gl.constexpr, HALF: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """The keys of a head, and its queries; when both heads have theirs, B or C of the next chunk, at `row`."""
    each: gl.constexpr = gl.SliceLayout(0, KEYS)
    for kind in range(KINDS):
        mbarrier.wait(brought.index(kind), step & 1)
        bias = biases.index(4 * kind + 2 * own).load(each), biases.index(4 * kind + 2 * own + 1).load(each)
        turn(bases, keys, angles, bias, 2 * kind, 2 * (kind * ROOMS + room), own, RANKS, HALF, KEYS)
        mbarrier.arrive(read.index(kind), count=1)
        if (own == 1) & more:
            mbarrier.wait(read.index(kind), step & 1)
            _bring_one(sources, bases, row, brought, kind, KINDS)


@gluon.jit
def _weigh_inputs(
    x, xs, factors, us, came, seen, place, step, own, room, more, P: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr,
):  # fmt: skip
    """The inputs of a head by entry; then those of the next chunk, at `place`, are brought."""
    mbarrier.wait(came.index(own), step & 1)
    inputs = xs.index(own).reshape([ENTRIES // RANKS, P]).load(gl.SliceLayout(1, INPUTS))
    factor = factors.index(own).load(gl.SliceLayout(0, INPUTS))
    store_inputs((inputs, factor), us.index(room).reshape([ENTRIES, P]), RANKS, P, INPUTS)
    mbarrier.arrive(seen.index(own), count=1)
    if more:
        mbarrier.wait(seen.index(own), step & 1)
        _bring_inputs(x, xs.index(own), place, came.index(own))


@gluon.jit
def _end_the_turn_before(made, at):
    """Wait for what is copied for the head before. Copies come in any order, and who walks with one head sees every
    other phase of a room: it would take one of the other head for its own."""
    before = at + ROOMS - 1
    mbarrier.wait(made.index(before % ROOMS), (before // ROOMS & 1) ^ 1)


@gluon.jit
def make(
    x, sources, mimo_x, steps, given, rates, phases, upstream, keys, us, vectors, rooms, barriers,
    segments, chunks, length, segment, group, head,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, RANKS: gl.constexpr,
    INPUTS: gl.constexpr, KEYS: gl.constexpr, KINDS: gl.constexpr,
):  # fmt: skip
    """Four warps: keys of two heads, and queries if there are two kinds, inputs and numbers, chunk by chunk and head by
    head, into rooms used in turn.

    Given `upstream`, backwards: gradients of outputs instead of inputs, and the states that those of states meet.
    """
    made, taken = barriers
    bases, xs, angles, biases, factors, brought, read, came, seen = rooms
    TOKENS: gl.constexpr = ENTRIES // RANKS
    first, count, sequence, offset = place_of(segments, chunks, length, segment)
    ahead: gl.constexpr = 1 if upstream is None else -1
    begin = first if upstream is None else first + count - 1
    _keep_biases(given, head, biases, KINDS, HALF, RANKS, KEYS)
    bring_all(sources, bases, (begin * GROUPS + group) * ENTRIES, brought, KINDS)
    if upstream is None:
        for each in gl.static_range(2):
            factors.index(each).store(load_factors(mimo_x, head + each, RANKS, P, INPUTS).to(gl.float32))
            _bring_inputs(x, xs.index(each), [sequence, offset, (head + each) * P], came.index(each))
    store_angles(load_turns(rates, steps, phases, begin, begin * HEADS + head, TOKENS, HALF), angles, 0)
    for at in range(2 * count):
        own, step, room = at % 2, at // 2, at % ROOMS
        chunk = begin + ahead * step
        place, more = chunk * HEADS + head + own, step + 1 < count
        # Asked for before there is room.
        numbers = load_numbers(steps + gl.to_tensor(place).to(gl.int64) * (NUMBERS * TOKENS), TOKENS)
        following = gl.minimum(at + 1, 2 * count - 1)
        then = begin + ahead * (following // 2)
        others = load_turns(rates, steps, phases, then, then * HEADS + head + following % 2, TOKENS, HALF)
        mbarrier.wait(taken.index(room), (at // ROOMS & 1) ^ 1)
        if upstream is not None:
            rows = [sequence, (offset + (chunk - first) * TOKENS) * RANKS, (head + own) * P]
            _bring_upstream(upstream, us, room, rows, place * P, made.index(room))
        row = ((chunk + ahead) * GROUPS + group) * ENTRIES
        _turn_kinds(
            sources, bases, keys, angles, biases, brought, read, step, own, room, more, row, KINDS, RANKS, HALF, KEYS
        )
        store_numbers(vectors, room, numbers)
        if upstream is None:
            rows = [sequence, offset + (step + 1) * TOKENS, (head + own) * P]
            _weigh_inputs(x, xs, factors, us, came, seen, rows, step, own, room, more, P, RANKS, INPUTS)
        else:
            _end_the_turn_before(made, at)
        store_angles(others, angles, 1 - own)
        fence_async_shared()
        mbarrier.arrive(made.index(room), count=1)
