"""The selective scan on a GPU: each thread owns a few channels with all their states, and walks along time.

What bounds it is the unit that makes powers of two: one for each channel, state entry and token, and nothing may cost
more. So a state lies in the registers of one thread (its sum over n asks no other thread), B and C are numbers that
all threads of a program read from the same place, and tokens come in tiles of `TILE`, loaded at once.

- Tiles are `(channel, token)` and states `(channel, n)`, with neighbouring threads at neighbouring channels. Triton
  would give a thread several neighbouring channels and tear states apart, to load 16 bytes at once. So it is not told
  that channels lie side by side: `unit` is 1, which only the caller knows.
- A sequence is cut into *segments* where there are too few channels to fill the GPU. A first sweep finds what each
  segment adds to a state of zeros; the decay over a segment is that over the sum of its steps; a small kernel passes
  states from segment to segment, and then all segments run at once. Packed sequences are segments too.
- Backward is two sweeps, and keeps the inputs and the states that enter segments. Forwards, states give the gradients
  of C, D and z; backwards, gradients of states give those of B, x and dt. The gradient of the log decay of a token
  would need both at once: but it changes from token to token by what is read of the state as the token found it, less
  what the token writes and later ones read. So each sweep sums its own part, and every `CHUNK` tokens they meet at a
  state that was kept. (What a token reads of its own writing would be in both, and large where a state forgets fast.)
- Two warps per scheduler are all that their registers leave room for, which does not hide a wait for memory. So each
  tile asks for the next one to be fetched into the cache beside the multiprocessor: one instruction and no registers.

Everything is summed in a fixed order: the same call gives the same bits.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.packing import Packing
from everstate.ops.triton_common import INTERPRETED, LOG2E, softplus

CHUNK = 32
"""Tokens between two states that the sweeps of the backward pass share. With 64, dA loses twice as many digits."""

TILE, TILE_BACK = 8, 4
"""Tokens that are loaded at once, in the sweeps that only follow the state and in those that make gradients."""

BLOCK_D = 64
"""Channels of a program, which is one warp: two per thread share the loads of B and C."""

PROGRAMS, ROUNDS = 8, 4
"""Programs that fit on a multiprocessor, by their registers, and how often they fill it where sequences are cut."""

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    state: Float[Tensor, "seqs d n"],
    *,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d n"]]:
    """See `everstate.ops.selective_scan`."""
    ends = [] if packing is None else list(packing.cu_seqlens)
    y, final, _ = _scan(x, dt, A, B, C, state.to(torch.float32), D, z, dt_bias, ends)
    return y, final


@kernel_op("selective_scan")
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and the states that enter segments, where sequences are cut."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, ends)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    entering, final = call.entering(call.laid_out(state), None), call.new_states(len(state))
    _scan_kernel[call.grid](
        call.x, call.dt, call.A, call.BC, call.D, call.z, call.bias, entering, y, final, call.segments, 1,
        **call.sizes, num_warps=1,
    )  # fmt: skip
    return y, call.laid_back(final), entering if call.pieces > 1 else call.new_states(0)


@_scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pieces = _pieces(len(state), x.shape[1], x.shape[2], x.device)
    filled = triton.next_power_of_2(A.shape[1])
    entering = A.new_empty(len(state) * pieces if pieces > 1 else 0, filled, x.shape[2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state), entering


@kernel_op("selective_scan_backward")
def _backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    entering: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, state, and of D, z and the bias where they are given."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, ends)
    dy = dy.contiguous()
    reading, read = call.read_gradients(dy, entering if call.pieces > 1 else call.laid_out(state))
    writing = call.write_gradients(dy, call.entering(call.laid_out(dfinal), dy), read)
    dA = (reading.A.sum(0) + writing.A.sum(0))[: call.n].T
    dB, dC = (t.sum(0)[:, : call.n].view(B.shape).to(B.dtype) for t in (writing.B, reading.C))
    given = [] if reading.D is None else [reading.D.sum(0)]
    given += [] if reading.z is None else [reading.z]
    given += [] if writing.bias is None else [writing.bias.sum(0)]
    return [writing.x, writing.dt, dA.contiguous(), dB, dC, call.laid_back(writing.state), *given]


@_backward.register_fake
def _(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    entering: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    in_float32 = [t for t in (A, D, dt_bias) if t is not None]
    given = [t for t in (x, dt, A, B, C, state, D, z, dt_bias) if t is not None]
    return [
        torch.empty_like(
            t,
            dtype=torch.float32 if any(t is other for other in in_float32) else t.dtype,
            memory_format=torch.contiguous_format,
        )
        for t in given
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.ends = inputs[9]


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, entering = ctx.saved_tensors
    grads = iter(_backward(dy, dfinal, *saved[:6], entering, *saved[6:], ctx.ends))
    return (*(None if t is None else next(grads).to(t.dtype) for t in saved), None)


_scan.register_autograd(_differentiate, setup_context=_save)


class _Segments(NamedTuple):
    """Where the programs find their tokens.

    segments: first token, end, sequence, whether its first and last segment, first chunk.
    sequences: first segment and number of segments.
    """

    segments: Int[Tensor, "segments 6"]
    sequences: Int[Tensor, "seqs 2"]
    chunks: int


def _pieces(sequences: int, length: int, dim: int, device: torch.device) -> int:
    """Segments per sequence that fill the GPU with programs: one where half of it is full, since more are more work."""
    programs, room = sequences * triton.cdiv(dim, BLOCK_D), PROGRAMS * processors(device)
    return 1 if 2 * programs > room else min(ROUNDS * room // programs, triton.cdiv(length, CHUNK))


# Cached by value: every layer of a model asks for the same tables, which a captured graph could not copy to the GPU.
@lru_cache(maxsize=64)
def _cut(ends: tuple[int, ...], pieces: int, device: torch.device) -> _Segments:
    """The tables for sequences that end at `ends`, each cut into up to `pieces` segments of whole chunks."""
    segments: list[tuple[int, int, int, int, int, int]] = []
    sequences: list[tuple[int, int]] = []
    chunks = 0
    for sequence, (start, end) in enumerate(pairwise(ends)):
        count = triton.cdiv(end - start, CHUNK)
        each = triton.cdiv(count, pieces)
        cuts = range(0, count, each)
        sequences.append((len(segments), len(cuts)))
        for at in cuts:
            until = min(start + (at + each) * CHUNK, end)
            segments.append((start + at * CHUNK, until, sequence, at == 0, until == end, chunks + at))
        chunks += count
    table = partial(torch.tensor, dtype=torch.int32, device=device)
    return _Segments(table(segments), table(sequences), chunks)


def _rows(t: Float[Tensor, "b l d"]) -> Float[Tensor, "t d"]:
    """`t` with b and l as one dimension, the last dimension dense: a view where it can be one."""
    t = t.flatten(0, 1)
    return t if t.stride(-1) == 1 else t.contiguous()


class _Read(NamedTuple):
    """What the sweep forwards leaves for the sweep backwards."""

    kept: Float[Tensor, "chunks n d"]
    """The state after each chunk."""
    spans: Float[Tensor, "chunks d"]
    """The sum of the steps of each chunk."""
    reads: Float[Tensor, "t d"]
    """What the reading of a token's state adds to the gradient of its log decay, times A and summed over n."""


