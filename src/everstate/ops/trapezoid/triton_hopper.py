"""The trapezoid on a Hopper GPU: keys and queries are made by warps of their own, ahead of those that multiply.

Groups of warps share the work of a program that walks along time with two heads: one moves tiles into shared memory,
one for each head makes cosines and sines of its angles, four turn keys and queries, and four walk with each head. As
many programs as the GPU has multiprocessors walk one sequence and pair of heads after the other, so those that run
ahead need not wait for the walks of others to end. Keys and states are as the caller has them, the members of a pair
side by side: then one thread has both. For one rank, and for keys of which one half turns: then both halves are tiles
of one size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from everstate.core.kernels import processors
from everstate.ops.trapezoid import triton_prepare
from everstate.ops.trapezoid.triton_hopper_angles import RADIANS, layout_of_walk, trig_by_walking
from everstate.ops.trapezoid.triton_prepare import VECTORS
from everstate.ops.trapezoid.triton_tables import pieces
from everstate.ops.triton_hopper import (
    COLUMN,
    ROW,
    SQUARE,
    barriers_of,
    load_tile,
    place_of,
    rows_of,
    store_tile,
    vectors_of,
    widened,
)
from everstate.ops.triton_launch import Form, Tiles, cdiv, launch
from everstate.ops.triton_segments import CHUNK

if TYPE_CHECKING:
    from everstate.ops.trapezoid.triton import Call

_KEYS = {width: Form(1, CHUNK, width, layout=gl.NVMMASharedLayout(2 * width, 16, 3)) for width in (32, 64)}
_RATES = {pairs: Form(CHUNK, pairs, layout=gl.NVMMASharedLayout(4 * pairs, 32, 2)) for pairs in (16, 32)}
"""How half of the columns of B and C, and rates lie in shared memory."""

# Of the numbers that `triton_prepare.numbers_kernel` makes for the outputs, those that walkers read:
SUM = gl.constexpr(0)
WEIGHTED = gl.constexpr(1)
READ = gl.constexpr(2)
DIRECT = gl.constexpr(3)
GIVEN = gl.constexpr(4)
KEPT = gl.constexpr(5)
READS = gl.constexpr(6)
"""How many these are."""

REGISTERS = 128
"""Registers of a thread when a program of four groups of 128 threads starts; they then share them out."""

LONG = gl.constexpr("""{
    .reg .f64 turns;
    .reg .b32 high;
    cvt.f64.f32 turns, $1;
    fma.rn.f64 turns, turns, 0d41C45F306DC9C883, 0d4338000000000000;
    mov.b64 {$0, high}, turns;
}""")
"""The phase of any angle."""
MASK = gl.constexpr("and.b32 $0, $1, $2;")


def forward(call: Call, y: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """Write outputs to `y`; the states and angles after each sequence, of which `final` may get the first."""
    side_by_side = lambda t: call.side_by_side(t).contiguous()
    given, segments = call.given, len(call.plan.segments)
    angle = torch.empty_like(given.angle, memory_format=torch.contiguous_format)
    call.phases = call.empty_phases()
    if segments == len(call.plan.sequences):
        owed = side_by_side(given.k), given.last.contiguous()
        scan(call, side_by_side(given.ssm), owed, None, y, final, angle, call.phases)
    else:
        parts, of_segments = pieces(call.bounds, call.pieces, _parts(call), call.x.device)
        ends, kept = final.new_empty(len(parts), *final.shape[1:]), final.new_empty(len(parts), call.heads)
        turns, starts = (angle.new_empty(n, *angle.shape[1:], dtype=torch.int32) for n in (len(parts), segments))
        entering = call.kept_states
        sweep(call, parts, ends, kept, turns)
        launch(
            triton_prepare.pass_turning_kernel, (len(call.plan.sequences) * call.heads, call.headdim // 16),
            ends, kept, turns, side_by_side(call.enter(parts=False)), given.angle.contiguous(), entering, starts,
            call.plan.sequences, of_segments,
            HEADS=call.heads, P=call.headdim, PAIRS=call.pairs, STILL=2 * call.pairs, BLOCK_P=16,
        )  # fmt: skip
        scan(call, entering, None, starts, y, final, angle, call.phases)
    return call.as_given(final), angle


def _parts(call: Call) -> int:
    """Parts of a segment that are swept by themselves: such that programs fill whole rounds of the GPU, and with
    the time for two chunks until one is under way."""
    available, count = processors(call.x.device), len(call.plan.segments) - len(call.plan.sequences)
    longest = cdiv(max(b - a for a, b in pairwise(call.bounds)), call.tokens * call.pieces)
    rounds = lambda parts: cdiv(count * parts * call.heads // 2, available)
    return min(range(1, 9), key=lambda parts: rounds(parts) * (cdiv(longest, parts) + 2))


def scan(
    call: Call, entering: Tensor, owed: tuple[Tensor, Tensor] | None, starts: Tensor | None, y: Tensor, final: Tensor,
    final_angle: Tensor, phases: Tensor,
) -> None:  # fmt: skip
    """Outputs, and states and angles at the end. Members of a pair lie side by side in keys and states.

    `owed`: the key and the input of the token before, where `entering` does not have yet what they owe; `starts`: the
    phases at the start of each segment, where these are not the angles of the caller; `phases` gets those at the start
    of each chunk, and behind them those at the end of each sequence.
    """
    items = len(call.plan.segments) * call.heads // 2
    launch(
        scan_kernel, (min(items, processors(call.x.device)),),
        rows(call, call.x), vectors_of(call.numbers), *(_keys_of(call, t) for t in call.sources),
        *call.biases, rates_of(call.rates), starts, call.given.angle.contiguous(), final_angle,
        phases, phases[len(call.plan.chunks) :], entering, *(owed or (None, None)), call.dt, call.lam,
        rows(call, y.flatten(0, 2)), final,
        call.plan.chunks, call.plan.segments, call.length,
        *call.dt.stride(), *call.lam.stride(), items,
        **sizes_of(call), STAGES=2, ROOMS=3, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def sweep(call: Call, pieces: Tensor, ends: Tensor, kept: Tensor, turns: Tensor) -> None:
    """What each piece of a sequence adds to a state of zeros, as if all angles started from zero; the log of how much
    of an older state it keeps; and the phases by which it turns. `pieces` is made as `Plan.segments`.
    """
    items = len(pieces) * call.heads // 2
    launch(
        sweep_kernel, (min(items, processors(call.x.device)),),
        rows(call, call.x), vectors_of(call.numbers), _keys_of(call, call.sources[0]), call.biases[0],
        rates_of(call.rates), ends, kept, turns, call.plan.chunks, pieces, call.length, items,
        **sizes_of(call), STAGES=3, ROOMS=4, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def sizes_of(call: Call) -> dict[str, int]:
    return {
        "HEADS": call.heads, "GROUPS": call.groups, "P": call.headdim, "HALF": call.pairs, "BLOCK": call.tokens
    }  # fmt: skip


def rows(call: Call, t: Float[Tensor, "*b h p"]) -> Tiles:
    return rows_of(t, call.batch, call.length)


def _keys_of(call: Call, t: Float[Tensor, "t g n"]) -> Tiles:
    """Tiles of half of the columns of B or C."""
    step = t.stride(0)
    shape, strides = (call.batch, call.length, t.shape[1] * t.shape[2]), (call.length * step, step, 1)
    return Tiles(t, shape, strides, _KEYS[t.shape[2] // 2])


def rates_of(t: Float[Tensor, "chunks t s"]) -> Tiles:
    """How fast the pairs turn at the tokens of a chunk."""
    chunks, tokens, pairs = t.shape
    return Tiles(t, (chunks * tokens, pairs), (pairs, 1), _RATES[pairs])


@gluon.jit
def _angle(
    rates, dts, starts, angle, ends, phases, trig, barriers, segments, items,
    OWN: gl.constexpr, HEADS: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """One warp: cosines and sines of all angles of one head, chunk by chunk; a thread has a pair and walks along time.

    `ends` gets the angle at the end of a sequence, or without `angle`, by how many phases each segment turns; `phases`
    those before each chunk, and those at the end of each sequence.
    """
    angled, turned, timed, heard = barriers
    angled, turned = angled.index(OWN), turned.index(OWN)
    pair = gl.arange(0, HALF, gl.SliceLayout(0, layout_of_walk(HALF)))
    done = 0  # chunks, by all walks before
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2 + OWN
        first, count = gl.load(segments + 5 * segment), gl.load(segments + 5 * segment + 1)
        home = (gl.load(segments + 5 * segment + 2) * HEADS + head) * HALF + pair
        own = (segment * HEADS + head) * HALF + pair
        now = _start(starts, angle, own, home)
        for chunk in range(count):
            step = done + chunk
            mbarrier.wait(timed.index(step % 2), step // 2 & 1)
            mbarrier.wait(turned, step & 1 ^ 1)
            if phases is not None:
                gl.store(phases[0] + (((first + chunk) * HEADS + head) * HALF + pair), now)
            now = trig_by_walking(now, rates, dts, trig, step % 2, OWN, HALF, BLOCK)
            mbarrier.arrive(angled, count=1)
            mbarrier.arrive(heard.index(step % 2), count=1)
        if angle is None:
            gl.store(ends + own, now)
        elif gl.load(segments + 5 * segment + 4) == 1:
            gl.store(ends + home, now.to(gl.float32) * RADIANS)
            gl.store(phases[1] + home, now)
        done += count


@gluon.jit
def _start(starts, angle, own, home):
    """The phases with which a segment starts: as they were found, or those of the caller, or zeros."""
    if starts is not None:
        now = gl.load(starts + own)
    elif angle is not None:
        now = gl.inline_asm_elementwise(LONG, "=r,f", [gl.load(angle + home)], gl.int32, is_pure=True, pack=1)
    else:
        now = own * 0
    return now


@gluon.jit
def halves_at(tiles, room):
    """The tiles of both halves of the columns, in one stack."""
    return tiles.index(2 * room), tiles.index(2 * room + 1)


@gluon.jit
def two_stacks(
    dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Room for so many tiles, twice."""
    first = gl.allocate_shared_memory(dtype, [COUNT, ROWS, WIDTH], layout)
    return first, gl.allocate_shared_memory(dtype, [COUNT, ROWS, WIDTH], layout)


