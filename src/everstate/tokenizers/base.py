"""What training, generation and data need of a tokenizer.

Every token stands for a string of bytes, and the text of some tokens is their bytes, end to end, read as UTF-8. So
decoding a stream, counting bytes and showing half a character need nothing that a tokenizer would have to add.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice

from everstate.core.errors import TokenizerError
from everstate.tokenizers.chat import ChatTemplate

WORD_END = re.compile(r"(?<=[^\W_])(?=\s)")
AROUND = 64
"""Characters on each side of a cut on which it is tried, before it is made."""
TRIES = 16


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocab_size: int
    """One more than the largest id. A model may have more rows; ids beyond it stand for no text."""
    bos_id: int | None
    """The token that every text begins with, put there by the caller, or None where texts begin without one."""
    eos_ids: tuple[int, ...]
    """The tokens that end a text. The first is the one that ends a document in training."""
    chat: ChatTemplate | None
    """How a conversation is written as one text, where the tokenizer comes with a template."""
    leading: bytes
    """What `encode` puts in front of a text that continues no other, and `decode` takes away again."""

    @abstractmethod
    def encode(self, text: str, *, special: bool = False, continued: bool = False) -> list[int]:
        """The token ids of a text, without `bos_id` and `eos_ids`.

        special: the name of a special token, such as `<|eos|>`, stands for that token, as in a rendered chat template;
        otherwise for its characters, as in anything that was written by others.
        continued: the text goes on from one that was read before, so nothing is put in front of it.
        Raises `TokenizerError` for a lone surrogate.
        """

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """What a token stands for: nothing for a special token, and nothing for an id that no text has.

        A model whose vocabulary is padded can sample such an id, and that must not end a stream.
        """

    @abstractmethod
    def safe_cut(self, text: str, *, special: bool = False) -> int:
        """The last place where `text`, whatever follows it, may be cut to encode its parts one by one; 0 for none."""

    @abstractmethod
    def files(self) -> dict[str, str | bytes]:
        """Name and content of the files from which `load_tokenizer` makes an equal tokenizer."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some tokens; they may begin or end within a character."""
        return b"".join(self.token_bytes(token) for token in ids).removeprefix(self.leading)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens; bytes that are no UTF-8 come out as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def utf8_of(text: str) -> bytes:
    """The bytes of a text. Raises `TokenizerError` for a lone surrogate, which UTF-8 cannot write."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "it was not read as UTF-8: read it so, or take the character out"
        ) from None


def tried_cut(tokenizer: Tokenizer, text: str, special: bool) -> int:
    """Between a letter or digit and whitespace, if both sides alone have the tokens that they have together.

    Tried on `AROUND` characters of each side, which is a test and not a proof.
    """
    ends = [match.start() for match in WORD_END.finditer(text, 0, max(0, len(text) - AROUND))]
    for place in islice(reversed(ends), TRIES):
        left, right = text[max(0, place - AROUND) : place], text[place : place + AROUND]
        parts = [tokenizer.encode(part, special=special, continued=True) for part in (left, right, left + right)]
        if parts[0] + parts[1] == parts[2]:
            return place
    return 0


def check_marks(bos_id: int | None, eos_ids: Sequence[int], rows: int) -> None:
    """Raises `TokenizerError` where the token that begins a text, or one that ends it, is none of `rows`."""
    for token in eos_ids if bos_id is None else (bos_id, *eos_ids):
        if not 0 <= token < rows:
            raise TokenizerError(f"special token {token} is not in the vocabulary; give an id below {rows}")
