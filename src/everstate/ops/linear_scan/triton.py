"""The linear recurrence on a GPU: one thread per channel, which walks along time with its state in a register.

Nothing but memory bounds it: a and b are read once and h is written once, `TILE` tokens at a time so that enough loads
are under way. Where there are too few channels to fill the GPU, a sequence is cut into *segments*: a first sweep finds
the product of the decays of each and what it adds to a state of zeros, a small kernel passes states from segment to
segment, and then all segments run at once. Packed sequences are segments too. The backward pass is the same scan from
the last token to the first.

Complex numbers are pairs of real ones. A view that repeats has strides of 0 and is read where it lies.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Inexact, Int
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.packing import Packing
from everstate.ops.linear_scan import scan_dtypes
from everstate.ops.triton_common import INTERPRETED
from everstate.ops.triton_launch import cdiv, launch

BLOCK = 256 if INTERPRETED.value else 32
"""Channels of a program, which is one warp; the interpreter takes as long for many as for few."""

TILE = 16
"""Tokens that are loaded at once."""

LEAST = 64
"""Tokens of the shortest segment that is worth a program."""

PROGRAMS = 6
"""Programs per multiprocessor that keep its memory busy."""


def linear_scan(
    a: Inexact[Tensor, "b l *rest"],
    b: Inexact[Tensor, "b l *rest"],
    state: Inexact[Tensor, "seqs ..."],
    *,
    packing: Packing | None = None,
) -> tuple[Inexact[Tensor, "b l *rest"], Inexact[Tensor, "seqs ..."]]:
    """See `everstate.ops.linear_scan`."""
    outer, inner = scan_dtypes(a, b)
    ends = [] if packing is None else list(packing.cu_seqlens)
    if not inner.is_complex:
        h, after = _scan(a, b, state.to(inner), ends, False, False)
        return h.to(outer), after
    decay = _pairs(a) if a.is_complex() else a
    h, after = _scan(decay, _pairs(b.to(inner)), _pairs(state.to(inner)), ends, a.is_complex(), True)
    return torch.view_as_complex(h).to(outer), torch.view_as_complex(after)


def _pairs(z: Tensor) -> Tensor:
    return torch.view_as_real(z.resolve_conj())


@kernel_op("linear_scan")
def _scan(
    a: Tensor, b: Tensor, state: Tensor, ends: Sequence[int], a_is_complex: bool, is_complex: bool
) -> tuple[Tensor, Tensor]:
    """h in float32 and the last of each sequence."""
    call = _Call(b, ends, is_complex)
    state = state.contiguous()
    h, final = b.new_empty(b.shape, dtype=torch.float32), torch.empty_like(state)
    decay, added = _Operand(a, a_is_complex), _Operand(b, is_complex)
    entering = call.entering(decay, added, state, reverse=False)
    launch(
        _scan_kernel, call.grid,
        *decay.arguments, *added.arguments, h, *h.stride()[:2], entering, final, call.segments, 1,
        CHANNELS=call.channels, PAIRS=a_is_complex, COMPLEX=is_complex, BLOCK=BLOCK, TILE=TILE, num_warps=1,
    )  # fmt: skip
    return h, final


@_scan.register_fake
def _(
    a: Tensor, b: Tensor, state: Tensor, ends: Sequence[int], a_is_complex: bool, is_complex: bool
) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape, dtype=torch.float32), torch.empty_like(state, memory_format=torch.contiguous_format)


@kernel_op("linear_scan_backward")
def _backward(
    dh: Tensor, dfinal: Tensor, a: Tensor, state: Tensor, h: Tensor, ends: Sequence[int],
    a_is_complex: bool, is_complex: bool, needs_a: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of b and the state in float32, and of a if it is needed."""
    call = _Call(h, ends, is_complex)
    state = state.contiguous()
    db, dstate = torch.empty_like(h), torch.empty_like(state)
    da = [a.new_empty(a.shape)] if needs_a else []
    decay, received = _Operand(a, a_is_complex), _Operand(dh, is_complex)
    leaving = call.entering(decay, received, dfinal.contiguous(), reverse=True)
    launch(
        _gradient_kernel, call.grid,
        *decay.arguments, *received.arguments, h, *h.stride()[:2],
        *((da[0], *da[0].stride()[:2]) if da else (None, 0, 0)), db, leaving, state, dstate, call.segments, 1,
        CHANNELS=call.channels, PAIRS=a_is_complex, COMPLEX=is_complex, BLOCK=BLOCK, TILE=TILE, num_warps=1,
    )  # fmt: skip
    return [db, dstate, *da]


