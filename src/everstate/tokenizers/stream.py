"""Streams of any length in constant memory: tokens to text and text to tokens, never cutting a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from everstate.core.errors import DataError
from everstate.tokenizers.base import Tokenizer

LONGEST = 65_536
"""Characters that an encoder holds back at most while it looks for a safe place to cut."""


class StreamDecoder:
    """Text of a stream of tokens, given out as soon as it is final.

    All that `push` and `flush` return, joined, is `tokenizer.decode` of all ids, however they were pushed. What is held
    between two calls is at most three bytes of an unfinished character.
    continued: the stream goes on from a text that was read before, so a leading space belongs to it.
    """

    def __init__(self, tokenizer: Tokenizer, *, continued: bool = False) -> None:
        self._tokenizer = tokenizer
        self._leading = b"" if continued else tokenizer.leading
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; empty while a character is unfinished."""
        data = b"".join(self._tokenizer.token_bytes(token) for token in ids)
        if data:
            data, self._leading = data.removeprefix(self._leading), b""
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD where the stream ended within a character."""
        return self._utf8.decode(b"", final=True)


class StreamEncoder:
    """Tokens of a stream of text or UTF-8 bytes, given out as soon as they are final.

    With a `ByteTokenizer` the tokens are those of the whole text. With an `HFTokenizer` too, as long as there is a
    place to cut every `LONGEST` characters (a letter or digit before whitespace; each cut is tried on the text around
    it). Where there is none a word is cut in two: its tokens may then differ there, the text that they spell does not.
    name: what error messages call the stream. special, continued: as in `Tokenizer.encode`.
    Raises `DataError` with the offset of the first byte that is no UTF-8.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, name: str = "the input", special: bool = False, continued: bool = False
    ) -> None:
        self._tokenizer, self._name, self._special, self._continued = tokenizer, name, special, continued
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._bytes_read = 0
        self._text = ""
        self._due = 1

    def push(self, chunk: str | bytes) -> list[int]:
        """The tokens that this chunk completes; the rest waits for more."""
        self._text += self._decode(chunk) if isinstance(chunk, bytes) else self._decode(b"", final=True) + chunk
        # After a search in vain the next waits until the text has doubled: small chunks cost no more than large ones.
        if len(self._text) < min(self._due, LONGEST):
            return []
        place = self._tokenizer.safe_cut(self._text, special=self._special)
        if place == 0 and len(self._text) >= LONGEST:
            place = len(self._text)
        self._due = 1 if place else 2 * len(self._text)
        return self._take(place)

    def flush(self) -> list[int]:
        """The tokens of what is left at the end."""
        self._text += self._decode(b"", final=True)
        return self._take(len(self._text))

    def _take(self, place: int) -> list[int]:
        text, self._text = self._text[:place], self._text[place:]
        if not text:
            return []
        ids = self._tokenizer.encode(text, special=self._special, continued=self._continued)
        self._continued = True
        return ids

    def _decode(self, chunk: bytes, final: bool = False) -> str:
        start = self._bytes_read - len(self._utf8.getstate()[0])
        self._bytes_read += len(chunk)
        try:
            return self._utf8.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._name} is not UTF-8 at byte {start + error.start} ({error.reason}); save it as UTF-8"
            ) from None


def encode_stream(
    tokenizer: Tokenizer,
    chunks: Iterable[str | bytes],
    *,
    name: str = "the input",
    special: bool = False,
    continued: bool = False,
) -> Iterator[list[int]]:
    """Tokens of chunks of text, piece by piece, in constant memory; see `StreamEncoder`.

    >>> for ids in encode_stream(tokenizer, iter(partial(file.read, 65_536), b""), name=file.name): ...
    """
    encoder = StreamEncoder(tokenizer, name=name, special=special, continued=continued)
    for chunk in chunks:
        if ids := encoder.push(chunk):
            yield ids
    if ids := encoder.flush():
        yield ids