@gluon.jit
def both_at(tiles, room):
    """As `halves_at`, of halves in two stacks: then no barrier parts what is written into one and the other."""
    return tiles[0].index(room), tiles[1].index(room)


@gluon.jit
def _turn(sources, bias, c, s, out, HALF: gl.constexpr, full: gl.constexpr):
    """Keys of a head into two tiles: `sources` are the halves of a chunk of B, `bias` is that of the head."""
    BLOCK: gl.constexpr = c.shape[0]
    dtype: gl.constexpr = sources[0].dtype
    n = gl.arange(0, 2 * HALF, gl.SliceLayout(0, full))
    turning = widened(sources[0].reshape([BLOCK, 2 * HALF]).load(full))
    if bias is not None:
        turning += gl.load(bias + n)[None, :]
    a, b = gl.split(turning.reshape([BLOCK, HALF, 2]))
    out[0].store(gl.join(a * c - b * s, a * s + b * c).to(dtype).reshape([BLOCK, 2 * HALF]))
    still = widened(sources[1].reshape([BLOCK, 2 * HALF]).load(full))
    if bias is not None:
        still += gl.load(bias + 2 * HALF + n)[None, :]
    out[1].store(still.to(dtype))


@gluon.jit
def _make(
    sources, B_bias, C_bias, trig, tiles, barriers, segments, items,
    HEADS: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr, ROOMS: gl.constexpr, KINDS: gl.constexpr,
):  # fmt: skip
    """Four warps: keys of two heads, and queries where there are two kinds, chunk by chunk, into rooms used in turn."""
    brought, read, angled, turned, made, taken = barriers
    full: gl.constexpr = gl.BlockedLayout([1, 8], [128 // HALF, HALF // 4], [4, 1], [1, 0])
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2
        count = gl.load(segments + 5 * segment + 1)
        for at in range(2 * count):
            turn = 2 * done + at
            own, step, room = turn % 2, turn // 2, turn % ROOMS
            mbarrier.wait(angled.index(own), step & 1)
            c, s = gl.split(trig.index(own).load(full).to(gl.float32).reshape([BLOCK, HALF, 2]))
            mbarrier.arrive(turned.index(own), count=1)
            mbarrier.wait(taken.index(room), (turn // ROOMS & 1) ^ 1)
            for kind in range(KINDS):
                bias = None
                if B_bias is not None:
                    bias = B_bias
                    if kind == 1:
                        bias = C_bias
                    bias += (head + own) * (4 * HALF)
                # Of one kind there is room for two chunks.
                slot, phase = (kind, step) if KINDS == 2 else (step % 2, step // 2)
                mbarrier.wait(brought.index(slot), phase & 1)
                _turn(halves_at(sources, slot), bias, c, s, both_at(tiles, kind * ROOMS + room), HALF, full)
                mbarrier.arrive(read.index(slot), count=1)
            fence_async_shared()
            mbarrier.arrive(made.index(room), count=1)
        done += count


@gluon.jit
def _bring(B, sources, slot, phase, sequence, token, group, brought, read, HALF: gl.constexpr):
    """A chunk of B or C, once that before it has been read for both heads."""
    mbarrier.wait(read.index(slot), phase & 1 ^ 1)
    mbarrier.expect(brought.index(slot), 2 * B.block_type.nbytes)
    for half in gl.static_range(2):
        column = group * (4 * HALF) + half * (2 * HALF)
        out = sources.index(2 * slot + half)
        load_tile(B, [sequence, token, column], brought.index(slot), out)


@gluon.jit
def bring_turns(
    omega, numbers, rates, timed, heard, step, chunk, head,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, COUNT: gl.constexpr, DT: gl.constexpr,
):  # fmt: skip
    """omega of a chunk and dt of two heads, which is one of so many numbers per token, as soon as there is room."""
    speeds, dts = rates
    at = step % 2
    mbarrier.wait(heard.index(at), step // 2 & 1 ^ 1)
    mbarrier.expect(timed.index(at), omega.block_type.nbytes + 2 * numbers.block_type.nbytes)
    load_tile(omega, [chunk * BLOCK, 0], timed.index(at), speeds.index(at))
    for own in gl.static_range(2):
        place = ((chunk * HEADS + head + own) * COUNT + DT) * BLOCK
        load_tile(numbers, [place], timed.index(at), dts.index(2 * at + own))


@gluon.jit
def _feed(
    tensors, us, vectors, rates, sources, barriers, segments, chunks, length, items,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, LEAST: gl.constexpr,
):  # fmt: skip
    """One warp: what is read of two heads, chunk by chunk, as soon as there is room."""
    x, numbers, omega, B, C = tensors
    full, empty, brought, read, timed, heard = barriers
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2
        group = head // (HEADS // GROUPS)
        first, count, sequence, start = place_of(segments, chunks, length, segment)
        for chunk in range(count):
            step = done + chunk
            at, token = step % STAGES, start + chunk * BLOCK
            bring_turns(omega, numbers, rates, timed, heard, step, first + chunk, head, HEADS, BLOCK, VECTORS, READS)
            slot, phase = (step % 2, step // 2) if C is None else (0, step)
            _bring(B, sources, slot, phase, sequence, token, group, brought, read, HALF)
            if C is not None:
                _bring(C, sources, 1, step, sequence, token, group, brought, read, HALF)
            mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
            bar = full.index(at)
            mbarrier.expect(bar, 2 * x.block_type.nbytes + 2 * (READS - LEAST) * numbers.block_type.nbytes)
            for own in gl.static_range(2):
                place = ((first + chunk) * HEADS + head + own) * (VECTORS * BLOCK)
                load_tile(x, [sequence, token, (head + own) * P], bar, us.index(2 * at + own))
                for number in gl.static_range(LEAST, READS):
                    out = vectors.index((2 * at + own) * READS + number)
                    load_tile(numbers, [place + number * BLOCK], bar, out)
        done += count


@gluon.jit
def load_state(states, row, head, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, wide: gl.constexpr):
    """The two halves of the state (p, n) of a head."""
    p, n = gl.arange(0, P, gl.SliceLayout(1, wide)), gl.arange(0, 2 * HALF, gl.SliceLayout(0, wide))
    place = (gl.to_tensor(row).to(gl.int64) * HEADS + head) * (P * 4 * HALF) + (p[:, None] * (4 * HALF) + n[None, :])
    return gl.load(states + place), gl.load(states + 2 * HALF + place)


@gluon.jit
def store_state(
    states, row, head, h1, h2, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, wide: gl.constexpr
):  # fmt: skip
    p, n = gl.arange(0, P, gl.SliceLayout(1, wide)), gl.arange(0, 2 * HALF, gl.SliceLayout(0, wide))
    place = (gl.to_tensor(row).to(gl.int64) * HEADS + head) * (P * 4 * HALF) + (p[:, None] * (4 * HALF) + n[None, :])
    gl.store(states + place, h1)
    gl.store(states + 2 * HALF + place, h2)


@gluon.jit
def across(a, b, at, none):
    return meet(halves_at(a, at), halves_at(b, at), none)


@gluon.jit
def meet(a, b, none):
    """Products of the rows of one matrix with the rows of another, given their tiles."""
    out = warpgroup_mma(a[0], b[0].permute((1, 0)), none, use_acc=False, is_async=True)
    return warpgroup_mma(a[1], b[1].permute((1, 0)), out, is_async=True)


@gluon.jit
def ask(state, queries, none, layout: gl.constexpr, dtype: gl.constexpr):
    """Products of a state in registers with queries, `[p, i]`."""
    h1, h2 = state
    q1, q2 = queries
    half = gl.convert_layout(h1.to(dtype), layout)
    out = warpgroup_mma(half, q1.permute((1, 0)), none, use_acc=False, is_async=True)
    half = gl.convert_layout(h2.to(dtype), layout)
    return warpgroup_mma(half, q2.permute((1, 0)), out, is_async=True)


@gluon.jit
def grow(state, keys, added, kept):
    """A state after a chunk: what it keeps, and what the inputs add to it."""
    h1, h2 = state
    h1 = warpgroup_mma(added, keys[0], h1 * kept[:, None], is_async=True)
    return h1, warpgroup_mma(added, keys[1], h2 * kept[:, None], is_async=True)


@gluon.jit
def _write(y, place, answers, out):
    """Outputs `[p, i]`."""
    out.reshape([out.shape[1], out.shape[2]]).permute((1, 0)).store(answers)
    fence_async_shared()
    store_tile(y, place, out)


@gluon.jit
def _enter(
    state, row, head, token, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, wide: gl.constexpr
):  # fmt: skip
    """The state that enters a segment; given k and x of the token before it, with what that owes."""
    entering, k, x, dt, lam, strides = state
    h1, h2 = load_state(entering, row, head, HEADS, P, HALF, wide)
    if k is not None:
        p, n = gl.arange(0, P, gl.SliceLayout(1, wide)), gl.arange(0, 2 * HALF, gl.SliceLayout(0, wide))
        dt_token, dt_head, lam_token, lam_head = strides
        owed = 1.0 - gl.load(lam + (token.to(gl.int64) * lam_token + head * lam_head)).to(gl.float32)
        owed *= gl.load(dt + (token.to(gl.int64) * dt_token + head * dt_head)).to(gl.float32)
        home = row * HEADS + head
        u = gl.load(x + home * P + p) * owed
        h1 += u[:, None] * gl.load(k + home * (4 * HALF) + n)[None, :]
        h2 += u[:, None] * gl.load(k + home * (4 * HALF) + 2 * HALF + n)[None, :]
    return h1, h2


@gluon.jit
def _walk(
    us, tiles, vectors, barriers, mask, out, y, state, final, segments, chunks, length, items,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, ROOMS: gl.constexpr,
):  # fmt: skip
    """Four warps: one head along a segment. Outputs are `[p, i]`, weights `[j, i]` for what i receives from j."""
    full, empty, made, taken = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    states: gl.constexpr = gl.DotOperandLayout(0, SQUARE, 2)
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    dtype: gl.constexpr = out.dtype
    pairs = out.reshape([BLOCK, P])
    none = gl.zeros((BLOCK, BLOCK), gl.float32, SQUARE)
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2 + OWN
        first, count, sequence, start = place_of(segments, chunks, length, segment)
        h1, h2 = _enter(state, segment, head, gl.load(chunks + 2 * first), HEADS, P, HALF, wide)
        for chunk in range(count):
            step = done + chunk
            at, room = (step % STAGES * 2 + OWN) * READS, (2 * step + OWN) % ROOMS
            u = us.index(step % STAGES * 2 + OWN).reshape([BLOCK, P]).permute((1, 0))
            mbarrier.wait(made.index(room), (2 * step + OWN) // ROOMS & 1)
            weights = meet(both_at(tiles, room), both_at(tiles, ROOMS + room), none)
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            later, earlier = vectors.index(at + SUM).load(COLUMN), vectors.index(at + WEIGHTED).load(ROW)
            weights = warpgroup_mma_wait(0, (weights,))
            answers = ask((h1, h2), both_at(tiles, ROOMS + room), none, states, dtype)
            weights *= gl.exp2(later[None, :] - earlier[:, None])
            # What was written here for the chunk before must be on its way.
            tma.store_wait(0)
            pairs.store(_masked(weights.to(dtype), mask))
            fence_async_shared()
            wide_u = widened(u.load(inputs))
            given = vectors.index(at + GIVEN).load(gl.SliceLayout(0, inputs))
            added = (wide_u * given[None, :]).to(dtype)
            own = gl.convert_layout(wide_u, SQUARE) * vectors.index(at + DIRECT).load(COLUMN)[None, :]
            answers = warpgroup_mma_wait(0, (answers,)) * vectors.index(at + READ).load(COLUMN)[None, :] + own
            answers = warpgroup_mma(u, pairs, answers, is_async=True)
            kept = vectors.index(at + KEPT).load(gl.SliceLayout(1, wide))
            h1, h2 = grow((h1, h2), both_at(tiles, room), added, kept)
            answers = warpgroup_mma_wait(2, (answers,))
            _write(y, [sequence, start + chunk * BLOCK, head * P], answers.to(dtype), out)
            h1, h2 = warpgroup_mma_wait(0, (h1, h2))
            mbarrier.arrive(taken.index(room), count=1)
            mbarrier.arrive(empty.index(step % STAGES), count=1)
        if gl.load(segments + 5 * segment + 4) == 1:
            store_state(final, gl.load(segments + 5 * segment + 2), head, h1, h2, HEADS, P, HALF, wide)
        done += count
    tma.store_wait(0)


@gluon.jit
def _masked(weights, mask):
    """Weights of entries for later ones; `mask` has the bits."""
    return gl.inline_asm_elementwise(MASK, "=r,r,r", [weights, mask.load(SQUARE)], weights.dtype, is_pure=True, pack=2)


@gluon.jit(do_not_specialize=["items"])
def scan_kernel(
    x, vectors, B, C, B_bias, C_bias, rates, starts, angle, final_angle, phases, leaving, entering, k, last,
    dt, lam, y, final, chunks, segments, length, dt_token, dt_head, lam_token, lam_head, items,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, ROOMS: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads, which share B and C."""
    tile: gl.constexpr = gl.NVMMASharedLayout(4 * HALF, 16, 2)
    us = gl.allocate_shared_memory(x.dtype, [2 * STAGES, 1, BLOCK, P], x.layout)
    tiles = two_stacks(x.dtype, 2 * ROOMS, BLOCK, 2 * HALF, tile)  # keys, then queries
    out = gl.allocate_shared_memory(x.dtype, [2, 1, BLOCK, P], y.layout)
    mask = _mask(BLOCK)
    sources = gl.allocate_shared_memory(x.dtype, [4, 1, BLOCK, 2 * HALF], B.layout)
    trig = gl.allocate_shared_memory(gl.float16, [2, BLOCK, 2 * HALF], tile)
    speeds = gl.allocate_shared_memory(gl.float32, [2, BLOCK, HALF], rates.layout)
    tokens = gl.allocate_shared_memory(gl.float32, [2 * STAGES * READS, BLOCK], vectors.layout)
    dts = gl.allocate_shared_memory(gl.float32, [4, BLOCK], vectors.layout)
    walking, making, feeding, angling = barriers_of_groups(STAGES, ROOMS)
    state = (entering, k, last, dt, lam, (dt_token, dt_head, lam_token, lam_head))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_walk, (us, tiles, tokens, walking, mask, out.index(0), y, state, final,
                     segments, chunks, length, items, 0, HEADS, P, HALF, BLOCK, STAGES, ROOMS)),
            (_walk, (us, tiles, tokens, walking, mask, out.index(1), y, state, final,
                     segments, chunks, length, items, 1, HEADS, P, HALF, BLOCK, STAGES, ROOMS)),
            (_make, (sources, B_bias, C_bias, trig, tiles, making, segments, items, HEADS, HALF, BLOCK, ROOMS, 2)),
            (_feed, ((x, vectors, rates, B, C), us, tokens, (speeds, dts), sources, feeding,
                     segments, chunks, length, items, HEADS, GROUPS, P, HALF, BLOCK, STAGES, 0)),
            (_angle, (speeds, dts, starts, angle, final_angle, (phases, leaving), trig, angling,
                      segments, items, 0, HEADS, HALF, BLOCK)),
            (_angle, (speeds, dts, starts, angle, final_angle, (phases, leaving), trig, angling,
                      segments, items, 1, HEADS, HALF, BLOCK)),
        ],
        [4, 4, 1, 1, 1],
        [192, 80, 48, 48, 48],
    )  # fmt: skip


@gluon.jit
def barriers_of_groups(STAGES: gl.constexpr, ROOMS: gl.constexpr):
    """Those of the warps that walk, make keys, feed the others and make cosines and sines."""
    full, empty = barriers_of(STAGES, 1), barriers_of(STAGES, 2)  # inputs and numbers of both heads
    made, taken = barriers_of(ROOMS, 1), barriers_of(ROOMS, 1)  # keys, and queries, of one
    brought, read = barriers_of(2, 1), barriers_of(2, 2)  # B and C, read for both heads
    angled, turned = barriers_of(2, 1), barriers_of(2, 1)  # cosines and sines of each head
    timed, heard = barriers_of(2, 1), barriers_of(2, 2)  # omega, and dt of both heads
    walking, making = (full, empty, made, taken), (brought, read, angled, turned, made, taken)
    return walking, making, (full, empty, brought, read, timed, heard), (angled, turned, timed, heard)


@gluon.jit
def _mask(BLOCK: gl.constexpr):
    """For `_masked`: all bits where an entry is later, none elsewhere."""
    mask = gl.allocate_shared_memory(gl.int16, [BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2))
    j, i = gl.arange(0, BLOCK, ROW), gl.arange(0, BLOCK, COLUMN)
    mask.store(gl.where(i[None, :] > j[:, None], -1, 0).to(gl.int16))
    return mask


@gluon.jit
def _sweep(
    us, keys, vectors, barriers, ends, kept, segments, items,
    OWN: gl.constexpr, HEADS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, ROOMS: gl.constexpr,
):  # fmt: skip
    """Four warps: the state of one head along a segment, from zero."""
    full, empty, made, taken = barriers
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    inputs: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    row: gl.constexpr = gl.SliceLayout(1, wide)
    dtype: gl.constexpr = us.dtype
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head = item // (HEADS // 2), item % (HEADS // 2) * 2 + OWN
        count = gl.load(segments + 5 * segment + 1)
        h1, h2 = gl.zeros((P, 2 * HALF), gl.float32, wide), gl.zeros((P, 2 * HALF), gl.float32, wide)
        remains = gl.zeros((P,), gl.float32, row) + 1.0
        for chunk in range(count):
            step = done + chunk
            at, room = (step % STAGES * 2 + OWN) * READS, (2 * step + OWN) % ROOMS
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            u = widened(us.index(step % STAGES * 2 + OWN).reshape([BLOCK, P]).permute((1, 0)).load(inputs))
            added = (u * vectors.index(at + GIVEN).load(gl.SliceLayout(0, inputs))[None, :]).to(dtype)
            keeps = vectors.index(at + KEPT).load(row)
            mbarrier.wait(made.index(room), (2 * step + OWN) // ROOMS & 1)
            h1, h2 = grow((h1, h2), both_at(keys, room), added, keeps)
            remains *= keeps
            h1, h2 = warpgroup_mma_wait(0, (h1, h2))
            mbarrier.arrive(taken.index(room), count=1)
            mbarrier.arrive(empty.index(step % STAGES), count=1)
        store_state(ends, segment, head, h1, h2, HEADS, P, HALF, wide)
        gl.store(kept + segment * HEADS + head, gl.log(gl.max(remains, 0)))
        done += count


@gluon.jit(do_not_specialize=["items"])
def sweep_kernel(
    x, vectors, B, B_bias, rates, ends, kept, turns, chunks, segments, length, items,
    HEADS: gl.constexpr, GROUPS: gl.constexpr, P: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, ROOMS: gl.constexpr,
):  # fmt: skip
    """One program per segment and pair of heads: only the states."""
    tile: gl.constexpr = gl.NVMMASharedLayout(4 * HALF, 16, 2)
    us = gl.allocate_shared_memory(x.dtype, [2 * STAGES, 1, BLOCK, P], x.layout)
    keys = two_stacks(x.dtype, ROOMS, BLOCK, 2 * HALF, tile)
    sources = gl.allocate_shared_memory(x.dtype, [4, 1, BLOCK, 2 * HALF], B.layout)
    trig = gl.allocate_shared_memory(gl.float16, [2, BLOCK, 2 * HALF], tile)
    speeds = gl.allocate_shared_memory(gl.float32, [2, BLOCK, HALF], rates.layout)
    tokens = gl.allocate_shared_memory(gl.float32, [2 * STAGES * READS, BLOCK], vectors.layout)
    dts = gl.allocate_shared_memory(gl.float32, [4, BLOCK], vectors.layout)
    walking, making, feeding, angling = barriers_of_groups(STAGES, ROOMS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sweep, (us, keys, tokens, walking, ends, kept, segments, items,
                      0, HEADS, P, HALF, BLOCK, STAGES, ROOMS)),
            (_sweep, (us, keys, tokens, walking, ends, kept, segments, items,
                      1, HEADS, P, HALF, BLOCK, STAGES, ROOMS)),
            (_make, (sources, B_bias, B_bias, trig, keys, making, segments, items, HEADS, HALF, BLOCK, ROOMS, 1)),
            (_feed, ((x, vectors, rates, B, None), us, tokens, (speeds, dts), sources, feeding,
                     segments, chunks, length, items, HEADS, GROUPS, P, HALF, BLOCK, STAGES, GIVEN)),
            (_angle, (speeds, dts, None, None, turns, None, trig, angling,
                      segments, items, 0, HEADS, HALF, BLOCK)),
            (_angle, (speeds, dts, None, None, turns, None, trig, angling,
                      segments, items, 1, HEADS, HALF, BLOCK)),
        ],
        [4, 4, 1, 1, 1],
        [168, 104, 72, 72, 72],
    )  # fmt: skip
