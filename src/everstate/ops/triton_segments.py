"""What scans on a GPU share: chunks of a sequence, segments of chunks, and states that pass from segment to segment.

A sequence is cut into *segments* when there are too few (sequence, head) pairs to fill the GPU: a first pass finds what
each segment adds to a state of zeros, a small kernel passes states from segment to segment, and then all segments run
at once. Packed sequences are segments too.
"""

from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import capability, processors, shared_memory
from everstate.ops.triton_common import INTERPRETED, LOG2E, TRIED
from everstate.ops.triton_launch import cdiv

CHUNK = 64
"""Entries of a chunk: the side of the smallest matrix product that keeps the tensor cores busy."""

DEEP = 227 * 1024
"""Bytes of shared memory, those of a Hopper GPU, from which on there is room for what is loaded ahead of its use."""


class Plan(NamedTuple):
    """Where the programs find their entries.

    chunks: first entry and end. segments: first chunk, number of chunks, sequence, whether its first and last segment.
    sequences: first segment and number of segments.
    """

    chunks: Int[Tensor, "chunks 2"]
    segments: Int[Tensor, "segments 5"]
    sequences: Int[Tensor, "seqs 2"]


# Cached by value: every layer of a model asks for the same tables, which a captured graph could not copy to the GPU.
@lru_cache(maxsize=64)
def plan(ends: tuple[int, ...], chunk: int, pieces: int, device: torch.device) -> Plan:
    """The tables for sequences that end at `ends`, each cut into up to `pieces` segments of whole chunks."""
    chunks: list[tuple[int, int]] = []
    segments: list[tuple[int, int, int, int, int]] = []
    sequences: list[tuple[int, int]] = []
    for sequence, (start, end) in enumerate(pairwise(ends)):
        mine = [(at, min(at + chunk, end)) for at in range(start, end, chunk)]
        each = cdiv(len(mine), pieces)
        cuts = range(0, len(mine), each)
        sequences.append((len(segments), len(cuts)))
        for at in cuts:
            count = min(each, len(mine) - at)
            segments.append((len(chunks) + at, count, sequence, at == 0, at + count == len(mine)))
        chunks += mine
    return Plan(*(torch.tensor(t, dtype=torch.int32, device=device) for t in (chunks, segments, sequences)))


