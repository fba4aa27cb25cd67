"""Pieces of documents laid end to end: what one step of training reads.

A batch holds one segment of several *lanes*. A lane is a long stream of documents; the state at the end of its segment
is where its next segment begins, and a document that begins within a segment begins with a fresh state. So nothing is
padded, no document sees another, and a document of any length is read whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor

from everstate.core.packing import Packing
from everstate.core.state import gather, map_state
from everstate.tokenizers import Tokenizer, encode_stream

S = TypeVar("S")

CHUNK = 65_536


class Piece(NamedTuple):
    """Consecutive tokens of one document: those to read, and one more, which the last of them predicts."""

    tokens: Int32[np.ndarray, " l1"]
    starts: bool
    """Whether it begins with a fresh state."""


@dataclass(frozen=True)
class Batch:
    """One segment of every lane, packed into one row."""

    tokens: Int[Tensor, "1 total"]
    targets: Int[Tensor, "1 total"]
    """The token after each token of the same document; the last one's is the end of the document."""
    packing: Packing
    continues: Int[Tensor, " n"]
    """For each packed sequence the lane whose state it goes on from, or -1 where a document begins."""
    last: Int[Tensor, " lanes"]
    """For each lane its last packed sequence, or -1 when it has come to its end."""

    def first_states(self, carry: S, fresh: S) -> S:
        """The states before the batch: a row of `carry` per lane where a sequence goes on, else its row of `fresh`.

        `fresh` is `init_state(len(batch.packing))`; before the first batch `carry` is `init_state(lanes)`.
        """
        rows = (self.continues >= 0).nonzero()[:, 0]
        lanes = self.continues[rows]
        return map_state(lambda new, old: new.index_copy(0, rows, old.index_select(0, lanes)), fresh, carry)

    def last_states(self, final: S) -> S:
        """What the lanes carry to the next batch, out of the states after this one."""
        return gather(final, self.last.clamp(min=0))  # no later batch asks for the row of a lane at its end

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        tokens, targets = self.tokens.to(device), self.targets.to(device)
        return Batch(tokens, targets, self.packing, self.continues.to(device), self.last.to(device))


def document_tokens(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " l"]:
    """The tokens of a document between the token that begins texts and the one that ends them, where there are such.

    All but the last are read and all but the first are predicted. A long text is encoded as a stream, because the
    `tokenizers` library takes hundreds of bytes of memory per byte of text.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    chunks = (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))
    ids = chain.from_iterable(encode_stream(tokenizer, chunks))
    return np.fromiter(chain(begin, ids, tokenizer.eos_ids[:1]), dtype=np.int32)


def pack(lanes: Sequence[Sequence[Piece]]) -> Batch:
    """Lay the pieces of every lane end to end."""
    pieces = [piece for lane in lanes for piece in lane]
    tokens = np.concatenate([piece.tokens[:-1] for piece in pieces])
    targets = np.concatenate([piece.tokens[1:] for piece in pieces])
    ends = np.cumsum([len(lane) for lane in lanes])
    return Batch(
        tokens=torch.from_numpy(tokens).long().unsqueeze(0),
        targets=torch.from_numpy(targets).long().unsqueeze(0),
        packing=Packing.of_lengths([len(piece.tokens) - 1 for piece in pieces]),
        continues=torch.tensor([-1 if piece.starts else i for i, lane in enumerate(lanes) for piece in lane]),
        last=torch.tensor([end - 1 if lane else -1 for end, lane in zip(ends.tolist(), lanes, strict=True)]),
    )


def byte_lengths(tokenizer: Tokenizer) -> Int[Tensor, " v"]:
    """How many bytes of text each token stands for."""
    return torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])


def bytes_in(targets: Int[Tensor, "*b"], lengths: Int[Tensor, " v"]) -> int:
    """Bytes of text that are predicted: what a sum of losses is divided by, to compare tokenizers with each other.

    bits per byte = sum of losses / (log 2 * bytes). Negative targets, which no loss is taken of, count nothing. Exact
    where tokens spell the text as it is; a space that a tokenizer puts in front of a document counts as one byte.
    """
    return int(lengths[targets[targets >= 0]].sum())