@_backward.register_fake
def _(
    dh: Tensor, dfinal: Tensor, a: Tensor, state: Tensor, h: Tensor, ends: Sequence[int],
    a_is_complex: bool, is_complex: bool, needs_a: bool,
) -> list[Tensor]:  # fmt: skip
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, state)]
    return [*made, a.new_empty(a.shape)] if needs_a else made


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, state, *ctx.settings = inputs
    ctx.dtype = b.dtype
    ctx.save_for_backward(a, state, output[0])


def _differentiate(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    db, dstate, *da = _backward(dh, dfinal, *ctx.saved_tensors, *ctx.settings, ctx.needs_input_grad[0])
    return (da[0] if da else None, db.to(ctx.dtype), dstate, None, None, None)


_scan.register_autograd(_differentiate, setup_context=_save)


class _Segments(NamedTuple):
    """Where the programs find their tokens.

    segments: row, first token and end in the row, sequence, whether its first and last segment.
    sequences: first segment and number of segments.
    """

    segments: Int[Tensor, "segments 6"]
    sequences: Int[Tensor, "seqs 2"]


# Cached by value: every layer of a model asks for the same tables, which a captured graph could not copy to the GPU.
@lru_cache(maxsize=64)
def _cut(batch: int, ends: tuple[int, ...], pieces: int, device: torch.device) -> _Segments:
    """The tables for `batch` rows of sequences that end at `ends`, each cut into up to `pieces` segments."""
    segments: list[tuple[int, int, int, int, int, int]] = []
    sequences: list[tuple[int, int]] = []
    for row in range(batch):
        for start, end in pairwise(ends):
            each = cdiv(max(cdiv(end - start, pieces), LEAST), TILE) * TILE
            cuts = range(start, end, each)
            sequences.append((len(segments), len(cuts)))
            for at in cuts:
                until = min(at + each, end)
                segments.append((row, at, until, len(sequences) - 1, at == start, until == end))
    return _Segments(*(torch.tensor(t, dtype=torch.int32, device=device) for t in (segments, sequences)))


class _Operand:
    """A tensor `(b, l, *rest)` and its strides, with `rest` as at most two dimensions."""

    def __init__(self, t: Tensor, is_complex: bool) -> None:
        # The dimension of real and imaginary part is dense.
        if is_complex and t.stride(-1) != 1:
            t = t.contiguous()
        rest = _merged(t.shape[2 : t.ndim - is_complex], t.stride()[2:])
        if len(rest) > 2:
            t = t.contiguous()
            rest = _merged(t.shape[2 : t.ndim - is_complex], t.stride()[2:])
        (_, outer), (width, inner) = [(1, 0)] * (2 - len(rest)) + rest
        self.is_complex = is_complex
        self.arguments = (t, *t.stride()[:2], outer, inner, width)


def _merged(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes and strides, with neighbouring dimensions as one where they can be."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=False):
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size > 1:
            merged.append((size, stride))
    return merged


class _Call:
    """The launches that forward and backward share."""

    def __init__(self, like: Tensor, ends: Sequence[int], is_complex: bool) -> None:
        batch, self.length = like.shape[:2]
        self.is_complex = is_complex
        self.channels = like[0, 0].numel() // (1 + is_complex)
        self.blocks = cdiv(self.channels, BLOCK)
        bounds = tuple(ends) or (0, self.length)
        wanted = PROGRAMS * processors(like.device)
        pieces = max(wanted // (batch * (len(bounds) - 1) * self.blocks), 1)
        self.segments, self.sequences = _cut(batch, bounds, pieces, like.device)
        self.grid = (len(self.segments) * self.blocks,)

    def entering(self, decay: _Operand, added: _Operand, state: Tensor, *, reverse: bool) -> Tensor:
        """The state that enters each segment; reversed in time, the gradient of the state that leaves it."""
        count = len(self.segments)
        if count == len(self.sequences):
            return state
        ends = state.new_empty(count, *state.shape[1:])
        kept = state.new_empty(count, self.channels * (1 + decay.is_complex))
        sizes = {"CHANNELS": self.channels, "PAIRS": decay.is_complex, "COMPLEX": self.is_complex, "REVERSE": reverse}
        launch(
            _ends_kernel, self.grid,
            *decay.arguments, *added.arguments, ends, kept, self.segments, 1,
            **sizes, BLOCK=BLOCK, TILE=TILE, num_warps=1,
        )  # fmt: skip
        launch(
            _pass_kernel, (len(self.sequences) * cdiv(self.channels, 128),),
            ends, kept, state, self.sequences, **sizes, BLOCK=128,
        )  # fmt: skip
        return ends


@triton.jit
def _places(t, row, token, stride_row, stride_token, offsets, tokens):
    """Pointers `(channel, token)` to a tile."""
    base = t + row.to(tl.int64) * stride_row + token.to(tl.int64) * stride_token
    return (base + offsets)[:, None] + (tokens * stride_token)[None, :]


@triton.jit
def _parts(places, exists, other, PAIRS: tl.constexpr):
    """Real and imaginary parts in float32; `other` where there is nothing."""
    real = tl.load(places, mask=exists, other=other).to(tl.float32)
    imag = tl.zeros(real.shape, tl.float32)
    if PAIRS:
        imag = tl.load(places + 1, mask=exists, other=0.0).to(tl.float32)
    return real, imag


@triton.jit
def _store_parts(places, exists, real, imag, PAIRS: tl.constexpr):
    tl.store(places, real.to(places.dtype.element_ty), mask=exists)
    if PAIRS:
        tl.store(places + 1, imag.to(places.dtype.element_ty), mask=exists)


@triton.jit
def _times(x_real, x_imag, y_real, y_imag, PAIRS: tl.constexpr, COMPLEX: tl.constexpr):
    """`x y`, where x is real unless PAIRS, and both are unless COMPLEX."""
    real, imag = x_real * y_real, y_imag
    if COMPLEX:
        imag = x_real * y_imag
    if PAIRS:
        real -= x_imag * y_imag
        imag += x_imag * y_real
    return real, imag


@triton.jit
def _of_token(tile, at, token):
    """One token of a tile. A thread holds all of them, so a compiler only sees zeros added to the bits of a number."""
    return tl.sum(tl.where((at == token)[None, :], tile.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)


@triton.jit
def _parts_of(real, imag, at, token, PAIRS: tl.constexpr):
    """Both parts of one token."""
    one = _of_token(real, at, token)
    return one, _of_token(imag, at, token) if PAIRS else tl.zeros(one.shape, tl.float32)


@triton.jit
def _where(tokens, value, tile):
    """A tile with `value` at some tokens."""
    return tl.where(tokens[None, :], value[:, None], tile)


@triton.jit
def _offsets(channels, outer, inner, width):
    """Where channels lie: far from each other where time is the last dimension in memory."""
    return (channels // width).to(tl.int64) * outer + (channels % width).to(tl.int64) * inner


@triton.jit
def _mine(segments, unit, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its segment, that one's row, first token, end and sequence, and its channels.

    `unit` is 1. Where Triton knows that channels lie side by side, it gives several to one thread, to load 16 bytes at
    once, and spreads the tokens of a channel over threads.
    """
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    segment = (tl.program_id(0) // BLOCKS).to(tl.int64)
    own = segments + 6 * segment
    channels = (tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)) * unit
    return segment, tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3).to(tl.int64), channels


@triton.jit(do_not_specialize=["unit"])
def _scan_kernel(
    a, a_row, a_token, a_outer, a_inner, a_width, b, b_row, b_token, b_outer, b_inner, b_width, h, h_row, h_token,
    entering, final, segments, unit,
    CHANNELS: tl.constexpr, PAIRS: tl.constexpr, COMPLEX: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per segment and block of channels."""
    TWO: tl.constexpr = 2 if COMPLEX else 1
    segment, row, first, end, sequence, channels = _mine(segments, unit, CHANNELS, BLOCK)
    exists, at = channels < CHANNELS, tl.arange(0, TILE)
    a_at, b_at = _offsets(channels, a_outer, a_inner, a_width), _offsets(channels, b_outer, b_inner, b_width)
    real, imag = _parts(entering + (segment * CHANNELS + channels) * TWO, exists, 0.0, COMPLEX)
    for step in range(0, end - first, TILE):
        token = first + step
        there = exists[:, None] & (token + at < end)[None, :]
        a_real, a_imag = _parts(_places(a, row, token, a_row, a_token, a_at, at), there, 1.0, PAIRS)
        b_real, b_imag = _parts(_places(b, row, token, b_row, b_token, b_at, at), there, 0.0, COMPLEX)
        for t in tl.static_range(TILE):
            x_real, x_imag = _parts_of(a_real, a_imag, at, t, PAIRS)
            y_real, y_imag = _parts_of(b_real, b_imag, at, t, COMPLEX)
            real, imag = _times(x_real, x_imag, real, imag, PAIRS, COMPLEX)
            real += y_real
            imag += y_imag
            b_real = _where(at == t, real, b_real)
            if COMPLEX:
                b_imag = _where(at == t, imag, b_imag)
        _store_parts(_places(h, row, token, h_row, h_token, channels * TWO, at), there, b_real, b_imag, COMPLEX)
    if tl.load(segments + 6 * segment + 5) == 1:
        _store_parts(final + (sequence * CHANNELS + channels) * TWO, exists, real, imag, COMPLEX)


@triton.jit(do_not_specialize=["unit"])
def _ends_kernel(
    a, a_row, a_token, a_outer, a_inner, a_width, b, b_row, b_token, b_outer, b_inner, b_width,
    ends, kept, segments, unit,
    CHANNELS: tl.constexpr, PAIRS: tl.constexpr, COMPLEX: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What each segment adds to a state of zeros (reversed: to a gradient of zeros), and the product of its decays."""
    TWO: tl.constexpr = 2 if COMPLEX else 1
    segment, row, first, end, _, channels = _mine(segments, unit, CHANNELS, BLOCK)
    exists, at = channels < CHANNELS, tl.arange(0, TILE)
    a_at, b_at = _offsets(channels, a_outer, a_inner, a_width), _offsets(channels, b_outer, b_inner, b_width)
    real, imag = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    all_real, all_imag = real + 1.0, imag
    for step in range(0, end - first, TILE):
        token = end - TILE - step if REVERSE else first + step
        there = exists[:, None] & ((token + at >= first) & (token + at < end))[None, :]
        a_real, a_imag = _parts(_places(a, row, token, a_row, a_token, a_at, at), there, 1.0, PAIRS)
        b_real, b_imag = _parts(_places(b, row, token, b_row, b_token, b_at, at), there, 0.0, COMPLEX)
        for i in tl.static_range(TILE):
            t = TILE - 1 - i if REVERSE else i
            x_real, x_imag = _parts_of(a_real, a_imag, at, t, PAIRS)
            y_real, y_imag = _parts_of(b_real, b_imag, at, t, COMPLEX)
            all_real, all_imag = _times(x_real, x_imag, all_real, all_imag, PAIRS, PAIRS)
            if REVERSE:
                real += y_real
                imag += y_imag
                real, imag = _times(x_real, -x_imag, real, imag, PAIRS, COMPLEX)
            else:
                real, imag = _times(x_real, x_imag, real, imag, PAIRS, COMPLEX)
                real += y_real
                imag += y_imag
    _store_parts(ends + (segment * CHANNELS + channels) * TWO, exists, real, imag, COMPLEX)
    _store_parts(kept + (segment * CHANNELS + channels) * (2 if PAIRS else 1), exists, all_real, all_imag, PAIRS)


@triton.jit
def _pass_kernel(
    ends, kept, state, sequences,
    CHANNELS: tl.constexpr, PAIRS: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence and block of channels: from what segments add to what enters each, in place."""
    TWO: tl.constexpr = 2 if COMPLEX else 1
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    sequence = (tl.program_id(0) // BLOCKS).to(tl.int64)
    channels = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    first, count = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    exists = channels < CHANNELS
    real, imag = _parts(state + (sequence * CHANNELS + channels) * TWO, exists, 0.0, COMPLEX)
    for step in range(count):
        segment = (first + (count - 1 - step if REVERSE else step)).to(tl.int64)
        own = ends + (segment * CHANNELS + channels) * TWO
        all_real, all_imag = _parts(kept + (segment * CHANNELS + channels) * (2 if PAIRS else 1), exists, 0.0, PAIRS)
        own_real, own_imag = _parts(own, exists, 0.0, COMPLEX)
        _store_parts(own, exists, real, imag, COMPLEX)
        real, imag = _times(all_real, -all_imag if REVERSE else all_imag, real, imag, PAIRS, COMPLEX)
        real += own_real
        imag += own_imag


@triton.jit(do_not_specialize=["unit"])
def _gradient_kernel(
    a, a_row, a_token, a_outer, a_inner, a_width, dh, dh_row, dh_token, dh_outer, dh_inner, dh_width,
    h, h_row, h_token, da, da_row, da_token, db, leaving, state, dstate, segments, unit,
    CHANNELS: tl.constexpr, PAIRS: tl.constexpr, COMPLEX: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`db[t] = conj(a[t+1]) db[t+1] + dh[t]` from the last token to the first; `da[t] = db[t] conj(h[t-1])`."""
    TWO: tl.constexpr = 2 if COMPLEX else 1
    segment, row, first, end, sequence, channels = _mine(segments, unit, CHANNELS, BLOCK)
    exists, at = channels < CHANNELS, tl.arange(0, TILE)
    a_at, dh_at = _offsets(channels, a_outer, a_inner, a_width), _offsets(channels, dh_outer, dh_inner, dh_width)
    real, imag = _parts(leaving + (segment * CHANNELS + channels) * TWO, exists, 0.0, COMPLEX)
    starts = tl.load(segments + 6 * segment + 4) == 1
    for step in range(0, end - first, TILE):
        token = end - TILE - step
        there = exists[:, None] & (token + at >= first)[None, :]
        a_real, a_imag = _parts(_places(a, row, token, a_row, a_token, a_at, at), there, 1.0, PAIRS)
        g_real, g_imag = _parts(_places(dh, row, token, dh_row, dh_token, dh_at, at), there, 0.0, COMPLEX)
        for i in tl.static_range(TILE):
            t = TILE - 1 - i
            x_real, x_imag = _parts_of(a_real, a_imag, at, t, PAIRS)
            y_real, y_imag = _parts_of(g_real, g_imag, at, t, COMPLEX)
            real += y_real
            imag += y_imag
            g_real = _where(at == t, real, g_real)
            if COMPLEX:
                g_imag = _where(at == t, imag, g_imag)
            real, imag = _times(x_real, -x_imag, real, imag, PAIRS, COMPLEX)
        _store_parts(_places(db, row, token, h_row, h_token, channels * TWO, at), there, g_real, g_imag, COMPLEX)
        if da is not None:
            at_start = starts & (token + at == first)
            before = _places(h, row, token - 1, h_row, h_token, channels * TWO, at)
            h_real, h_imag = _parts(before, there & (at_start == 0)[None, :], 0.0, COMPLEX)
            s_real, s_imag = _parts(state + (sequence * CHANNELS + channels) * TWO, exists, 0.0, COMPLEX)
            h_real, h_imag = _where(at_start, s_real, h_real), _where(at_start, s_imag, h_imag)
            out = _places(da, row, token, da_row, da_token, channels * (2 if PAIRS else 1), at)
            da_real, da_imag = g_real * h_real + g_imag * h_imag, g_imag * h_real - g_real * h_imag
            _store_parts(out, there, da_real, da_imag, PAIRS)
    if starts:
        _store_parts(dstate + (sequence * CHANNELS + channels) * TWO, exists, real, imag, COMPLEX)
