"""SSD on a GPU: chunks of 64 entries, the state of a head in registers while its program walks along time.

The formulas are those of `everstate.ops.ssd.chunked`. What is different here:

- Few long sequences are cut into segments, as `everstate.ops.triton_segments` says.
- `C B^T` is made again for every head of a group: loaded, it would have to be rounded first.
- Backward keeps no activations but the inputs. Two sweeps write the state that enters each chunk and the gradient of
  the state that leaves it; then every chunk is independent, and programs loop over heads: so B and C are loaded once,
  and their gradients are sums in registers.
- Chunks that are whole are moved by the copy engine of the GPU (`Call.full`); its instructions take no registers for
  addresses and masks.
- On a Hopper GPU heads of 64 channels, with states of 64 or 128 numbers per channel, go to the kernels of
  `everstate.ops.ssd.triton_hopper` (`Call.hopper`), whatever the length.

Everything is summed in a fixed order: the same call gives the same bits.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.packing import Packing
from everstate.ops.glu import gate_heads
from everstate.ops.triton_common import LOG2E, dot, sum_of
from everstate.ops.triton_launch import Tiles, cdiv, form, launch, power_of_2
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_segments import (
    CHUNK,
    Plan,
    can_copy,
    fill,
    hopper_kernels,
    joined,
    load_rows,
    load_state,
    only,
    pass_kernel,
    pieces_for,
    plan,
    rows_of,
    settings_for,
    splits_of,
    store_rows,
    store_state,
)
from everstate.ops.triton_sums import total, total_of_heads


def ssd_scan(
    x: Float[Tensor, "b l h p"],
    a: Float[Tensor, "b l h"],
    s: Float[Tensor, "b l h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    state: Float[Tensor, "seqs h p n"],
    *,
    diagonal: Float[Tensor, "b l h r"] | None = None,
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b l h p"] | None = None,
    packing: Packing | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "seqs h p n"]]:
    """See `everstate.ops.ssd_scan`. `chunk_size` is the business of other implementations."""
    rank = 1 if diagonal is None else diagonal.shape[-1]
    if rank > 1:
        # The whole decay of a group happens at its first entry: a plain cumulative sum is then that of the groups.
        total = a.unflatten(1, (-1, rank)).sum(2, keepdim=True)
        a = torch.cat([total, torch.zeros_like(total).expand(-1, -1, rank - 1, -1)], 2).flatten(1, 2)
    ends = [] if packing is None else list(packing.cu_seqlens)
    y, state = _scan(x, a, s, B, C, state.to(torch.float32), diagonal, D, ends)
    return gate_heads(y, z), state


@kernel_op("ssd_scan")
@replayed
def _scan(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor,
    diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = Call(x, B, C, diagonal, D, ends)
    call.weigh(a, s)
    return call.scan(state)


@_scan.register_fake
def _(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor,
    diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state)


@kernel_op("ssd_scan_backward")
@replayed
def _backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor,
    diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, a, s, B, C, state, and of diagonal and D where they are given."""
    call = Call(x, B, C, diagonal, D, ends)
    call.weigh(a, s)
    dx, da, ds, dB, dC, dstate, ddiagonal, dD = call.gradients(dy, dfinal, state)
    given = [t for t in (ddiagonal, dD) if t is not None]
    return [dx, da.to(a.dtype), ds.to(s.dtype), dB.to(B.dtype), dC.to(C.dtype), dstate, *given]


