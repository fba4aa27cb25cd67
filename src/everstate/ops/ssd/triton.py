"""SSD on a GPU: chunks of 64 entries, the state of a head in registers while its program walks along time.

The formulas are those of `everstate.ops.ssd.chunked`. What is different here:

- A sequence is cut into *segments* when there are too few (sequence, head) pairs to fill the GPU. A first sweep finds
  what each segment adds to a state of zeros, a small kernel passes states from segment to segment, and then all
  segments run at once. Packed sequences are segments too.
- `C B^T` of a chunk is the same for all heads of a group. A kernel of its own computes it once.
- Backward keeps no activations but the inputs. Two sweeps write the state that enters each chunk and the gradient of
  the state that leaves it; then every chunk is independent, and one program loops over the heads of a group, so that
  the gradients of B and C are sums in registers.

Everything is summed in a fixed order: the same call gives the same bits.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import processors
from everstate.core.packing import Packing
from everstate.ops.triton_common import LOG2E, dot

CHUNK = 64
"""Entries of a chunk: the side of the smallest matrix product that keeps the tensor cores busy."""


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
    return _scan(x, a, s, B, C, state.to(torch.float32), diagonal, D, ends)


@torch.library.custom_op("everstate::ssd_scan", mutates_args=())
def _scan(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor,
    diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _Call(x, a, s, B, C, diagonal, D, ends)
    y, final = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state)
    gram = call.gram() if call.heads > call.groups else None
    entering = call.entering(call.x, call.B, state, reverse=False)
    grid = (len(call.plan.segments) * call.heads * triton.cdiv(call.headdim, TILE_P),)
    _scan_kernel[grid](
        call.x, call.a, call.s, call.B, call.C, gram, call.diagonal, D, entering, y, final,
        call.plan.chunks, call.plan.segments, *call.strides, **call.sizes, **call.skip,
        BLOCK_P=min(call.block_p, TILE_P), SHARED=gram is not None, num_warps=_warps(call), num_stages=2,
    )  # fmt: skip
    return y, final


@_scan.register_fake
def _(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor,
    diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state)


@torch.library.custom_op("everstate::ssd_scan_backward", mutates_args=())
def _backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor,
    diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, a, s, B, C, state, and of diagonal and D where they are given."""
    call = _Call(x, a, s, B, C, diagonal, D, ends)
    dy = _rows_of(dy)
    entering, _ = call.boundaries(call.x, call.B, state, reverse=False)
    leaving, dstate = call.boundaries(dy, call.C, dfinal.contiguous(), reverse=True)
    fresh = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)
    dx, da, ds = fresh(x), fresh(a), fresh(s)
    splits = call.head_splits()
    parts = (splits, *B.shape) if splits > 1 else tuple(B.shape)
    dB, dC = (torch.empty(parts, dtype=torch.float32 if splits > 1 else B.dtype, device=B.device) for _ in "BC")
    ddiagonal = None if call.diagonal is None else fresh(call.diagonal)
    dD = None if D is None else x.new_empty(len(call.plan.chunks), call.heads, call.headdim, dtype=torch.float32)
    _gradients_kernel[(len(call.plan.chunks) * call.groups * splits,)](
        call.x, dy, call.a, call.s, call.B, call.C, call.diagonal, D, entering, leaving,
        dx, da, ds, dB, dC, ddiagonal, dD, call.plan.chunks, *call.strides, *dy.stride()[1:3], x.shape[0] * x.shape[1],
        **call.sizes, **call.skip, BLOCK_P=call.block_p, SPLITS=splits, num_warps=8, num_stages=1,
    )  # fmt: skip
    if splits > 1:
        dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    given = [] if ddiagonal is None else [ddiagonal]
    if D is not None and dD is not None:
        given.append(dD.sum(0) if D.ndim == 2 else dD.sum((0, 2)))
    return [dx, da, ds, dB, dC, dstate, *given]


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


class _Plan(NamedTuple):
    """Where the programs find their entries.

    chunks: first entry and end. segments: first chunk, number of chunks, sequence, whether its first and last segment.
    sequences: first segment and number of segments.
    """

    chunks: Int[Tensor, "chunks 2"]
    segments: Int[Tensor, "segments 5"]
    sequences: Int[Tensor, "seqs 2"]


