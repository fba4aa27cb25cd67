"""Where kernels of the trapezoid find chunks of sequences, and parts of segments: tables, beside those of
`everstate.ops.triton_segments.plan`.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from everstate.ops.triton_launch import cdiv
from everstate.ops.triton_segments import CHUNK


class Homes(NamedTuple):
    """Which chunks belong to which sequences.

    chunks: index, first token and end of the sequence. sequences: first chunk and number of chunks. last: last token.
    """

    chunks: Int[Tensor, "chunks 3"]
    sequences: Int[Tensor, "seqs 2"]
    last: Int[Tensor, " seqs"]


# Cached by value, as the plan is.
@lru_cache(maxsize=64)
def homes(ends: tuple[int, ...], chunk: int, device: torch.device) -> Homes:
    chunks: list[tuple[int, int, int]] = []
    sequences: list[tuple[int, int]] = []
    for sequence, (start, end) in enumerate(pairwise(ends)):
        count = cdiv(end - start, chunk)
        sequences.append((len(chunks), count))
        chunks += [(sequence, start, end)] * count
    table = lambda rows, dtype=torch.int32: torch.tensor(rows, dtype=dtype, device=device)
    return Homes(table(chunks), table(sequences), table([end - 1 for end in ends[1:]], torch.int64))


@lru_cache(maxsize=64)
def pieces(ends: tuple[int, ...], segments: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Segments of `plan` but the last ones of sequences, each in up to so many parts, in a table as that of segments;
    and for each segment its first part and their number."""
    rows: list[tuple[int, int, int, int, int]] = []
    of_segments: list[tuple[int, int]] = []
    at = 0
    for sequence, (start, end) in enumerate(pairwise(ends)):
        count = cdiv(end - start, CHUNK)
        each = cdiv(count, segments)
        part = cdiv(each, parts)
        for cut in range(0, count, each):
            firsts = range(cut, cut + each, part) if cut + each < count else ()
            of_segments.append((len(rows), len(firsts)))
            rows += [(at + first, min(part, cut + each - first), sequence, 0, 0) for first in firsts]
        at += count
    table = lambda values: torch.tensor(values, dtype=torch.int32, device=device)
    return table(rows), table(of_segments)