def pieces_for(programs: int, device: torch.device) -> int:
    """Segments per sequence, given the programs that one segment for each would start: as many as fill the GPU."""
    available = processors(device)
    # Two programs run on a multiprocessor; two rounds of them, and not a little more, which would cost a quarter.
    return 1 if programs >= 2 * available else max(4 * available // programs, 1)


def fill(programs: int, device: torch.device) -> int:
    """`pieces_for` programs of which one fills a multiprocessor: as few as leave the least idle."""
    available = processors(device)
    most = max(2 * available // programs, 1)
    return min(range(1, most + 1), key=lambda pieces: cdiv(programs * pieces, available) / pieces)


def settings_for(x: Tensor, stages: int) -> dict[str, int]:
    """How kernels whose tiles fill the registers are compiled.

    On Hopper those of 16 bits load tiles ahead. On others none do, for want of shared memory or because Triton 3.6 does
    not compile it (10.0), and they ask for all the registers that a thread may have: the assembler would give some of
    them 32, and keep the rest in memory.
    """
    if capability(x.device)[0] != 9:
        return {"num_stages": 1, "maxnreg": 255}
    return {"num_stages": stages if x.dtype.itemsize == 2 and shared_memory(x.device) >= DEEP else 1}


def splits_of(heads: int, programs: int, wanted: int, most: int | None = None) -> int:
    """Programs that share so many heads: as few as make `wanted` of `programs`, each with at most `most` heads."""
    splits = 1
    while heads % (2 * splits) == 0 and (programs * splits < wanted or (most is not None and heads > most * splits)):
        splits *= 2
    return splits


def joined(parts: Float[Tensor, "splits *n"]) -> Float[Tensor, "*n"]:
    """What the programs among which heads were divided have summed, in all."""
    return parts.sum(0) if len(parts) > 1 else parts[0]


def only(sizes: dict[str, Any], kernel: Any) -> dict[str, Any]:
    """The sizes that a kernel asks for."""
    return {name: size for name, size in sizes.items() if name in kernel.arg_names}


def can_copy(t: Float[Tensor, "*b h p"]) -> bool:
    """Whether the copy engine can move tiles of such rows: 2 bytes a number, dense, on multiples of 16 bytes."""
    dense = t.stride(-2) == t.shape[-1] and t.stride(-3) % 8 == 0 and t.data_ptr() % 16 == 0
    return t.dtype.itemsize == 2 and dense and capability(t.device) >= (9, 0)


def copyable(t: Tensor) -> Tensor:
    """`t`, whose dimensions but the first lie densely, or a copy, such that the copy engine can move its rows."""
    whole = t[0].is_contiguous() and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
    return t if whole else t.clone(memory_format=torch.contiguous_format)


def hopper_kernels(name: str, x: Tensor) -> ModuleType | None:
    """The module `name` of kernels that are written for Hopper GPUs, where they serve such numbers on this device."""
    if x.dtype.itemsize != 2 or INTERPRETED or capability(x.device)[0] != 9 or shared_memory(x.device) < DEEP:
        return None
    return import_module(name) if TRIED else None  # their language is experimental


def rows_of(t: Float[Tensor, "b l *h p"]) -> Float[Tensor, "one t *h p"]:
    """`t` with b and l as one dimension (kept as l of b = 1), the last dimension dense: a view where it can be one, and
    where offsets within a token fit into 32 bits."""
    t = t if t.shape[0] == 1 else t.flatten(0, 1).unsqueeze(0)
    farthest = sum((size - 1) * step for size, step in zip(t.shape[2:], t.stride()[2:], strict=True))
    return t if farthest < 2**31 and t.stride(-1) == 1 else t.contiguous()


@triton.jit
def load_rows(base, start, at, inside, columns, stride, WIDTH: tl.constexpr):
    """Rows `start + at` of a matrix, zeros where there is none. Only the base is 64 bits wide: registers are scarce."""
    mask = inside[:, None]
    if columns.shape[0] != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + start.to(tl.int64) * stride + (at[:, None] * stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(base, start, at, inside, columns, stride, value, WIDTH: tl.constexpr):
    mask = inside[:, None]
    if columns.shape[0] != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    out = base + start.to(tl.int64) * stride + (at[:, None] * stride + columns[None, :])
    tl.store(out, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_state(base, p, n, P: tl.constexpr, N: tl.constexpr):
    """Rows p and columns n of the state of a head."""
    place = p[:, None] * N + n[None, :]
    if p.shape[0] == P and n.shape[0] == N:
        return tl.load(base + place)
    return tl.load(base + place, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def store_state(base, p, n, value, P: tl.constexpr, N: tl.constexpr):
    place = p[:, None] * N + n[None, :]
    tl.store(base + place, value.to(base.dtype.element_ty), mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit
def pass_kernel(
    ends, kept, state, sequences, HEADS: tl.constexpr, SIZE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sequence, head and part of a state: from what the segments add to what enters each, in place."""
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    first, count = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.zeros((BLOCK,), tl.float32)
    if state is not None:
        h = tl.load(state + (sequence * HEADS + head) * SIZE + at, mask=at < SIZE, other=0.0)
    for step in range(count):
        segment = (first + (count - 1 - step if REVERSE else step)).to(tl.int64)
        own = ends + (segment * HEADS + head) * SIZE + at
        added = tl.load(own, mask=at < SIZE, other=0.0)
        tl.store(own, h, mask=at < SIZE)
        h = h * tl.exp2(tl.load(kept + segment * HEADS + head) * LOG2E) + added