# Cached by value: every layer of a model asks for the same tables, which a captured graph could not copy to the GPU.
@lru_cache(maxsize=64)
def _plan(ends: tuple[int, ...], chunk: int, pieces: int, device: torch.device) -> _Plan:
    """The tables for sequences that end at `ends`, each cut into up to `pieces` segments of whole chunks."""
    chunks: list[tuple[int, int]] = []
    segments: list[tuple[int, int, int, int, int]] = []
    sequences: list[tuple[int, int]] = []
    for sequence, (start, end) in enumerate(pairwise(ends)):
        mine = [(at, min(at + chunk, end)) for at in range(start, end, chunk)]
        each = triton.cdiv(len(mine), pieces)
        cuts = range(0, len(mine), each)
        sequences.append((len(segments), len(cuts)))
        for at in cuts:
            count = min(each, len(mine) - at)
            segments.append((len(chunks) + at, count, sequence, at == 0, at + count == len(mine)))
        chunks += mine
    return _Plan(*(torch.tensor(t, dtype=torch.int32, device=device) for t in (chunks, segments, sequences)))


def _rows_of(t: Tensor) -> Tensor:
    """`t` with b and l as one dimension (kept as l of b = 1), the last dimension dense: a view where it can be one."""
    t = t.flatten(0, 1).unsqueeze(0)
    return t if t.stride(-1) == 1 else t.contiguous()


TILE_P = 64
"""Rows of the state that one program of a sweep holds."""