class _Reading(NamedTuple):
    A: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None


class _Writing(NamedTuple):
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    state: Tensor


class _Call:
    """The arguments as the kernels want them, and the launches that forward and backward share."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, ends: Sequence[int],
    ) -> None:  # fmt: skip
        (self.batch, self.length, self.dim), self.n = x.shape, A.shape[1]
        filled = triton.next_power_of_2(self.n)
        self.x, self.dt, self.z = _rows(x), _rows(dt), None if z is None else _rows(z)
        self.D, self.bias = (None if t is None else t.contiguous() for t in (D, dt_bias))
        self.A = A.new_zeros(filled, self.dim, dtype=torch.float32)
        torch.mul(A.T, LOG2E.value, out=self.A[: self.n])
        make = torch.empty if filled == self.n else torch.zeros
        self.BC = make(self.batch * self.length, 2, filled, dtype=torch.float32, device=x.device)
        self.BC[:, 0, : self.n], self.BC[:, 1, : self.n] = B.flatten(0, 1), C.flatten(0, 1)
        bounds = tuple(ends) or tuple(range(0, (self.batch + 1) * self.length, self.length))
        self.blocks = triton.cdiv(self.dim, BLOCK_D)
        self.pieces = _pieces(len(bounds) - 1, self.length, self.dim, x.device)
        self.segments, self.sequences, self.chunks = _cut(bounds, self.pieces, x.device)
        self.grid = (len(self.segments) * self.blocks,)
        self.sizes: dict[str, Any] = {
            "DIM": self.dim, "N": filled, "BLOCK_D": BLOCK_D, "TILE": TILE,
            "X": self.x.stride(0), "DT": self.dt.stride(0), "Z": 0 if self.z is None else self.z.stride(0),
        }  # fmt: skip

    def new_states(self, *count: int) -> Float[Tensor, "count n d"]:
        """Room for states as the kernels lay them out."""
        return self.A.new_empty(*count, *self.A.shape)

    def laid_out(self, state: Float[Tensor, "seqs d n"]) -> Float[Tensor, "seqs n d"]:
        """States with channels side by side, and zeros where n is filled up."""
        if self.n == len(self.A):
            return state.transpose(1, 2).contiguous()
        out = self.A.new_zeros(len(state), *self.A.shape)
        out[:, : self.n] = state.transpose(1, 2)
        return out

    def laid_back(self, state: Float[Tensor, "seqs n d"]) -> Float[Tensor, "seqs d n"]:
        """The reverse of `laid_out`."""
        return state[:, : self.n].transpose(1, 2).contiguous()

    def entering(self, state: Float[Tensor, "seqs n d"], dy: Tensor | None) -> Float[Tensor, "segments n d"]:
        """The state that enters each segment; with `dy`, the gradient of the state that leaves it."""
        if self.pieces == 1:
            return state
        ends = self.new_states(len(self.sequences) * self.pieces)  # Short sequences have fewer segments.
        spans = self.A.new_empty(len(self.segments), self.dim)
        inputs, gate, stride = (self.x, None, self.sizes["X"]) if dy is None else (dy, self.z, self.dim)
        _ends_kernel[self.grid](
            inputs, self.dt, self.A, self.BC, gate, self.bias, ends, spans, self.segments, 1,
            **{**self.sizes, "X": stride}, REVERSE=dy is not None, num_warps=1,
        )  # fmt: skip
        _pass_kernel[(len(self.sequences) * len(self.A), triton.cdiv(self.dim, 256))](
            ends, spans, self.A, state, self.sequences,
            DIM=self.dim, N=len(self.A), REVERSE=dy is not None, BLOCK=256,
        )  # fmt: skip
        return ends

    def read_gradients(self, dy: Tensor, entering: Tensor) -> tuple[_Reading, _Read]:
        """Gradients of C, D and z, and half of that of A, all but z still to be summed."""
        tokens, segments = self.batch * self.length, len(self.segments)
        new = self.A.new_empty
        read = _Read(self.new_states(self.chunks), new(self.chunks, self.dim), new(tokens, self.dim))
        reading = _Reading(
            A=self.new_states(segments),
            C=new(self.blocks, tokens, len(self.A)),
            D=None if self.D is None else new(segments, self.dim),
            z=None if self.z is None else dy.new_empty(dy.shape, dtype=self.z.dtype),
        )
        _states_kernel[self.grid](
            self.x, self.dt, self.A, self.BC, self.D, self.z, self.bias, dy, entering, *read,
            *reading, self.segments, tokens, 1, **{**self.sizes, "TILE": TILE_BACK}, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip
        return reading, read

    def write_gradients(self, dy: Tensor, leaving: Tensor, read: _Read) -> _Writing:
        """Gradients of x, dt, the state, B, the bias, and half of that of A; the last three still to be summed."""
        tokens, segments = self.batch * self.length, len(self.segments)
        new = self.A.new_empty
        writing = _Writing(
            x=torch.empty_like(dy),
            dt=dy.new_empty(dy.shape, dtype=self.dt.dtype),
            A=self.new_states(segments),
            B=new(self.blocks, tokens, len(self.A)),
            bias=None if self.bias is None else new(segments, self.dim),
            state=self.new_states(len(self.sequences)),
        )
        _writes_kernel[self.grid](
            self.x, self.dt, self.A, self.BC, self.D, self.z, self.bias, dy, leaving, *read,
            *writing, self.segments, tokens, 1, **{**self.sizes, "TILE": TILE_BACK}, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip
        return writing


@triton.jit
def _tile(base, channels, at, inside, STRIDE: tl.constexpr):
    """Numbers `(channel, token)` of the tokens from `base` on, in float32."""
    place = (base + channels)[:, None] + (at * STRIDE)[None, :]
    return tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(base, channels, at, inside, value, STRIDE: tl.constexpr):
    place = (base + channels)[:, None] + (at * STRIDE)[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _of_token(tile, at, token):
    """One token of a tile. A thread holds all of them, so a compiler only sees zeros added to the bits of a number."""
    return tl.sum(tl.where((at == token)[None, :], tile.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)


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
    steps = _tile(dt, channels, at, inside, DT)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
        steps = softplus(steps + bias[:, None])
    return steps


@triton.jit
def _sigmoid(x):
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp2(-x * LOG2E))
    # A division would scale its operands first.
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + tl.exp2(-x * LOG2E)], tl.float32, True, 1
    )


@triton.jit
def _gated(tile, z, token, channels, at, inside, Z: tl.constexpr):
    """A tile multiplied by `silu(z)`, where there is a z."""
    if z is not None:
        gate = _tile(z + token * Z, channels, at, inside, Z)
        tile *= gate * _sigmoid(gate)
    return tile


@triton.jit
def _addresses(one, two, three, four, ONE: tl.constexpr, TWO: tl.constexpr, THREE: tl.constexpr, FOUR: tl.constexpr):
    """Where the rows of eight tokens lie in four tensors, 32 addresses in all, and the bytes from row to row."""
    if INTERPRETED:
        return 0, 0
    which = tl.arange(0, 32) // 8
    base = tl.where(which == 0, one.to(tl.int64), two.to(tl.int64))
    base = tl.where(which == 2, three.to(tl.int64), tl.where(which == 3, four.to(tl.int64), base))
    stride = tl.where(which == 0, ONE, tl.where(which == 1, TWO, tl.where(which == 2, THREE, FOUR)))
    return base, stride


@triton.jit
def _rows_of(BC, x, dt, z, N: tl.constexpr, X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr,
             DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """`_addresses` of what all sweeps read."""
    d = tl.program_id(0) % ((DIM + BLOCK_D - 1) // BLOCK_D) * BLOCK_D
    step, gate, GATE = X * x.dtype.element_ty.primitive_bitwidth // 8, x + d, 0
    if z is not None:
        gate, GATE = z + d, Z * z.dtype.element_ty.primitive_bitwidth // 8
    return _addresses(
        BC, x + d, dt + d, gate, 8 * N, step, DT * dt.dtype.element_ty.primitive_bitwidth // 8, GATE
    )  # fmt: skip


@triton.jit
def _more_rows_of(dy, reads, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`_addresses` of what only the backward sweeps read."""
    d = tl.program_id(0) % ((DIM + BLOCK_D - 1) // BLOCK_D) * BLOCK_D
    STEP: tl.constexpr = DIM * dy.dtype.element_ty.primitive_bitwidth // 8
    half = reads + tl.minimum(d + BLOCK_D // 2, DIM - 1)
    return _addresses(dy + d, reads + d, half, dy + d, STEP, 4 * DIM, 4 * DIM, STEP)


@triton.jit
def _fetch(addresses, strides, token, first, end):
    """Have the cache of the multiprocessor fetch the rows of eight tokens, as far as they lie in `[first, end)`."""
    if INTERPRETED:
        return
    rows = tl.minimum(tl.maximum(token + tl.arange(0, 32) % 8, first), end - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [addresses + rows * strides], tl.int32, False, 1
    )


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
        h = h * tl.exp2(a * _of_token(steps, at, t)[:, None]) + k[None, :] * _of_token(written, at, t)[:, None]
        out += tl.where((at == t)[None, :], tl.sum(h * q[None, :], 1)[:, None], 0.0)
    if GATE:
        opened = gate.to(tl.float32)
        out *= opened * _sigmoid(opened)
    _store_tile(y + token * DIM, channels, at, inside, out, DIM)
    return h


@triton.jit
def _mine(segments, unit, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of this program: its segment, its channels, which of them exist."""
    BLOCKS: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    segment = (tl.program_id(0) // BLOCKS).to(tl.int64)
    channels = (tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)) * unit
    if DIM % BLOCK_D == 0:
        return segment, channels, tl.full((BLOCK_D,), 1, tl.int1)
    return segment, channels, channels < DIM


@triton.jit
def _skip(D, channels, inside):
    """D, or zeros."""
    skip = tl.zeros(channels.shape, tl.float32)
    if D is not None:
        skip = tl.load(D + channels, mask=inside, other=0.0).to(tl.float32)
    return skip


@triton.jit
def _states_at(base, index, n, channels, DIM: tl.constexpr, N: tl.constexpr):
    """Pointers to a state, laid out `(n, channel)` in memory."""
    return (base + index.to(tl.int64) * (N * DIM) + channels)[:, None] + (n * DIM)[None, :]


@triton.jit(do_not_specialize=["unit"])
def _scan_kernel(
    x, dt, A, BC, D, z, dt_bias, entering, y, final, segments, unit,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """One program per segment and block of channels."""
    segment, channels, inside = _mine(segments, unit, DIM, BLOCK_D)
    n = tl.arange(0, N)
    token, end = tl.load(segments + 6 * segment).to(tl.int64), tl.load(segments + 6 * segment + 1).to(tl.int64)
    a = tl.load(_states_at(A, segment * 0, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    h = tl.load(_states_at(entering, segment, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    skip = _skip(D, channels, inside)
    BIAS: tl.constexpr = dt_bias is not None
    GATE: tl.constexpr = z is not None
    bias = _skip(dt_bias, channels, inside)
    tiles = (end - token) // TILE
    # The next tile is on its way while this one is computed, into registers too: without, it takes twice as long.
    rows, strides = _rows_of(BC, x, dt, z, N, X, DT, Z, DIM, BLOCK_D)
    next_x, next_dt, next_z = _inputs(x, dt, z, token, channels, inside & (tiles > 0), TILE, X, DT, Z)
    for i in range(tiles):
        now, more = token + i * TILE, inside & (i + 1 < tiles)
        _fetch(rows, strides, now + TILE, token, end)
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
    if tl.load(segments + 6 * segment + 4) == 1:
        sequence = tl.load(segments + 6 * segment + 2)
        tl.store(_states_at(final, sequence, n, channels, DIM, N), h, mask=inside[:, None])


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
        written *= opened * _sigmoid(opened)
    elif not REVERSE:
        written *= steps
    BC += token * 2 * N
    for i in tl.static_range(TILE):
        t = TILE - 1 - i if REVERSE else i
        step = _of_token(steps, at, t)
        # Not tl.sum(steps, 1): Triton 3.6 mixes channels and tokens in a sum along a tile as it was loaded, in a loop.
        span += step
        decay = tl.exp2(a * step[:, None])
        k = tl.load(BC + 2 * N * t + (N if REVERSE else 0) + n)
        added = k[None, :] * _of_token(written, at, t)[:, None]
        h = (h + added) * decay if REVERSE else h * decay + added
    return h, span


@triton.jit(do_not_specialize=["unit"])
def _ends_kernel(
    x, dt, A, BC, z, dt_bias, ends, spans, segments, unit,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each segment adds to a state of zeros, and the sum of its steps.

    Reversed, with the gradient of y for x: what each adds to a gradient of zeros.
    """
    segment, channels, inside = _mine(segments, unit, DIM, BLOCK_D)
    n = tl.arange(0, N)
    first, end = tl.load(segments + 6 * segment).to(tl.int64), tl.load(segments + 6 * segment + 1).to(tl.int64)
    if tl.load(segments + 6 * segment + (3 if REVERSE else 4)) == 1:
        end = first  # Nobody asks what it adds.
    a = tl.load(_states_at(A, segment * 0, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    BIAS: tl.constexpr = dt_bias is not None
    GATE: tl.constexpr = z is not None
    bias = _skip(dt_bias, channels, inside)
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
        _fetch(rows, strides, ahead, first, end)
        now_x, now_dt, now_z = _inputs(x, dt, z, now, channels, inside, TILE, X, DT, Z)
        h, span = _ends_tile(h, span, a, bias, now_x, now_dt, now_z, BC, now, n, N, TILE, BIAS, GATE, REVERSE)
        now = ahead
    for i in range(0 if REVERSE else rest):
        now = end - rest + i
        now_x, now_dt, now_z = _inputs(x, dt, z, now, channels, inside, 1, X, DT, Z)
        h, span = _ends_tile(h, span, a, bias, now_x, now_dt, now_z, BC, now, n, N, 1, BIAS, GATE, REVERSE)
    tl.store(_states_at(ends, segment, n, channels, DIM, N), h, mask=inside[:, None])
    tl.store(spans + segment * DIM + channels, span, mask=inside)


@triton.jit
def _pass_kernel(
    ends, spans, A, state, sequences, DIM: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sequence, n and some channels: from what segments add to what enters each, in place."""
    sequence, n = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    first, count = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + n * DIM + d, mask=d < DIM, other=0.0)
    h = tl.load(state + (sequence * N + n) * DIM + d, mask=d < DIM, other=0.0)
    for step in range(count):
        segment = (first + (count - 1 - step if REVERSE else step)).to(tl.int64)
        own = ends + (segment * N + n) * DIM + d
        added = tl.load(own, mask=d < DIM, other=0.0)
        span = tl.load(spans + segment * DIM + d, mask=d < DIM, other=0.0)
        tl.store(own, h, mask=d < DIM)
        h = h * tl.exp2(a * span) + added


@triton.jit
def _states_tile(
    h, dA, dD, span, a, skip, x, dt, BC, z, dt_bias, dy, dC, dz, reads, token, channels, inside, n,
    DIM: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """Of the tokens of one tile: how their states are read."""
    at = tl.arange(0, TILE)
    inputs = _tile(x + token * X, channels, at, inside, X)
    steps = _steps(dt + token * DT, dt_bias, channels, at, inside, DT)
    outputs = _gated(_tile(dy + token * DIM, channels, at, inside, DIM), z, token, channels, at, inside, Z)
    read, out = tl.zeros(inputs.shape, tl.int32), tl.zeros(inputs.shape, tl.int32)
    sums = tl.zeros((32, TILE), tl.int32)
    BC += token * 2 * N
    for t in tl.static_range(TILE):
        k, q = tl.load(BC + 2 * N * t + n), tl.load(BC + 2 * N * t + N + n)
        u, step, du = _of_token(inputs, at, t), _of_token(steps, at, t), _of_token(outputs, at, t)
        span += step
        dD += du * u
        left = h * tl.exp2(a * step[:, None])
        h = left + k[None, :] * (u * step)[:, None]
        if z is not None:
            out += _at_token(tl.sum(h * q[None, :], 1) + skip * u, at, t)
        seen = left * q[None, :]
        read += _at_token(tl.sum(seen * a, 1) * du, at, t)
        dA += seen * (span * du)[:, None]
        sums += _at_token(_over_channels(h * du[:, None], N), at, t)
    _store_sums(dC + token * N, sums, at, N)
    _store_tile(reads + token * DIM, channels, at, inside, read.to(tl.float32, bitcast=True), DIM)
    if z is not None:
        # Loaded again: in registers they would be in the way.
        gate = _tile(z + token * Z, channels, at, inside, Z)
        open = _sigmoid(gate)
        dgate = out.to(tl.float32, bitcast=True) * _tile(dy + token * DIM, channels, at, inside, DIM) * open
        _store_tile(dz + token * DIM, channels, at, inside, dgate + dgate * gate * (1.0 - open), DIM)
    return h, dA, dD, span


@triton.jit(do_not_specialize=["unit"])
def _states_kernel(
    x, dt, A, BC, D, z, dt_bias, dy, entering, kept, spans, reads, dA, dC, dD, dz, segments, total, unit,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Forwards: gradients of C, D and z, what reading adds to those of A and dt, and the state after each chunk."""
    segment, channels, inside = _mine(segments, unit, DIM, BLOCK_D)
    n = tl.arange(0, N)
    token, end = tl.load(segments + 6 * segment).to(tl.int64), tl.load(segments + 6 * segment + 1).to(tl.int64)
    chunk = tl.load(segments + 6 * segment + 5)
    a = tl.load(_states_at(A, segment * 0, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    h = tl.load(_states_at(entering, segment, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    skip = _skip(D, channels, inside)
    sum_A, sum_D = tl.zeros((BLOCK_D, N), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    dC += tl.program_id(0) % ((DIM + BLOCK_D - 1) // BLOCK_D) * total * N
    rows, strides = _rows_of(BC, x, dt, z, N, X, DT, Z, DIM, BLOCK_D)
    more, more_strides = _more_rows_of(dy, reads, DIM, BLOCK_D)
    while token < end:
        until, span = tl.minimum(token + CHUNK, end), tl.zeros((BLOCK_D,), tl.float32)
        for _ in range((until - token) // TILE):
            _fetch(rows, strides, token + TILE, token, end)
            _fetch(more, more_strides, token + TILE, token, end)
            h, sum_A, sum_D, span = _states_tile(
                h, sum_A, sum_D, span, a, skip, x, dt, BC, z, dt_bias, dy, dC, dz, reads, token, channels, inside, n,
                DIM, N, TILE, X, DT, Z,
            )  # fmt: skip
            token += TILE
        while token < until:
            h, sum_A, sum_D, span = _states_tile(
                h, sum_A, sum_D, span, a, skip, x, dt, BC, z, dt_bias, dy, dC, dz, reads, token, channels, inside, n,
                DIM, N, 1, X, DT, Z,
            )  # fmt: skip
            token += 1
        tl.store(_states_at(kept, chunk, n, channels, DIM, N), h, mask=inside[:, None])
        tl.store(spans + chunk.to(tl.int64) * DIM + channels, span, mask=inside)
        chunk += 1
    tl.store(_states_at(dA, segment, n, channels, DIM, N), sum_A, mask=inside[:, None])
    if D is not None:
        tl.store(dD + segment * DIM + channels, sum_D, mask=inside)


@triton.jit
def _writes_tile(
    r, dlog, span, dA, dbias, a, skip, x, dt, BC, z, dt_bias, dy, reads, dx, ddt, dB, token, channels, inside, n,
    DIM: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """Of the tokens of one tile, the last first: what was written to the state.

    r is the gradient of the state as the next token sees it, dlog that of the exponent of the next token's decay,
    times A and summed over n.
    """
    at = tl.arange(0, TILE)
    inputs = _tile(x + token * X, channels, at, inside, X)
    steps = _steps(dt + token * DT, dt_bias, channels, at, inside, DT)
    outputs = _gated(_tile(dy + token * DIM, channels, at, inside, DIM), z, token, channels, at, inside, Z)
    read = _tile(reads + token * DIM, channels, at, inside, DIM)
    dinputs, dwritings = tl.zeros(inputs.shape, tl.int32), tl.zeros(inputs.shape, tl.int32)
    sums = tl.zeros((32, TILE), tl.int32)
    BC += token * 2 * N
    for i in tl.static_range(TILE):
        t = TILE - 1 - i
        k, q = tl.load(BC + 2 * N * t + n), tl.load(BC + 2 * N * t + N + n)
        u, step, du = _of_token(inputs, at, t), _of_token(steps, at, t), _of_token(outputs, at, t)
        written = r * k[None, :]
        r += q[None, :] * du[:, None]
        sums += _at_token(_over_channels(r * (u * step)[:, None], N), at, t)
        dwritten = tl.sum(r * k[None, :], 1)
        dlog += _of_token(read, at, t) - u * step * tl.sum(written * a, 1)
        dinputs += _at_token(dwritten * step + skip * du, at, t)
        dwritings += _at_token(dlog * LN2 + dwritten * u, at, t)
        dA -= written * (span * u * step)[:, None]
        span -= step
        r *= tl.exp2(a * step[:, None])
    dsteps = dwritings.to(tl.float32, bitcast=True)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
        dsteps *= _sigmoid(_tile(dt + token * DT, channels, at, inside, DT) + bias[:, None])
        dbias += tl.sum(dsteps, 1)
    _store_sums(dB + token * N, sums, at, N)
    _store_tile(ddt + token * DIM, channels, at, inside, dsteps, DIM)
    _store_tile(dx + token * DIM, channels, at, inside, dinputs.to(tl.float32, bitcast=True), DIM)
    return r, dlog, span, dA, dbias


@triton.jit(do_not_specialize=["unit"])
def _writes_kernel(
    x, dt, A, BC, D, z, dt_bias, dy, leaving, kept, spans, reads, dx, ddt, dA, dB, dbias, dstate, segments, total, unit,
    DIM: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    X: tl.constexpr, DT: tl.constexpr, Z: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Backwards: gradients of x, dt, B, the bias and the first state, and what writing takes from that of A."""
    segment, channels, inside = _mine(segments, unit, DIM, BLOCK_D)
    n = tl.arange(0, N)
    first, end = tl.load(segments + 6 * segment).to(tl.int64), tl.load(segments + 6 * segment + 1).to(tl.int64)
    a = tl.load(_states_at(A, segment * 0, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    r = tl.load(_states_at(leaving, segment, n, channels, DIM, N), mask=inside[:, None], other=0.0)
    skip = _skip(D, channels, inside)
    sum_A, sum_bias = tl.zeros((BLOCK_D, N), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    dB += tl.program_id(0) % ((DIM + BLOCK_D - 1) // BLOCK_D) * total * N
    rows, strides = _rows_of(BC, x, dt, z, N, X, DT, Z, DIM, BLOCK_D)
    more, more_strides = _more_rows_of(dy, reads, DIM, BLOCK_D)
    chunks = (end - first + CHUNK - 1) // CHUNK
    for back in range(chunks):
        number = chunks - 1 - back
        chunk, token = tl.load(segments + 6 * segment + 5) + number, first + number * CHUNK
        size = tl.minimum(end - token, CHUNK)
        span = tl.load(spans + chunk.to(tl.int64) * DIM + channels, mask=inside, other=0.0)
        met = r * tl.load(_states_at(kept, chunk, n, channels, DIM, N), mask=inside[:, None], other=0.0)
        sum_A += met * span[:, None]
        dlog = tl.sum(met * a, 1)
        for i in range(size % TILE):
            r, dlog, span, sum_A, sum_bias = _writes_tile(
                r, dlog, span, sum_A, sum_bias, a, skip, x, dt, BC, z, dt_bias, dy, reads, dx, ddt, dB,
                token + size - 1 - i, channels, inside, n, DIM, N, 1, X, DT, Z,
            )  # fmt: skip
        for i in range(size // TILE):
            _fetch(rows, strides, token + (size // TILE - 2 - i) * TILE, first, end)
            _fetch(more, more_strides, token + (size // TILE - 2 - i) * TILE, first, end)
            r, dlog, span, sum_A, sum_bias = _writes_tile(
                r, dlog, span, sum_A, sum_bias, a, skip, x, dt, BC, z, dt_bias, dy, reads, dx, ddt, dB,
                token + (size // TILE - 1 - i) * TILE, channels, inside, n, DIM, N, TILE, X, DT, Z,
            )  # fmt: skip
    tl.store(_states_at(dA, segment, n, channels, DIM, N), sum_A, mask=inside[:, None])
    if dt_bias is not None:
        tl.store(dbias + segment * DIM + channels, sum_bias, mask=inside)
    if tl.load(segments + 6 * segment + 3) == 1:
        sequence = tl.load(segments + 6 * segment + 2)
        tl.store(_states_at(dstate, sequence, n, channels, DIM, N), r, mask=inside[:, None])