@_backward.register_fake
def _(
    dy: Tensor, dfinal: Tensor, x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor,
    diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    given = [t for t in (x, a, s, B, C, state, diagonal) if t is not None]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given]
    return grads if D is None else [*grads, torch.empty_like(D, dtype=torch.float32)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.ends = inputs[8]


def _differentiate(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    *_, diagonal, D = saved = ctx.saved_tensors
    grads = _backward(dy, dfinal, *saved, ctx.ends)
    rest = iter(grads[6:])
    ddiagonal = None if diagonal is None else next(rest)
    return (*grads[:6], ddiagonal, None if D is None else next(rest).to(D.dtype), None)


_scan.register_autograd(_differentiate, setup_context=_save)


BLOCK_H = 16
"""Heads whose decays one program sums."""

HEADS_EACH = 16
"""Heads whose inputs get their gradients from one program, which loads B and C once and each head early."""

TILE_P = 64
"""Rows of the state that one program of a sweep holds."""


class Gradients(NamedTuple):
    """Of the arguments of the scan; those of a and s in float32."""

    x: Tensor
    a: Tensor
    s: Tensor
    B: Tensor
    C: Tensor
    state: Tensor
    diagonal: Tensor | None
    D: Tensor | None


class _Layout(NamedTuple):
    """What sizes alone decide.

    chunks, segments, sequences: how many there are. block_p: headdim, filled up to a power of two. walkers: programs
    that walk along segments, of so many `warps`. full: whether all chunks are whole. sizes: constants of the kernels,
    `few` those of the kernels for Hopper GPUs.
    """

    plan: Plan
    chunks: int
    segments: int
    sequences: int
    block_p: int
    walkers: int
    warps: int
    full: bool
    sizes: dict[str, Any]
    few: dict[str, int]


# Cached: a model asks for it in each layer, and for the whole of a small layer a GPU needs no longer than for this.
@lru_cache(maxsize=64)
def _layout(
    batch: int, length: int, heads: int, headdim: int, groups: int, d_state: int, rank: int, ends: tuple[int, ...],
    dtype: torch.dtype, device: torch.device, copied: bool, hopper: bool, available: int,
) -> _Layout:  # fmt: skip
    """`available` multiprocessors are those of the device, which `pieces_for` and `fill` ask for."""
    chunk = CHUNK // max(rank, 1) * max(rank, 1)
    # ptxas 12.8 may lose tiles where a product of float32 has a side of 16 (docs/learn/kernels.md, traps).
    smallest = 32 if dtype == torch.float32 else 16
    block_p, block_n = (max(power_of_2(size), smallest) for size in (headdim, d_state))
    bounds = ends or tuple(range(0, (batch + 1) * length, length))
    tiles, walkers = cdiv(headdim, TILE_P), (len(bounds) - 1) * heads
    whole = block_p == headdim and block_n == d_state and all(end % CHUNK == 0 for end in bounds)
    full = whole and chunk == CHUNK and copied
    made = plan(bounds, chunk, fill(walkers // 2, device) if hopper else pieces_for(walkers * tiles, device), device)
    chunks, segments, sequences = (len(table) for table in made)
    few = {"HEADS": heads, "GROUPS": groups, "P": headdim, "N": d_state, "BLOCK": CHUNK}
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    sizes = {**few, "RANK": rank, "BLOCK_N": block_n, "PRECISION": precision, "FULL": full}
    # A state of 64 x 128 in float32 takes half of the registers of four warps.
    warps = 4 if min(block_p, TILE_P) * block_n <= 64 * 128 else 8
    walking = segments * heads * tiles
    return _Layout(made, chunks, segments, sequences, block_p, walking, warps, full, sizes, few)


class Call:
    """The arguments as the kernels want them, and their launches.

    `decays` and `scales` are what `weigh` makes of a and s: sums of decays within chunks, in powers of two, and scales,
    laid out by chunk and head.
    """

    def __init__(
        self, x: Tensor, B: Tensor, C: Tensor, diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int]
    ) -> None:
        self.shape = x.shape[:2]
        self.heads, self.headdim = x.shape[2:]
        self.groups, d_state = B.shape[2:]
        rank = 0 if diagonal is None else diagonal.shape[-1]
        self.x, self.B, self.C = rows_of(x), rows_of(B), rows_of(C)
        self.diagonal, self.D = (None if t is None else t.contiguous() for t in (diagonal, D))
        copied = can_copy(self.x) and can_copy(self.B) and can_copy(self.C)
        whole = all(end % CHUNK == 0 for end in ends)
        self.hopper = _hopper(self, d_state, rank) if copied and whole else None
        self.layout = _layout(
            *self.shape, self.heads, self.headdim, self.groups, d_state, rank, tuple(ends), x.dtype, x.device,
            copied, self.hopper is not None, processors(x.device),
        )  # fmt: skip
        self.plan, self.full, self.sizes = self.layout.plan, self.layout.full, self.layout.sizes
        self.strides = [n for t in (self.x, self.B, self.C) for n in t.stride()[1:3]]
        self.decays = torch.empty((self.layout.chunks, self.heads, CHUNK), dtype=torch.float32, device=x.device)
        self.scales = torch.empty_like(self.decays)

    def rows(self, t: Tensor, width: int | None = None) -> Tensor | Tiles:
        """Rows for a kernel: what the copy engine wants to know of them where chunks are `full`."""
        if not self.full:
            return t
        flat = t[0].flatten(1)
        return Tiles(flat, flat.shape, flat.stride(), form(CHUNK, width or t.shape[3]))

    def states(self, t: Float[Tensor, "chunks h p n"]) -> Tensor | Tiles:
        """States of all heads for a kernel, likewise."""
        if not self.full:
            return t
        flat = t.flatten(0, 2)
        return Tiles(flat, flat.shape, flat.stride(), form(*t.shape[2:]))

    @property
    def skip(self) -> int:
        """0 without D, 1 for one number per head, 2 for one per channel."""
        return 0 if self.D is None else self.D.ndim

    def weigh(self, a: Float[Tensor, "b l h"], s: Float[Tensor, "b l h"]) -> None:
        """Make `decays` and `scales`."""
        a, s = a.flatten(0, 1), s.flatten(0, 1)
        launch(
            _decay_kernel, (self.layout.chunks, cdiv(self.heads, BLOCK_H)),
            a, s, self.decays, self.scales, self.plan.chunks, *a.stride(), *s.stride(),
            HEADS=self.heads, BLOCK=CHUNK, BLOCK_H=BLOCK_H,
        )  # fmt: skip

    def scan(self, state: Float[Tensor, "seqs h p n"]) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "seqs h p n"]]:
        """Outputs and final states."""
        y = torch.empty((*self.shape, self.heads, self.headdim), dtype=self.x.dtype, device=self.x.device)
        final = torch.empty_like(state)
        entering, tile = self.entering(self.x, self.B, state, reverse=False), min(self.layout.block_p, TILE_P)
        if self.hopper is not None:
            self.hopper.scan(self, entering, y, final)
            return y, final
        launch(
            _scan_kernel, (self.layout.walkers,),
            self.rows(self.x, tile), self.decays, self.scales, self.rows(self.B), self.rows(self.C),
            self.diagonal, self.D, entering, self.rows(rows_of(y), tile), final,
            self.plan.chunks, self.plan.segments, *self.strides, **self.sizes,
            SKIP=self.skip, BLOCK_P=tile, num_warps=self.layout.warps, **settings_for(self.x, 2),
        )  # fmt: skip
        return y, final

    def gradients(self, dy: Tensor, dfinal: Tensor, state: Tensor, into: Sequence[Tensor] | None = None) -> Gradients:
        """Of all arguments; those of x, B and C are written `into` these, if given: parts of rows that are wider."""
        dy = rows_of(dy) if can_copy(rows_of(dy)) else rows_of(dy.contiguous())
        entering, _ = self.boundaries(self.x, self.B, state, reverse=False)
        leaving, dstate = self.boundaries(dy, self.C, dfinal.contiguous(), reverse=True)
        direct = into is not None and self.hopper is not None
        dx = into[0] if into is not None and direct else self.x.new_empty(*self.shape, self.heads, self.headdim)
        dD = None if self.D is None else self.decays.new_empty(self.layout.chunks, self.heads, self.headdim)
        if self.hopper is not None:
            da, ds, dB, dC = self._all_gradients(self.hopper, dy, entering, leaving, dx, dD, into)
            ddiagonal = None
        else:
            da, ds, ddiagonal = self._input_gradients(dy, entering, leaving, dx, dD)
            dB, dC = self._key_gradients(dy, entering, leaving)
        if into is not None:
            self._place(into, (dx, dB, dC))
        if self.D is not None and dD is not None:
            dD = total(dD, torch.float32) if self.D.ndim == 2 else total_of_heads(dD, torch.float32)
        return Gradients(dx, da, ds, dB, dC, dstate, ddiagonal, dD)

    def _head_splits(self, most: int, wanted: int) -> int:
        """Programs among which the heads of a group are divided: each gets at most `most`; `wanted` fill the GPU."""
        return splits_of(self.heads // self.groups, self.layout.chunks * self.groups, wanted, most)

    def entering(self, x: Tensor, keys: Tensor, state: Tensor, *, reverse: bool) -> Float[Tensor, "segments h p n"]:
        """The state that enters each segment; reversed in time, the gradient of the state that leaves it."""
        segments, sequences = self.layout.segments, self.layout.sequences
        if segments == sequences:
            return state.contiguous()
        shape, device = state.shape[1:], state.device
        ends, kept = (torch.empty((segments, *s), dtype=state.dtype, device=device) for s in (shape, shape[:1]))
        self._sweep(x, keys, ends, kept=kept, reverse=reverse)
        size = self.headdim * state.shape[3]
        launch(
            pass_kernel, (sequences * self.heads, cdiv(size, 1024)),
            ends, kept, state.contiguous(), self.plan.sequences, HEADS=self.heads, SIZE=size, REVERSE=reverse,
            BLOCK=1024,
        )  # fmt: skip
        return ends

    def boundaries(self, x: Tensor, keys: Tensor, state: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """The state that enters each chunk (reversed: the gradient of that which leaves it), and the one at the end."""
        entering = self.entering(x, keys, state, reverse=reverse)
        chunks = x.new_empty(self.layout.chunks, *state.shape[1:])
        last = torch.empty_like(state, memory_format=torch.contiguous_format)
        self._sweep(x, keys, last, entering=entering, chunks=chunks, reverse=reverse)
        return chunks, last

    def _sweep(
        self, x: Tensor, keys: Tensor, ends: Tensor, *, entering: Tensor | None = None, chunks: Tensor | None = None,
        kept: Tensor | None = None, reverse: bool,
    ) -> None:  # fmt: skip
        if self.hopper is not None:
            return self.hopper.sweep(self, x, keys, ends, entering, chunks, kept, reverse)
        tile = min(self.layout.block_p, TILE_P)
        launch(
            _sweep_kernel, (self.layout.walkers,),
            self.rows(x, tile), self.decays, self.scales, self.rows(keys), entering, chunks, ends, kept,
            self.plan.chunks, self.plan.segments, *x.stride()[1:3], *keys.stride()[1:3],
            **only(self.sizes, _sweep_kernel), BLOCK_P=tile, REVERSE=reverse, num_warps=self.layout.warps,
            **settings_for(self.x, 2 if reverse else 3),
        )  # fmt: skip

    def _place(self, into: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """Copy the gradients that are not yet where they belong."""
        for given, gradient in zip(into, found, strict=True):
            if gradient.data_ptr() != given.data_ptr():
                given.copy_(gradient)

    def _input_gradients(
        self, dy: Tensor, entering: Tensor, leaving: Tensor, dx: Tensor, dD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of a, s and the diagonal; those of x and D (still to be summed over chunks) are written."""
        splits = self._head_splits(HEADS_EACH, 2 * processors(self.x.device))
        ddecays, dscales = torch.empty_like(self.decays), torch.empty_like(self.scales)
        ddiagonal = None if self.diagonal is None else torch.empty_like(self.diagonal)
        launch(
            _inputs_kernel, (self.layout.chunks * self.groups * splits,),
            self.rows(self.x), self.rows(dy), self.decays, self.scales, self.rows(self.B), self.rows(self.C),
            self.diagonal, self.D, self.states(entering), self.states(leaving), self.rows(rows_of(dx)),
            ddecays, dscales, ddiagonal, dD, self.plan.chunks, *self.strides, *dy.stride()[1:3], **self.sizes,
            SKIP=self.skip, BLOCK_P=self.layout.block_p, SPLITS=splits,
            num_warps=4 if self.layout.block_p <= 64 else 8, **settings_for(self.x, 2 if self.full else 1),
        )  # fmt: skip
        da, ds = (self.decays.new_empty(*self.shape, self.heads) for _ in "as")
        launch(
            _decay_gradients_kernel, (self.layout.chunks, cdiv(self.heads, BLOCK_H)),
            ddecays, dscales, da, ds, self.plan.chunks, HEADS=self.heads, BLOCK=CHUNK, BLOCK_H=BLOCK_H,
        )  # fmt: skip
        return da, ds, ddiagonal

    def _empty_key_gradients(self, splits: int) -> tuple[Tensor, Tensor]:
        """Room for the gradients of B and C: those of parts of the heads are summed in float32."""
        shape = (splits, *self.shape, *self.B.shape[2:])
        dB, dC = (t.new_empty(shape, dtype=torch.float32 if splits > 1 else t.dtype) for t in (self.B, self.C))
        return dB, dC

    def _key_gradients(self, dy: Tensor, entering: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of B and C."""
        splits = self._head_splits(self.heads, 2 * processors(self.x.device))
        # Accumulators of 64 x 128 leave room for the next two heads, larger ones for one.
        settings = settings_for(self.x, 3 if self.layout.warps == 4 and self.layout.block_p <= TILE_P else 2)
        dB, dC = self._empty_key_gradients(splits)
        launch(
            _keys_kernel, (self.layout.chunks * self.groups * splits,),
            self.x, dy, self.decays, self.scales, self.B, self.C, entering, leaving, dB, dC, self.plan.chunks,
            *self.strides, *dy.stride()[1:3], self.shape[0] * self.shape[1], **only(self.sizes, _keys_kernel),
            BLOCK_P=self.layout.block_p, SPLITS=splits, num_warps=8, **settings,
        )  # fmt: skip
        return joined(dB), joined(dC)

    def _all_gradients(
        self, hopper: ModuleType, dy: Tensor, entering: Tensor, leaving: Tensor, dx: Tensor, dD: Tensor | None,
        into: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of a, s, B and C; those of x and D (still to be summed over chunks) are written."""
        parts = self.decays.new_empty(5, *self.decays.shape)
        splits = self._head_splits(self.heads, processors(self.x.device))
        if into is not None and splits == 1:
            dB, dC = (t.unsqueeze(0) for t in into[1:])
        else:
            dB, dC = self._empty_key_gradients(splits)
        hopper.gradients(self, dy, entering, leaving, dx, parts, dD, dB, dC)
        da, ds = (self.decays.new_empty(*self.shape, self.heads) for _ in "as")
        launch(
            _join_kernel, (self.layout.chunks, cdiv(self.heads, BLOCK_H)),
            *parts.unbind(0), self.scales, da, ds, self.plan.chunks, HEADS=self.heads, BLOCK=CHUNK, BLOCK_H=BLOCK_H,
        )  # fmt: skip
        return da, ds, joined(dB), joined(dC)


def _hopper(call: "Call", d_state: int, rank: int) -> ModuleType | None:
    """The kernels that are written for Hopper GPUs, where they serve."""
    sizes = call.headdim == 64 and d_state in (64, 128) and rank == 0 and call.heads // call.groups % 2 == 0
    alike = call.x.dtype == call.B.dtype == call.C.dtype
    if not (sizes and alike) or call.x.shape[1] * call.heads >= 2**31:
        return None
    return hopper_kernels("everstate.ops.ssd.triton_hopper", call.x)


@triton.jit
def _load_tile(
    source, start, at, inside, offset, columns, first, stride, WIDTH: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Rows `start + at` of the matrix that begins at column `offset`, from its column `first` on: `columns`."""
    if FULL:
        tile = source.load([start, offset + first])
    else:
        tile = load_rows(source + offset, start, at, inside, columns, stride, WIDTH)
    return tile


@triton.jit
def _store_tile(
    target, start, at, inside, offset, columns, first, stride, value, WIDTH: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    if FULL:
        target.store([start, offset + first], value.to(target.dtype))
    else:
        store_rows(target + offset, start, at, inside, columns, stride, value, WIDTH)


@triton.jit
def _place(p, n, P: tl.constexpr, N: tl.constexpr):
    """Offsets of a transposed state (n, p) in memory that holds it as (p, n), and which of them exist."""
    return p[None, :] * N + n[:, None], (n < N)[:, None] & (p < P)[None, :]


@triton.jit
def _receives(later, earlier, RANK: tl.constexpr):
    """Whether entry `later` receives from `earlier` through the recurrence."""
    if RANK > 0:
        return later // RANK > earlier // RANK
    return later >= earlier


@triton.jit
def _own(diagonal, start, later, earlier, head, end, HEADS: tl.constexpr, RANK: tl.constexpr):
    """The given diagonal, as blocks of the matrix of all entries of the chunk."""
    mine = (later // RANK == earlier // RANK) & (start + later < end)
    at = diagonal + (start.to(tl.int64) * HEADS + head) * RANK + (later * HEADS * RANK + earlier % RANK)
    return tl.load(at, mask=mine, other=0.0).to(tl.float32)


@triton.jit
def _load_skip(D, head, columns, P: tl.constexpr, SKIP: tl.constexpr):
    """D of a head: none (SKIP 0), one number for all columns (SKIP 1), or one for each (SKIP 2)."""
    if SKIP == 2:
        skip = tl.load(D + head * P + columns, mask=columns < P, other=0.0).to(tl.float32)
    elif SKIP == 1:
        skip = tl.load(D + head + columns * 0).to(tl.float32)
    else:
        skip = tl.zeros(columns.shape, tl.float32)
    return skip


@triton.jit
def _decay_kernel(
    a, s, decays, scales, chunks, a_token, a_head, s_token, s_head,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per chunk and some heads: sums of `a` since the start of the chunk, as powers of two, and `s`.

    Both are laid out as (chunk, head, entry).

    Entries that a short chunk does not have keep the last sum and a scale of zero, so nobody has to ask for them.
    """
    chunk, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    tokens = tl.load(chunks + 2 * chunk) + at
    exists = (tokens < tl.load(chunks + 2 * chunk + 1))[:, None] & (heads < HEADS)[None, :]
    rows = tokens.to(tl.int64)[:, None]
    decay = tl.load(a + rows * a_token + (heads * a_head)[None, :], mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(s + rows * s_token + (heads * s_head)[None, :], mask=exists, other=0.0).to(tl.float32)
    out = chunk * HEADS * BLOCK + heads[None, :] * BLOCK + at[:, None]
    tl.store(decays + out, tl.cumsum(decay, 0) * LOG2E, mask=(heads < HEADS)[None, :])
    tl.store(scales + out, scale, mask=(heads < HEADS)[None, :])


@triton.jit
def _decay_gradients_kernel(
    ddecays, dscales, da, ds, chunks, HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The reverse of `_decay_kernel`."""
    chunk, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    tokens = tl.load(chunks + 2 * chunk) + at
    exists = (tokens < tl.load(chunks + 2 * chunk + 1))[:, None] & (heads < HEADS)[None, :]
    place = chunk * HEADS * BLOCK + heads[None, :] * BLOCK + at[:, None]
    out = tokens.to(tl.int64)[:, None] * HEADS + heads[None, :]
    ddecay = tl.load(ddecays + place, mask=(heads < HEADS)[None, :], other=0.0)
    tl.store(da + out, tl.cumsum(ddecay, 0, reverse=True), mask=exists)
    tl.store(ds + out, tl.load(dscales + place, mask=(heads < HEADS)[None, :], other=0.0), mask=exists)


@triton.jit
def _join_kernel(
    through, answered, own, given, gained, scales, da, ds, chunks,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """As `_decay_gradients_kernel`, of parts that several groups of warps found.

    What an entry gave is `scales` times what went `through` the state and was `given` inside the chunk; it received
    what it `answered` from the state and `gained` inside the chunk. `own` sums to what the entering state gave.
    """
    chunk, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    tokens = tl.load(chunks + 2 * chunk) + at
    exists = (tokens < tl.load(chunks + 2 * chunk + 1))[:, None] & (heads < HEADS)[None, :]
    place = chunk * HEADS * BLOCK + heads[None, :] * BLOCK + at[:, None]
    mine = (heads < HEADS)[None, :]
    out = tokens.to(tl.int64)[:, None] * HEADS + heads[None, :]
    scale, passed = tl.load(scales + place, mask=mine, other=0.0), tl.load(through + place, mask=mine, other=0.0)
    dscale = passed + tl.load(given + place, mask=mine, other=0.0)
    received = tl.load(answered + place, mask=mine, other=0.0) + tl.load(gained + place, mask=mine, other=0.0)
    left = tl.sum(scale * passed + tl.load(own + place, mask=mine, other=0.0), 0)
    tl.store(da + out, tl.cumsum(received - scale * dscale, 0, reverse=True) + left[None, :], mask=exists)
    tl.store(ds + out, dscale, mask=exists)


@triton.jit
def _load_decays(decays, scales, chunk, head, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of decays, the last of them, and scales."""
    at = (chunk.to(tl.int64) * HEADS + head) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(decays + (chunk.to(tl.int64) * HEADS + head) * BLOCK + (BLOCK - 1))
    return tl.load(decays + at), last, tl.load(scales + at)


@triton.jit
def _scan_kernel(
    x, decays, scales, B, C, diagonal, D, entering, y, final, chunks, segments,
    x_token, x_head, B_token, B_group, C_token, C_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per segment, head and tile of p: walk along the segment with the state in registers."""
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    EACH: tl.constexpr = BLOCK if RANK == 0 else BLOCK // RANK * RANK
    head, tile = tl.program_id(0) // TILES % HEADS, tl.program_id(0) % TILES
    segment = (tl.program_id(0) // TILES // HEADS).to(tl.int64)
    group, p0 = head // (HEADS // GROUPS), tile * BLOCK_P
    first, count = tl.load(segments + 5 * segment), tl.load(segments + 5 * segment + 1)
    start, end = tl.load(chunks + 2 * first), tl.load(chunks + 2 * (first + count) - 1)
    # A zero that the compiler does not know: ptxas 12.8 may set a constant behind the product that reads it.
    nought = tl.where(start < 0, 1.0, 0.0)
    at, p, n = tl.arange(0, BLOCK), p0 + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    place, exists = _place(p, n, P, N)
    h = tl.load(entering + (segment * HEADS + head) * P * N + place, mask=exists, other=0.0)
    skip = _load_skip(D, head, p, P, SKIP)
    for step in range(count):
        inside = (at < EACH) & (start + at < end)
        cs, last, scale = _load_decays(decays, scales, first + step, head, HEADS, BLOCK)
        u = _load_tile(x, start, at, inside, head * x_head, p, p0, x_token, P, FULL)
        k = _load_tile(B, start, at, inside, group * B_group, n, 0, B_token, N, FULL).to(u.dtype)
        q = _load_tile(C, start, at, inside, group * C_group, n, 0, C_token, N, FULL).to(u.dtype)
        weights = dot(q, tl.trans(k), None, PRECISION) * tl.exp2(cs[:, None] - cs[None, :]) * scale[None, :]
        weights = tl.where(_receives(at[:, None], at[None, :], RANK), weights, nought)
        if RANK > 1:
            weights += _own(diagonal, start, at[:, None], at[None, :], head, end, HEADS, RANK)
        out = dot(q, h.to(u.dtype), None, PRECISION) * tl.exp2(cs)[:, None]
        out = dot(weights.to(u.dtype), u, out, PRECISION)
        if SKIP > 0 or RANK == 1:
            out += _own_inputs(u, diagonal, skip, start, at, inside, head, HEADS, RANK, SKIP)
        _store_tile(y, start, at, inside, head * P, p, p0, HEADS * P, out, P, FULL)
        added = (u * (scale * tl.exp2(last - cs))[:, None]).to(u.dtype)
        h = dot(tl.trans(k), added, h * tl.exp2(last), PRECISION)
        start += EACH
    if tl.load(segments + 5 * segment + 4) == 1:
        sequence = tl.load(segments + 5 * segment + 2).to(tl.int64)
        tl.store(final + (sequence * HEADS + head) * P * N + place, h, mask=exists)


@triton.jit
def _own_inputs(
    u, diagonal, skip, start, at, inside, head, HEADS: tl.constexpr, RANK: tl.constexpr, SKIP: tl.constexpr
):
    """What an entry receives from itself: through D, and through a given diagonal where a group is one entry."""
    factor = tl.zeros(u.shape, tl.float32)
    if SKIP > 0:
        factor += skip[None, :]
    if RANK == 1:
        own = diagonal + start.to(tl.int64) * HEADS + head
        factor += tl.load(own + at * HEADS, mask=inside, other=0.0).to(tl.float32)[:, None]
    return factor * u.to(tl.float32)


@triton.jit
def _sweep_kernel(
    x, decays, scales, B, entering, boundaries, ends, kept, chunks, segments, x_token, x_head, B_token, B_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, BLOCK_P: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Only the state, forwards; or only its gradient, backwards, with dy for x and C for B.

    Without `boundaries` it starts from zero and leaves in `ends` what each segment adds, in `kept` the log of how much
    of an older state it keeps. With it, the state before each chunk goes there, and that after the last segment to
    `ends`.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    EACH: tl.constexpr = BLOCK if RANK == 0 else BLOCK // RANK * RANK
    head, tile = tl.program_id(0) // TILES % HEADS, tl.program_id(0) % TILES
    segment = (tl.program_id(0) // TILES // HEADS).to(tl.int64)
    group, p0 = head // (HEADS // GROUPS), tile * BLOCK_P
    first, count = tl.load(segments + 5 * segment), tl.load(segments + 5 * segment + 1)
    start, end = tl.load(chunks + 2 * first), tl.load(chunks + 2 * (first + count) - 1)
    at, p, n = tl.arange(0, BLOCK), p0 + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    h, decayed = tl.zeros((BLOCK_P, BLOCK_N), tl.float32), 0.0
    if entering is not None:
        h = load_state(entering + (segment * HEADS + head) * P * N, p, n, P, N)
    if REVERSE:
        start += (count - 1) * EACH
    for step in range(count):
        chunk = (first + (count - 1 - step if REVERSE else step)).to(tl.int64)
        if boundaries is not None:
            store_state(boundaries + (chunk * HEADS + head) * P * N, p, n, h, P, N)
        inside = (at < EACH) & (start + at < end)
        cs, last, scale = _load_decays(decays, scales, chunk, head, HEADS, BLOCK)
        weight = tl.exp2(cs) if REVERSE else scale * tl.exp2(last - cs)
        u = _load_tile(x, start, at, inside, head * x_head, p, p0, x_token, P, FULL)
        k = _load_tile(B, start, at, inside, group * B_group, n, 0, B_token, N, FULL).to(u.dtype)
        h = dot(tl.trans((u * weight[:, None]).to(u.dtype)), k, h * tl.exp2(last), PRECISION)
        decayed += last
        start += -EACH if REVERSE else EACH
    if boundaries is None:
        store_state(ends + (segment * HEADS + head) * P * N, p, n, h, P, N)
        tl.store(kept + segment * HEADS + head, decayed / LOG2E)
    elif tl.load(segments + 5 * segment + (3 if REVERSE else 4)) == 1:
        sequence = tl.load(segments + 5 * segment + 2).to(tl.int64)
        store_state(ends + (sequence * HEADS + head) * P * N, p, n, h, P, N)


@triton.jit
def _inputs_kernel(
    x, dy, decays, scales, B, C, diagonal, D, entering, leaving, dx, ddecays, dscales, ddiagonal, dD, chunks,
    x_token, x_head, B_token, B_group, C_token, C_group, dy_token, dy_head,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_P: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads: the gradients of x, s, a, D and the diagonal.

    Matrices over pairs are transposed, `[j, i]` for what i receives from j: the next product needs them so.
    """
    EACH: tl.constexpr = HEADS // GROUPS // SPLITS
    chunk, part = tl.program_id(0) // (GROUPS * SPLITS), tl.program_id(0) % (GROUPS * SPLITS)
    group, split = part // SPLITS, part % SPLITS
    at, p, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    inside = start + at < end
    k = _load_tile(B, start, at, inside, group * B_group, n, 0, B_token, N, FULL)
    q = _load_tile(C, start, at, inside, group * C_group, n, 0, C_token, N, FULL)
    gram = tl.where(_receives(at[None, :], at[:, None], RANK), dot(k, tl.trans(q), None, PRECISION), 0.0)
    for i in range(EACH):
        head = group * (HEADS // GROUPS) + split * EACH + i
        cs, last, scale = _load_decays(decays, scales, chunk, head, HEADS, BLOCK)
        u = _load_tile(x, start, at, inside, head * x_head, p, 0, x_token, P, FULL)
        du = _load_tile(dy, start, at, inside, head * dy_head, p, 0, dy_token, P, FULL)
        h = _load_head(entering, chunk, head, p, n, HEADS, P, N, FULL)
        dh = _load_head(leaving, chunk, head, p, n, HEADS, P, N, FULL)
        # The gradient of s x: first what went through the state, then what entries of the chunk received.
        dadded = dot(k.to(u.dtype), tl.trans(dh), None, PRECISION) * tl.exp2(last - cs)[:, None]
        dlast = sum_of((scale * tl.sum(dadded * u.to(tl.float32), 1))[:, None])
        dlast += tl.exp2(last) * sum_of(h.to(tl.float32) * dh.to(tl.float32))
        # How much a larger sum of decays would change: all that an entry received, less all that it gave.
        ddecay = tl.sum(dot(q.to(u.dtype), tl.trans(h), None, PRECISION) * du.to(tl.float32), 1) * tl.exp2(cs)
        weights = (gram * tl.exp2(tl.minimum(cs[None, :] - cs[:, None], 126.0))).to(u.dtype)
        dadded = dot(weights, du, dadded, PRECISION)
        dscale = tl.sum(dadded * u.to(tl.float32), 1)
        # Both sides with the same rounded weights: then two entries of the same decay cancel, as they must.
        received = dot(u, tl.trans(du), None, PRECISION)
        ddecay += tl.sum(received * weights.to(tl.float32) * scale[:, None], 0) - scale * dscale
        place = (chunk.to(tl.int64) * HEADS + head) * BLOCK + at
        tl.store(ddecays + place, ddecay + tl.where(at == BLOCK - 1, dlast, 0.0))
        tl.store(dscales + place, dscale)
        dinput = dadded * scale[:, None]
        dinput = _give_own(dinput, du, diagonal, D, start, at, inside, head, end, p, P, HEADS, RANK, SKIP, PRECISION)
        if RANK > 0:
            _store_own(ddiagonal + head * RANK, received, start, at, inside, HEADS * RANK, RANK)
        if SKIP > 0:
            products = tl.sum(du.to(tl.float32) * u.to(tl.float32), 0)
            tl.store(dD + (chunk.to(tl.int64) * HEADS + head) * P + p, products, mask=p < P)
        _store_tile(dx, start, at, inside, head * P, p, 0, HEADS * P, dinput, P, FULL)


@triton.jit
def _give_own(
    dinput, du, diagonal, D, start, at, inside, head, end, p,
    P: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of inputs what they gave to their own group: the reverse of `_own_inputs` and `_own`."""
    if SKIP > 0 or RANK == 1:
        skip = _load_skip(D, head, p, P, SKIP)
        dinput += _own_inputs(du, diagonal, skip, start, at, inside, head, HEADS, RANK, SKIP)
    if RANK > 1:
        own = _own(diagonal, start, at[None, :], at[:, None], head, end, HEADS, RANK)
        dinput = dot(own.to(du.dtype), du, dinput, PRECISION)
    return dinput


@triton.jit
def _load_head(
    states, chunk, head, p, n, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """The state of a head at the boundary of a chunk."""
    if FULL:
        h = states.load([(chunk * HEADS + head) * P, 0])
    else:
        h = load_state(states + (chunk.to(tl.int64) * HEADS + head) * P * N, p, n, P, N)
    return h


@triton.jit
def _keys_kernel(
    x, dy, decays, scales, B, C, entering, leaving, dB, dC, chunks,
    x_token, x_head, B_token, B_group, C_token, C_group, dy_token, dy_head, total,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads: the gradients of B and C, summed over the heads."""
    EACH: tl.constexpr = HEADS // GROUPS // SPLITS
    chunk, part = (tl.program_id(0) // (GROUPS * SPLITS)).to(tl.int64), tl.program_id(0) % (GROUPS * SPLITS)
    group, split = part // SPLITS, part % SPLITS
    dtype = x.dtype.element_ty
    at, p, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    start, end = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    inside = start + at < end
    dk, dq = tl.zeros((BLOCK, BLOCK_N), tl.float32), tl.zeros((BLOCK, BLOCK_N), tl.float32)
    dgram = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(EACH):
        head = group * (HEADS // GROUPS) + split * EACH + i
        u = load_rows(x + head * x_head, start, at, inside, p, x_token, P)
        du = load_rows(dy + head * dy_head, start, at, inside, p, dy_token, P)
        h = load_state(entering + (chunk * HEADS + head) * P * N, p, n, P, N)
        dh = load_state(leaving + (chunk * HEADS + head) * P * N, p, n, P, N)
        cs, last, scale = _load_decays(decays, scales, chunk, head, HEADS, BLOCK)
        received = dot(u, tl.trans(du), None, PRECISION) * scale[:, None]
        # Bounded, so that the powers of entries that receive nothing stay finite until they are masked, once.
        dgram += received * tl.exp2(tl.minimum(cs[None, :] - cs[:, None], 126.0))
        dq = dot((du * tl.exp2(cs)[:, None]).to(dtype), h, dq, PRECISION)
        dk = dot((u * (scale * tl.exp2(last - cs))[:, None]).to(dtype), dh, dk, PRECISION)
    k = load_rows(B + group * B_group, start, at, inside, n, B_token, N).to(dtype)
    q = load_rows(C + group * C_group, start, at, inside, n, C_token, N).to(dtype)
    dgram = tl.where(_receives(at[None, :], at[:, None], RANK), dgram, 0.0)
    dk = dot(dgram.to(dtype), q, dk, PRECISION)
    dq = dot(tl.trans(dgram.to(dtype)), k, dq, PRECISION)
    base = (split.to(tl.int64) * total * GROUPS + group) * N
    store_rows(dB + base, start, at, inside, n, GROUPS * N, dk, N)
    store_rows(dC + base, start, at, inside, n, GROUPS * N, dq, N)


@triton.jit
def _store_own(out, received, start, at, inside, stride, RANK: tl.constexpr):
    """The gradient of the given diagonal: what lies in the blocks of the groups."""
    for rank in tl.static_range(RANK):
        mine = at[:, None] == (at // RANK * RANK + rank)[None, :]
        products = tl.sum(tl.where(mine, received, 0.0), 0)
        tl.store(out + start.to(tl.int64) * stride + at * stride + rank, products, mask=inside)
