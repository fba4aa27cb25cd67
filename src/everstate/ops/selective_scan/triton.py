"""The selective scan on a GPU: each thread owns a channel or two with all their states, and walks along time.

What bounds it is the unit that makes powers of two: one for each channel, state entry and token, and little may cost
more. So a state lies in the registers of one thread (its sum over n asks no other thread), B and C are numbers that
all threads of a program read from the same place, and tokens come in tiles that are loaded at once.

- Tiles are `(channel, token)` and states `(channel, n)`, with neighbouring threads at neighbouring channels. Triton
  would give a thread several neighbouring channels and tear states apart, to load 16 bytes at once. So it is not told
  that channels lie side by side: `unit` is 1, which only the caller knows.
- A sequence is cut into *segments* where there are too few channels to fill the GPU. A first sweep finds what each
  segment adds to a state of zeros; the decay over a segment is that over the sum of its steps; a small kernel passes
  states from segment to segment, and then all segments run at once. Packed sequences are segments too. Where the GPU
  is a third full, the forward pass spares itself the first sweep, and keeps the states that enter segments.
- Backward is two sweeps, and keeps the inputs and the states that enter segments. Forwards, states give the gradients
  of C, D and z; backwards, gradients of states give those of B, x and dt. The gradient of the log decay of a token
  would need both at once: but it changes from token to token by what is read of the state as the token found it, less
  what the token writes and later ones read. So each sweep sums its own part, and at the end of every *chunk* they meet
  at a state that was kept. (What a token reads of its own writing would be in both, and large where a state forgets
  fast.)
- The gradient of A is the sum of those of log decays, each times its step. From sums of such differences it would lose
  digits that float32 has and inputs of 16 bits have not. So in float32 the derivative of a state by A, which obeys a
  recurrence of its own, goes along with the state in the first of the two sweeps.
- Two or three warps per scheduler are all that their registers leave room for, which does not hide a wait for memory.
  So each tile asks for the next one to be fetched into the cache beside the multiprocessor: one instruction and no
  registers.

Everything is summed in a fixed order: the same call gives the same bits.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.packing import Packing
from everstate.ops.selective_scan.triton_backward import states_kernel, writes_kernel
from everstate.ops.selective_scan.triton_forward import ends_kernel, pass_kernel, scan_kernel
from everstate.ops.triton_common import LOG2E
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_rows import dense_rows

CHUNK, CHUNK_EXACT = 128, 16
"""Tokens between two states that the sweeps of the backward pass share; in float32 fewer, which lose fewer digits."""


class _Shape(NamedTuple):
    """What a program, which is one warp, has of a sweep.

    channels: 32 or 64; two per thread share the loads of B and C, with one more programs fit on a multiprocessor.
    tokens: of a tile. registers: that a thread may have.
    """

    channels: int
    tokens: int
    registers: int


SCAN, ENDS = _Shape(32, 8, 168), _Shape(32, 8, 88)
BACK, BACK_EXACT = _Shape(64, 4, 255), _Shape(32, 4, 168)
"""The sweeps that make gradients; those in float32 hold one state more."""

CHANNELS, PROGRAMS, ROUNDS = 64, 8, 8
"""Programs of so many channels that fill a multiprocessor, and how often they fill it where sequences are cut: twice as
often where the forward pass is cut too, more of whose programs run at a time."""

AHEAD = 32
"""Segments whose states are asked for together where they are passed on."""


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
@replayed
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and the states that enter segments, where sequences are cut."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, ends)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    state, final = call.laid_out(state), call.new_states(len(state))
    whole = _walks(len(final), x)
    entering = call.new_states(call.cuts) if whole else call.entering(state, None)
    grid, sizes = call.launch(SCAN, len(call.sequences if whole else call.segments))
    launch(
        scan_kernel, grid, call.x, call.dt, call.A, call.BC, call.D, call.z, call.bias, state, entering, y, final,
        call.segments, call.sequences, 1, **sizes, WHOLE=whole, KEEP=whole and call.pieces > 1,
    )  # fmt: skip
    return y, call.laid_back(final), entering if call.pieces > 1 else call.new_states(0)


@_scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pieces = _pieces(len(state), x)
    filled = power_of_2(A.shape[1])
    entering = A.new_empty(len(state) * pieces if pieces > 1 else 0, filled, x.shape[2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state), entering


@kernel_op("selective_scan_backward")
@replayed
def _backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    entering: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, state, and of D, z and the bias where they are given."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, ends)
    dy = dy.contiguous()
    leaving = call.entering(call.laid_out(dfinal), dy)
    reading, read = call.read_gradients(dy, entering if call.pieces > 1 else call.laid_out(state), leaving)
    writing = call.write_gradients(dy, leaving, read)
    dA = (reading.A.sum(0) if writing.A is None else reading.A.sum(0) + writing.A.sum(0))[: call.n].T
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


def _pieces(sequences: int, x: Float[Tensor, "b l d"]) -> int:
    """Segments per sequence that fill the GPU with programs: one where half of it is full, since more are more work."""
    programs, room = _filling(sequences, x)
    rounds = ROUNDS if _walks(sequences, x) else 2 * ROUNDS
    return 1 if 2 * programs > room else min(rounds * room // programs, cdiv(x.shape[1], _chunk(x.dtype)))


def _walks(sequences: int, x: Float[Tensor, "b l d"]) -> bool:
    """Whether forward, a program walks along a whole sequence: where a third of the GPU is full, as cuts are work."""
    programs, room = _filling(sequences, x)
    return 3 * programs >= room


def _filling(sequences: int, x: Float[Tensor, "b l d"]) -> tuple[int, int]:
    """Programs where nothing is cut, and how many the GPU has room for."""
    return sequences * cdiv(x.shape[2], CHANNELS), PROGRAMS * processors(x.device)


def _chunk(dtype: torch.dtype) -> int:
    return CHUNK_EXACT if dtype == torch.float32 else CHUNK


# Cached by value: every layer of a model asks for the same tables, which a captured graph could not copy to the GPU.
@lru_cache(maxsize=64)
def _cut(ends: tuple[int, ...], chunk: int, pieces: int, device: torch.device) -> _Segments:
    """The tables for sequences that end at `ends`, each cut into up to `pieces` segments of whole chunks."""
    segments: list[tuple[int, int, int, int, int, int]] = []
    sequences: list[tuple[int, int]] = []
    chunks = 0
    for sequence, (start, end) in enumerate(pairwise(ends)):
        count = cdiv(end - start, chunk)
        each = cdiv(count, pieces)
        cuts = range(0, count, each)
        sequences.append((len(segments), len(cuts)))
        for at in cuts:
            until = min(start + (at + each) * chunk, end)
            segments.append((start + at * chunk, until, sequence, at == 0, until == end, chunks + at))
        chunks += count
    table = partial(torch.tensor, dtype=torch.int32, device=device)
    return _Segments(table(segments), table(sequences), chunks)


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
    A: Tensor | None
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
        filled = power_of_2(self.n)
        self.x, self.dt, self.z = dense_rows(x), dense_rows(dt), None if z is None else dense_rows(z)
        self.D, self.bias = (None if t is None else t.contiguous() for t in (D, dt_bias))
        make = torch.empty if filled == self.n else torch.zeros
        self.A = make(filled, self.dim, dtype=torch.float32, device=x.device)
        torch.mul(A.T, LOG2E.value, out=self.A[: self.n])
        self.BC = make(self.batch * self.length, 2, filled, dtype=torch.float32, device=x.device)
        self.BC[:, 0, : self.n], self.BC[:, 1, : self.n] = B.flatten(0, 1), C.flatten(0, 1)
        bounds = tuple(ends) or tuple(range(0, (self.batch + 1) * self.length, self.length))
        self.pieces, self.chunk = _pieces(len(bounds) - 1, x), _chunk(x.dtype)
        self.segments, self.sequences, self.chunks = _cut(bounds, self.chunk, self.pieces, x.device)
        self.cuts = len(self.sequences) * self.pieces if self.pieces > 1 else 0
        self.exact = x.dtype == torch.float32
        self.back = BACK_EXACT if self.exact else BACK

    def launch(self, shape: _Shape, programs: int, x: Tensor | None = None) -> tuple[tuple[int], dict[str, Any]]:
        """The grid and the sizes of a sweep over so many segments or sequences, with `x` for that of the call."""
        return (programs * cdiv(self.dim, shape.channels),), {
            "DIM": self.dim, "N": len(self.A), "BLOCK_D": shape.channels, "TILE": shape.tokens,
            "X": (self.x if x is None else x).stride(0),
            "DT": self.dt.stride(0), "Z": 0 if self.z is None else self.z.stride(0),
            "num_warps": 1, "maxnreg": shape.registers,
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
        ends = self.new_states(self.cuts)  # Short sequences have fewer segments.
        spans = self.A.new_empty(len(self.segments), self.dim)
        inputs, gate = (self.x, None) if dy is None else (dy.flatten(0, 1), self.z)
        grid, sizes = self.launch(ENDS, len(self.segments), inputs)
        launch(
            ends_kernel, grid, inputs, self.dt, self.A, self.BC, gate, self.bias, ends, spans, self.segments, 1,
            **sizes, REVERSE=dy is not None,
        )  # fmt: skip
        launch(
            pass_kernel, (len(self.sequences) * len(self.A), cdiv(self.dim, 128)),
            ends, spans, self.A, state, self.sequences,
            DIM=self.dim, N=len(self.A), REVERSE=dy is not None, BLOCK=128, AHEAD=AHEAD,
        )  # fmt: skip
        return ends

    def read_gradients(self, dy: Tensor, entering: Tensor, leaving: Tensor) -> tuple[_Reading, _Read]:
        """Gradients of C, D and z, and that of A or half of it, all but z still to be summed."""
        tokens, segments = self.batch * self.length, len(self.segments)
        new = self.A.new_empty
        read = _Read(self.new_states(self.chunks), new(self.chunks, self.dim), new(tokens, self.dim))
        reading = _Reading(
            A=self.new_states(segments),
            C=new(cdiv(self.dim, self.back.channels), tokens, len(self.A)),
            D=None if self.D is None else new(segments, self.dim),
            z=None if self.z is None else dy.new_empty(dy.shape, dtype=self.z.dtype),
        )
        grid, sizes = self.launch(self.back, segments)
        launch(
            states_kernel, grid, self.x, self.dt, self.A, self.BC, self.D, self.z, self.bias, dy, entering, leaving,
            *read, *reading, self.segments, tokens, 1, **sizes, CHUNK=self.chunk, EXACT=self.exact,
        )  # fmt: skip
        return reading, read

    def write_gradients(self, dy: Tensor, leaving: Tensor, read: _Read) -> _Writing:
        """Gradients of x, dt, the state, B, the bias, and the rest of that of A; the last three still to be summed."""
        tokens, segments = self.batch * self.length, len(self.segments)
        new = self.A.new_empty
        writing = _Writing(
            x=torch.empty_like(dy),
            dt=dy.new_empty(dy.shape, dtype=self.dt.dtype),
            A=None if self.exact else self.new_states(segments),
            B=new(cdiv(self.dim, self.back.channels), tokens, len(self.A)),
            bias=None if self.bias is None else new(segments, self.dim),
            state=self.new_states(len(self.sequences)),
        )
        grid, sizes = self.launch(self.back, segments)
        launch(
            writes_kernel, grid, self.x, self.dt, self.A, self.BC, self.D, self.z, self.bias, dy, leaving, *read,
            *writing, self.segments, tokens, 1, **sizes, CHUNK=self.chunk,
        )  # fmt: skip
        return writing