class _Call:
    """The arguments as the kernels want them, and the launches that forward and backward share."""

    def __init__(
        self, x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor,
        diagonal: Tensor | None, D: Tensor | None, ends: Sequence[int],
    ) -> None:  # fmt: skip
        batch, length, self.heads, self.headdim = x.shape
        self.groups, d_state = B.shape[2:]
        rank = 0 if diagonal is None else diagonal.shape[-1]
        chunk = CHUNK // max(rank, 1) * max(rank, 1)
        self.x, self.B, self.C = _rows_of(x), _rows_of(B), _rows_of(C)
        self.a, self.s = a.flatten(0, 1).unsqueeze(0), s.flatten(0, 1).unsqueeze(0)
        self.diagonal = None if diagonal is None else diagonal.contiguous()
        self.block_p = max(triton.next_power_of_2(self.headdim), 16)
        bounds = tuple(ends) or tuple(range(0, (batch + 1) * length, length))
        self.plan = _plan(bounds, chunk, self._pieces(len(bounds) - 1), x.device)
        self.strides = [n for t in (self.x, self.a, self.s, self.B, self.C) for n in t.stride()[1:3]]
        self.sizes = {
            "HEADS": self.heads, "GROUPS": self.groups, "P": self.headdim, "N": d_state, "RANK": rank,
            "CHUNK": chunk, "BLOCK": CHUNK, "BLOCK_N": max(triton.next_power_of_2(d_state), 16),
            "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        self.skip = {"SKIP": 0 if D is None else D.ndim}

    def _pieces(self, sequences: int) -> int:
        """Segments per sequence: one, unless the sequences alone leave multiprocessors idle."""
        programs = sequences * self.heads * triton.cdiv(self.headdim, TILE_P)
        available = processors(self.x.device)
        return 1 if programs >= 2 * available else triton.cdiv(4 * available, programs)

    def head_splits(self) -> int:
        """Programs among which the heads of a group are divided in the gradients: as few as fill the GPU."""
        each, splits = self.heads // self.groups, 1
        while len(self.plan.chunks) * self.groups * splits < 2 * processors(self.x.device) and each % (2 * splits) == 0:
            splits *= 2
        return splits

    def gram(self) -> Float[Tensor, "chunks g q q"]:
        """`C B^T` of every chunk and group."""
        gram = self.x.new_empty(len(self.plan.chunks), self.groups, CHUNK, CHUNK)
        _gram_kernel[(len(self.plan.chunks) * self.groups,)](
            self.B, self.C, gram, self.plan.chunks, *self.strides[6:], **_only(self.sizes, _GRAM)
        )
        return gram

    def entering(self, x: Tensor, keys: Tensor, state: Tensor, *, reverse: bool) -> Float[Tensor, "segments h p n"]:
        """The state that enters each segment; reversed in time, the gradient of the state that leaves it."""
        segments, sequences = self.plan.segments, self.plan.sequences
        if len(segments) == len(sequences):
            return state.contiguous()
        ends = state.new_empty(len(segments), *state.shape[1:])
        decays = state.new_empty(len(segments), self.heads)
        self._sweep(x, keys, None, None, ends, decays, reverse=reverse)
        size = self.headdim * state.shape[3]
        _pass_kernel[(len(sequences) * self.heads, triton.cdiv(size, 1024))](
            ends, decays, state.contiguous(), sequences, HEADS=self.heads, SIZE=size, REVERSE=reverse, BLOCK=1024
        )
        return ends

    def boundaries(self, x: Tensor, keys: Tensor, state: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """The state that enters each chunk (reversed: the gradient of that which leaves it), and the one at the end."""
        entering = self.entering(x, keys, state, reverse=reverse)
        chunks = x.new_empty(len(self.plan.chunks), *state.shape[1:])
        last = torch.empty_like(state, memory_format=torch.contiguous_format)
        self._sweep(x, keys, entering, chunks, last, None, reverse=reverse)
        return chunks, last

    def _sweep(
        self, x: Tensor, keys: Tensor, entering: Tensor | None, chunks: Tensor | None, ends: Tensor,
        decays: Tensor | None, *, reverse: bool,
    ) -> None:  # fmt: skip
        grid = (len(self.plan.segments) * self.heads * triton.cdiv(self.headdim, TILE_P),)
        _sweep_kernel[grid](
            x, self.a, self.s, keys, entering, chunks, ends, decays, self.plan.chunks, self.plan.segments,
            *x.stride()[1:3], *self.strides[2:6], *keys.stride()[1:3], **_only(self.sizes, _SWEEP),
            BLOCK_P=min(self.block_p, TILE_P), REVERSE=reverse, num_warps=_warps(self), num_stages=2,
        )  # fmt: skip


_GRAM = ("GROUPS", "N", "BLOCK", "BLOCK_N", "PRECISION")
_SWEEP = ("HEADS", "GROUPS", "P", "N", "BLOCK", "BLOCK_N", "PRECISION")


def _only(sizes: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: sizes[name] for name in names}


def _warps(call: _Call) -> int:
    """A state of 64 x 128 in float32 takes half of the registers of four warps."""
    return 4 if min(call.block_p, TILE_P) * call.sizes["BLOCK_N"] <= 64 * 128 else 8


@triton.jit
def _load_rows(base, tokens, inside, columns, width, token_stride):
    """Rows `tokens` of a matrix, zeros where there is none."""
    at = tokens.to(tl.int64)[:, None] * token_stride + columns[None, :]
    return tl.load(base + at, mask=inside[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _load_scalars(base, tokens, inside, token_stride):
    return tl.load(base + tokens.to(tl.int64) * token_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _decays(cs, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """`exp(cs_i - cs_j)` for the entries j that entry i receives, and zero elsewhere."""
    at = tl.arange(0, BLOCK)
    received = at[:, None] >= at[None, :]
    if RANK > 0:
        received = (at // RANK)[:, None] > (at // RANK)[None, :]
    return tl.where(received, tl.exp2((cs[:, None] - cs[None, :]) * LOG2E), 0.0)


@triton.jit
def _own(diagonal, tokens, inside, head, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """The given diagonal, as blocks of the matrix of all entries of the chunk."""
    at = tl.arange(0, BLOCK)
    same = (at // RANK)[:, None] == (at // RANK)[None, :]
    row = (tokens.to(tl.int64) * HEADS + head)[:, None] * RANK
    return tl.load(diagonal + row + (at % RANK)[None, :], mask=same & inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _load_skip(D, head, columns, P: tl.constexpr, SKIP: tl.constexpr):
    """D of a head: one number for all columns (SKIP 1), or one for each (SKIP 2)."""
    if SKIP == 2:
        return tl.load(D + head * P + columns, mask=columns < P, other=0.0).to(tl.float32)
    return tl.load(D + head + columns * 0).to(tl.float32)


@triton.jit
def _gram_kernel(
    B, C, gram, chunks, B_token, B_group, C_token, C_group,
    GROUPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and group: `C B^T`."""
    chunk, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    at, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    tokens = tl.load(chunks + 2 * chunk) + at
    inside = tokens < tl.load(chunks + 2 * chunk + 1)
    dtype = gram.dtype.element_ty
    k = _load_rows(B + group * B_group, tokens, inside, columns, N, B_token).to(dtype)
    q = _load_rows(C + group * C_group, tokens, inside, columns, N, C_token).to(dtype)
    product = dot(q, tl.trans(k), None, PRECISION)
    out = gram + tl.program_id(0).to(tl.int64) * BLOCK * BLOCK
    tl.store(out + at[:, None] * BLOCK + at[None, :], product.to(dtype))


@triton.jit
def _scan_kernel(
    x, a, s, B, C, gram, diagonal, D, entering, y, final, chunks, segments,
    x_token, x_head, a_token, a_head, s_token, s_head, B_token, B_group, C_token, C_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_P: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One program per segment, head and tile of p: walk along the segment with the state in registers."""
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head, tile = tl.program_id(0) // TILES % HEADS, tl.program_id(0) % TILES
    segment = tl.program_id(0) // TILES // HEADS
    group, dtype = head // (HEADS // GROUPS), x.dtype.element_ty
    first, count = tl.load(segments + 5 * segment), tl.load(segments + 5 * segment + 1)
    at, p, n = tl.arange(0, BLOCK), tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    place, in_state = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    h = tl.load(entering + (segment * HEADS + head).to(tl.int64) * P * N + place, mask=in_state, other=0.0)
    for chunk in range(first, first + count):
        tokens = tl.load(chunks + 2 * chunk) + at
        inside = tokens < tl.load(chunks + 2 * chunk + 1)
        scale = _load_scalars(s + head * s_head, tokens, inside, s_token)
        decay = _load_scalars(a + head * a_head, tokens, inside, a_token)
        cs, last = tl.cumsum(decay, 0), tl.sum(decay, 0)
        k = _load_rows(B + group * B_group, tokens, inside, n, N, B_token).to(dtype)
        q = _load_rows(C + group * C_group, tokens, inside, n, N, C_token).to(dtype)
        u = _load_rows(x + head * x_head, tokens, inside, p, P, x_token)
        if SHARED:
            out = gram + (chunk * GROUPS + group).to(tl.int64) * BLOCK * BLOCK
            product = tl.load(out + at[:, None] * BLOCK + at[None, :]).to(tl.float32)
        else:
            product = dot(q, tl.trans(k), None, PRECISION)
        weights = product * _decays(cs, RANK, BLOCK) * scale[None, :]
        if RANK > 0:
            weights += _own(diagonal, tokens, inside, head, HEADS, RANK, BLOCK)
        out = dot(q, tl.trans(h.to(dtype)), None, PRECISION) * tl.exp2(cs * LOG2E)[:, None]
        out = dot(weights.to(dtype), u, out, PRECISION)
        if SKIP > 0:
            out += _load_skip(D, head, p, P, SKIP)[None, :] * u.to(tl.float32)
        row = (tokens.to(tl.int64) * HEADS + head) * P
        tl.store(y + row[:, None] + p[None, :], out.to(dtype), mask=inside[:, None] & (p < P)[None, :])
        added = (u * (scale * tl.exp2((last - cs) * LOG2E))[:, None]).to(dtype)
        h = dot(tl.trans(added), k, h * tl.exp2(last * LOG2E), PRECISION)
    if tl.load(segments + 5 * segment + 4) == 1:
        sequence = tl.load(segments + 5 * segment + 2).to(tl.int64)
        tl.store(final + (sequence * HEADS + head) * P * N + place, h, mask=in_state)


@triton.jit
def _sweep_kernel(
    x, a, s, B, entering, boundaries, ends, decays, chunks, segments,
    x_token, x_head, a_token, a_head, s_token, s_head, B_token, B_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Only the state, forwards; or only its gradient, backwards, with dy for x and C for B.

    Without `boundaries` it starts from zero and leaves in `ends` what each segment adds, in `decays` how much of an
    older state it keeps. With it, the state before each chunk goes there, and that after the last segment to `ends`.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head, tile = tl.program_id(0) // TILES % HEADS, tl.program_id(0) % TILES
    segment = tl.program_id(0) // TILES // HEADS
    group, dtype = head // (HEADS // GROUPS), x.dtype.element_ty
    first, count = tl.load(segments + 5 * segment), tl.load(segments + 5 * segment + 1)
    at, p, n = tl.arange(0, BLOCK), tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    place, in_state = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    h, kept = tl.zeros((BLOCK_P, BLOCK_N), tl.float32), 0.0
    if entering is not None:
        h = tl.load(entering + (segment * HEADS + head).to(tl.int64) * P * N + place, mask=in_state, other=0.0)
    for step in range(count):
        chunk = first + (count - 1 - step if REVERSE else step)
        if boundaries is not None:
            out = boundaries + (chunk * HEADS + head).to(tl.int64) * P * N
            tl.store(out + place, h.to(dtype), mask=in_state)
        tokens = tl.load(chunks + 2 * chunk) + at
        inside = tokens < tl.load(chunks + 2 * chunk + 1)
        decay = _load_scalars(a + head * a_head, tokens, inside, a_token)
        cs, last = tl.cumsum(decay, 0), tl.sum(decay, 0)
        if REVERSE:
            weight = tl.exp2(cs * LOG2E)
        else:
            weight = tl.exp2((last - cs) * LOG2E) * _load_scalars(s + head * s_head, tokens, inside, s_token)
        k = _load_rows(B + group * B_group, tokens, inside, n, N, B_token).to(dtype)
        u = _load_rows(x + head * x_head, tokens, inside, p, P, x_token)
        added = tl.trans((u * weight[:, None]).to(dtype))
        h = dot(added, k, h * tl.exp2(last * LOG2E), PRECISION)
        kept += last
    if boundaries is None:
        tl.store(ends + (segment * HEADS + head).to(tl.int64) * P * N + place, h, mask=in_state)
        tl.store(decays + segment * HEADS + head, kept)
    elif tl.load(segments + 5 * segment + (3 if REVERSE else 4)) == 1:
        sequence = tl.load(segments + 5 * segment + 2).to(tl.int64)
        tl.store(ends + (sequence * HEADS + head) * P * N + place, h, mask=in_state)


@triton.jit
def _pass_kernel(
    ends, decays, state, sequences, HEADS: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sequence, head and part of a state: from what the segments add to what enters each, in place."""
    sequence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first, count = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(state + (sequence * HEADS + head).to(tl.int64) * SIZE + at, mask=at < SIZE, other=0.0)
    for step in range(count):
        segment = first + (count - 1 - step if REVERSE else step)
        own = ends + (segment * HEADS + head).to(tl.int64) * SIZE + at
        added = tl.load(own, mask=at < SIZE, other=0.0)
        tl.store(own, h, mask=at < SIZE)
        h = h * tl.exp2(tl.load(decays + segment * HEADS + head) * LOG2E) + added


@triton.jit
def _store_own(out, received, inside, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of the given diagonal: what lies in the blocks of the groups."""
    at = tl.arange(0, BLOCK)
    for rank in tl.static_range(RANK):
        mine = at[None, :] == (at // RANK * RANK + rank)[:, None]
        tl.store(out + rank, tl.sum(tl.where(mine, received, 0.0), 1), mask=inside)


@triton.jit
def _inside_chunk(
    received, du, gram, own, scale, decay, RANK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradients of what entries of a chunk receive from each other: of the gram matrix, x, s and the summed decay."""
    decays = _decays(tl.cumsum(decay, 0), RANK, BLOCK)
    weights = gram * decays * scale[None, :] + own
    dx = dot(tl.trans(weights.to(du.dtype)), du, None, PRECISION)
    product = received * gram * decays
    ds = tl.sum(product, 0)
    dcs = tl.sum(product * scale[None, :], 1) - scale * ds
    return received * decays * scale[None, :], dx, ds, dcs


@triton.jit
def _across_chunks(u, du, k, q, h, dh, scale, decay, dcs, PRECISION: tl.constexpr):
    """Gradients of what goes through the state: of C, B, x and s, and with `dcs` of inside the chunk that of a."""
    cs, last = tl.cumsum(decay, 0), tl.sum(decay, 0)
    since, until = tl.exp2(cs * LOG2E), tl.exp2((last - cs) * LOG2E)
    dq = dot(du, h, None, PRECISION) * since[:, None]
    dk = dot(u, dh, None, PRECISION) * until[:, None]
    ds = tl.sum(dk * k.to(tl.float32), 1)
    dcs += tl.sum(dq * q.to(tl.float32), 1) - scale * ds
    # The last sum of the chunk decays the state, and all that its entries add to it.
    dlast = tl.exp2(last * LOG2E) * tl.sum(tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1), 0) + tl.sum(scale * ds, 0)
    dx = dot(k, tl.trans(dh), None, PRECISION) * (scale * until)[:, None]
    return dq, dk * scale[:, None], dx, ds, tl.cumsum(dcs, 0, reverse=True) + dlast


@triton.jit
def _gradients_kernel(
    x, dy, a, s, B, C, diagonal, D, entering, leaving, dx, da, ds, dB, dC, ddiagonal, dD, chunks,
    x_token, x_head, a_token, a_head, s_token, s_head, B_token, B_group, C_token, C_group, dy_token, dy_head, total,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_P: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program per chunk, group and part of its heads: all gradients of the chunk, those of B and C summed."""
    EACH: tl.constexpr = HEADS // GROUPS // SPLITS
    chunk, part = tl.program_id(0) // (GROUPS * SPLITS), tl.program_id(0) % (GROUPS * SPLITS)
    group, split, dtype = part // SPLITS, part % SPLITS, x.dtype.element_ty
    at, p, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    tokens = tl.load(chunks + 2 * chunk) + at
    inside = tokens < tl.load(chunks + 2 * chunk + 1)
    k = _load_rows(B + group * B_group, tokens, inside, n, N, B_token).to(dtype)
    q = _load_rows(C + group * C_group, tokens, inside, n, N, C_token).to(dtype)
    gram = dot(q, tl.trans(k), None, PRECISION)
    dk, dq = tl.zeros((BLOCK, BLOCK_N), tl.float32), tl.zeros((BLOCK, BLOCK_N), tl.float32)
    mixing = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(EACH):
        head = group * (HEADS // GROUPS) + split * EACH + i
        row = tokens.to(tl.int64) * HEADS + head
        scale = _load_scalars(s + head * s_head, tokens, inside, s_token)
        decay = _load_scalars(a + head * a_head, tokens, inside, a_token)
        u = _load_rows(x + head * x_head, tokens, inside, p, P, x_token)
        du = _load_rows(dy + head * dy_head, tokens, inside, p, P, dy_token)
        place = (chunk * HEADS + head).to(tl.int64) * P * N + p[:, None] * N + n[None, :]
        in_state = (p < P)[:, None] & (n < N)[None, :]
        h = tl.load(entering + place, mask=in_state, other=0.0)
        dh = tl.load(leaving + place, mask=in_state, other=0.0)
        own = tl.zeros((BLOCK, BLOCK), tl.float32)
        if RANK > 0:
            own = _own(diagonal, tokens, inside, head, HEADS, RANK, BLOCK)
        received = dot(du, tl.trans(u), None, PRECISION)
        if RANK > 0:
            _store_own(ddiagonal + row * RANK, received, inside, RANK, BLOCK)
        dgram, dout, dscale, dcs = _inside_chunk(received, du, gram, own, scale, decay, RANK, BLOCK, PRECISION)
        dq_head, dk_head, into, more, dcs = _across_chunks(u, du, k, q, h, dh, scale, decay, dcs, PRECISION)
        mixing += dgram
        dq += dq_head
        dk += dk_head
        dout += into
        dscale += more
        if SKIP > 0:
            dout += _load_skip(D, head, p, P, SKIP)[None, :] * du.to(tl.float32)
            tl.store(dD + (chunk * HEADS + head) * P + p, tl.sum(du.to(tl.float32) * u.to(tl.float32), 0), mask=p < P)
        tl.store(dx + row[:, None] * P + p[None, :], dout.to(dtype), mask=inside[:, None] & (p < P)[None, :])
        tl.store(ds + row, dscale, mask=inside)
        tl.store(da + row, dcs, mask=inside)
    mixing = mixing.to(dtype)
    dq = dot(mixing, k, dq, PRECISION)
    dk = dot(tl.trans(mixing), q, dk, PRECISION)
    row = ((split * total + tokens.to(tl.int64)) * GROUPS + group)[:, None] * N + n[None, :]
    tl.store(dC + row, dq, mask=inside[:, None] & (n < N)[None, :])
    tl.store(dB + row, dk, mask=inside[:, None] & (n < N)[None, :])
