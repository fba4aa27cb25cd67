"""Batches of a corpus, epoch after epoch, in an order that a seed decides, resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor

from everstate.core.errors import ConfigError, DataError
from everstate.data.pack import Batch, Piece, document_tokens, pack
from everstate.data.source import Documents
from everstate.tokenizers import Tokenizer


@dataclass
class Reading:
    """What a lane is in the middle of: a document, or a part of one."""

    unit: int
    tokens: Int32[np.ndarray, " l"]
    offset: int = 0


class Loader:
    """An iterator over batches of `lanes` segments of `seq_len` tokens.

    A lane that has come to the end of its document takes the next one of the epoch's order, so the lanes share the work
    whatever the lengths are, and little more than one document per lane is in memory.
    seed: shuffles the documents anew in each epoch; None keeps the order of the corpus.
    epochs: how often to read the corpus, or None for ever. With a number, the last batches are shorter, since lanes end
    at different places.
    parts: cuts each document into so many parts, each read from a fresh state, so that a few long documents fill many
    lanes. Every token is still predicted once in an epoch.
    Raises `ConfigError` for settings that make no batch, and `DataError` when the corpus has no text.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        lanes: int,
        seq_len: int,
        seed: int | None = None,
        epochs: int | None = None,
        parts: int = 1,
    ) -> None:
        for name, value in (("lanes", lanes), ("seq_len", seq_len), ("epochs", epochs), ("parts", parts)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} makes no batch; give at least 1")
        # Without end, a lane too many would read at the same time what another reads, in its next epoch.
        if epochs is None and 0 < len(documents) * parts < lanes:
            raise ConfigError(
                f"{lanes} lanes cannot share {len(documents)} documents in {parts} parts; give fewer lanes, "
                f"more documents, or parts = {-(-lanes // len(documents))}"
            )
        self._documents, self._tokenizer, self._parts = documents, tokenizer, parts
        self._seq_len, self._seed, self._epochs = seq_len, seed, epochs
        self._lanes: list[Reading | None] = [None] * lanes
        self._tokenized: tuple[int, Int32[np.ndarray, " l"]] | None = None
        self._next = 0
        self._has_text = False
        self.epoch = 0
        """How many times the corpus was given out to the lanes."""
        self._order = self._shuffled()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        segments = [self._segment(lane) for lane in range(len(self._lanes))]
        if not any(segments):
            raise StopIteration
        return pack(segments)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, in plain numbers, from which a loader of the same corpus gives the same batches."""
        return {
            **self._identity(),
            "epoch": self.epoch,
            "next": self._next,
            "reading": [lane and [lane.unit, lane.offset, len(lane.tokens)] for lane in self._lanes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another loader was. Raises `DataError` when it read another corpus, or read it otherwise."""
        for key, value in self._identity().items():
            if state[key] != value:
                raise DataError(f"cannot resume with {key} = {value}: the run was saved with {state[key]}; give that")
        self._lanes = [saved and self._reopen(*saved) for saved in state["reading"]]
        self.epoch, self._next = state["epoch"], state["next"]
        self._has_text = (self.epoch, self._next) != (0, 0)
        self._order = self._shuffled()

    def _identity(self) -> dict[str, Any]:
        """What decides the order of the tokens; `seq_len` may change between two runs."""
        return {
            "documents": len(self._documents),
            "parts": self._parts,
            "lanes": len(self._lanes),
            "seed": self._seed,
        }

    def _reopen(self, unit: int, offset: int, length: int) -> Reading:
        tokens = self._tokens(unit)
        if len(tokens) != length:
            raise DataError(
                f"cannot resume: {self._documents.name(unit // self._parts)} is no longer what it was when saved; "
                "restore the corpus, or start anew"
            )
        return Reading(unit, tokens, offset)

    def _segment(self, lane: int) -> list[Piece]:
        """The next pieces of a lane, `seq_len` tokens in all, fewer only at its end."""
        pieces: list[Piece] = []
        room = self._seq_len
        while room:
            reading = self._lanes[lane] or self._open()
            if reading is None:
                break
            start = reading.offset
            tokens = reading.tokens[start : start + room + 1]
            pieces.append(Piece(tokens, starts=start == 0))
            reading.offset += len(tokens) - 1
            room -= len(tokens) - 1
            self._lanes[lane] = reading if reading.offset < len(reading.tokens) - 1 else None
        return pieces

    def _open(self) -> Reading | None:
        """The next document, or part of one, that has a token to predict; None at the end of the last epoch."""
        while True:
            if self._next == len(self._order):
                if not self._has_text:
                    raise DataError(
                        f"the corpus of {len(self._documents)} documents has no text; give one that has some"
                    )
                self.epoch, self._next = self.epoch + 1, 0
                self._order = self._shuffled()
            if self.epoch == self._epochs:
                return None
            unit = int(self._order[self._next])
            self._next += 1
            tokens = self._tokens(unit)
            if len(tokens) > 1:
                self._has_text = True
                return Reading(unit, tokens)

    def _tokens(self, unit: int) -> Int32[np.ndarray, " l"]:
        """The tokens to read in a part of a document, and one more."""
        index, part = divmod(unit, self._parts)
        if self._tokenized is None or self._tokenized[0] != index:
            self._tokenized = index, document_tokens(self._tokenizer, self._documents.read(index))
        tokens = self._tokenized[1]
        predicted = max(len(tokens) - 1, 0)
        return tokens[predicted * part // self._parts : predicted * (part + 1) // self._parts + 1]

    def _shuffled(self) -> Int[Tensor, " units"]:
        """The order of this epoch."""
        count = len(self._documents) * self._parts
        if self._seed is None:
            return torch.arange(count)
        digest = blake2b(f"{self._seed} {self.epoch}".encode(), digest_size=7).digest()
        return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(digest)))
