"""A session: one sequence that is read and written for as long as one likes, and can be forked, saved and resumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.errors import RequestError
from everstate.core.state import clone, nbytes
from everstate.engine.runner import decode_, prefill_
from everstate.engine.sampler import Sampling
from everstate.engine.snapshots import Snapshot, load_snapshot, save_snapshot
from everstate.models import LM
from everstate.tokenizers import StreamDecoder, Tokenizer, encode_stream


class Session:
    """A model in the middle of one sequence, in memory that does not grow with what was read.

    `context` bounds how far full attention can look back (other models have no such bound). `state_dtype` is that of
    recurrent states, by default float32; see `LM.init_state`.

    >>> session = Session(model, tokenizer)
    >>> session.read("Once upon a time")
    >>> print("".join(session.write(max_tokens=20)))
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        *,
        context: int | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tokens_read = 0
        self._context = context
        self._state = model.init_state(1, context=context, dtype=state_dtype)
        self._logits: Float[Tensor, " v"] | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the state."""
        return nbytes(self._state)

    def read(self, text: str) -> None:
        """Read text. The first text of a session begins with the tokenizer's begin-of-text token, if it has one."""
        self.read_stream([text])

    def read_stream(self, chunks: Iterable[str | bytes], *, name: str = "the input") -> None:
        """Read text or UTF-8 bytes of any length, chunk by chunk. Raises `DataError` for bytes that are not UTF-8."""
        begun = self.tokens_read > 0
        bos = [] if begun or self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        pieces = encode_stream(self.tokenizer, chunks, name=name, continued=begun)
        self.read_tokens(chain(bos, chain.from_iterable(pieces)))

    def read_tokens(self, tokens: Iterable[int]) -> None:
        """Read token ids of any number, block by block. Raises `RequestError` when there is none.

        When it fails, or what gives the tokens does, the session is as it was before.
        """
        state, count = clone(self._state), 0

        def counted() -> Iterator[int]:
            nonlocal count
            for token in tokens:
                count += 1
                yield token

        self._logits = prefill_(self.model, [counted()], state)[0]
        self._state, self.tokens_read = state, self.tokens_read + count

    def write_tokens(self, max_tokens: int, sampling: Sampling | None = None) -> Iterator[int]:
        """Write token ids one by one, up to and with an end-of-text token.

        Raises `RequestError` when nothing was read before.
        """
        sampling = sampling or Sampling()
        if self._logits is None:
            raise RequestError("nothing was read yet; give read(...) at least one token before writing")
        steps = decode_(
            self.model, self._logits[None], self._state, [sampling], [self.tokens_read],
            stop=self.tokenizer.eos_ids, max_tokens=max_tokens,
        )  # fmt: skip
        for step in steps:
            token, self._logits = step[0]
            self.tokens_read += 1
            yield token

    def write(self, max_tokens: int, sampling: Sampling | None = None) -> Iterator[str]:
        """Write text in pieces as it appears, never half a character, up to an end-of-text token."""
        decoder = StreamDecoder(self.tokenizer, continued=True)
        for token in self.write_tokens(max_tokens, sampling):
            if token not in self.tokenizer.eos_ids:
                yield decoder.push([token])
        yield decoder.flush()

    def fork(self) -> Session:
        """An independent copy, at the cost of copying the state."""
        return Session(self.model, self.tokenizer)._resume(
            Snapshot(clone(self._state), self._context, self._logits, self.tokens_read)
        )

    def save(self, path: Path | str) -> None:
        """Write the session to a file of fixed size, atomically. It holds the conversation: treat it as a secret."""
        save_snapshot(path, self.model, Snapshot(self._state, self._context, self._logits, self.tokens_read))

    @classmethod
    def load(cls, path: Path | str, model: LM, tokenizer: Tokenizer) -> Session:
        """Resume what `save` wrote. Raises `CheckpointError` for a damaged file or the state of another model."""
        return cls(model, tokenizer)._resume(load_snapshot(path, model))

    def _resume(self, snapshot: Snapshot) -> Session:
        self._state, self._context, self._logits, self.tokens_read = snapshot
        return self
