"""How well a model predicts text that it was not trained on, in a unit that does not depend on the tokenizer."""

from __future__ import annotations

import math

import torch

from everstate.core.errors import DataError
from everstate.data import Documents, Loader, byte_lengths, bytes_in
from everstate.models import LM
from everstate.tokenizers import Tokenizer
from everstate.train.config import DataRecipe
from everstate.train.lanes import Lanes


class HeldOut:
    """Text that measures bits per byte: `sum of losses in nats / (log 2 * bytes of text)`.

    States are carried, or not, as in training. The first `limit` bytes are read, rounded up to whole batches.
    """

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, data: DataRecipe, *, passing: bool, limit: int
    ) -> None:
        self._documents, self._tokenizer, self._data = documents, tokenizer, data
        self._passing, self._limit = passing, limit
        self._lengths = byte_lengths(tokenizer)

    @torch.no_grad()
    def bits_per_byte(self, model: LM) -> float:
        """The figure for `model` as it is. Raises `DataError` when there is no text to measure it on."""
        count, seq_len = self._data.lanes, self._data.seq_len
        loader = Loader(self._documents, self._tokenizer, lanes=count, seq_len=seq_len, epochs=1)
        lanes = Lanes(model, count, passing=self._passing)
        nats, read = torch.zeros((), dtype=torch.float64, device=model.device), 0
        for batch in loader:
            read += bytes_in(batch.targets, self._lengths)
            nats += lanes.read_(batch.to(model.device))
            if read >= self._limit:
                break
        if read == 0:
            raise DataError("the held-out documents hold no text; give more documents, or set data.held_out = 0")
        return nats.item() / (math.log(2) * read)
