"""Published tokenizers that are one file of SentencePiece or tiktoken, with further tokens added beside it."""

from __future__ import annotations

import base64
import binascii
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from everstate.core.errors import TokenizerError
from everstate.tokenizers.base import Tokenizer, check_marks, tried_cut, utf8_of
from everstate.tokenizers.chat import ChatTemplate, chat_files, chat_tokens
from everstate.tokenizers.toml import FileTable

LONGEST_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")
"""Where published tiktoken tokenizers cut a text, whose library cannot take a longer run."""

NO_PREFIX = b"\x1a\x02\x18\x00"
"""A protocol buffer to be merged into a SentencePiece model: normalizer_spec { add_dummy_prefix: false }."""


class FileTokenizer(Tokenizer):
    """A tokenizer file and what lies beside it.

    pattern: the regular expression that cuts a text into words, where the file does not have it.
    special: tokens that stand for no text. added: tokens whose name is their text, and that every text may have.
    rows: those of a model with a padded vocabulary, whose published `eos_ids` may lie beyond that of the tokenizer.
    """

    leading = b""
    file: str
    kind: Any

    def __init__(
        self,
        data: bytes,
        pattern: str | None = None,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat: ChatTemplate | None = None,
        special: Mapping[str, int] | None = None,
        added: Mapping[str, int] | None = None,
        rows: int | None = None,
    ) -> None:
        self.chat = chat
        self.pattern = pattern
        self.special, self.added = dict(special or {}), dict(added or {})
        self._data = data
        self._spelled = {token: utf8_of(name) for name, token in self.added.items()}
        self._spelled |= dict.fromkeys(self.special.values(), b"")
        self.vocab_size = max(self._open(data), *(token + 1 for token in self._spelled), 0)
        self._all = _names({**self.special, **self.added})
        self._plain = _names(self.added)
        self.mark_(bos_id, eos_ids, rows)

    def mark_(self, bos_id: int | None, eos_ids: Sequence[int], rows: int | None = None) -> None:
        """Say which token begins a text and which end it."""
        check_marks(bos_id, eos_ids, max(self.vocab_size, rows or 0))
        self.bos_id, self.eos_ids, self._rows = bos_id, tuple(eos_ids), rows

    def encode(self, text: str, *, special: bool = False, continued: bool = False) -> list[int]:
        utf8_of(text)
        names = self._all if special else self._plain
        ids: list[int] = []
        for index, part in enumerate([text] if names is None else names.split(text)):
            if index % 2:
                ids.append(self.special[part] if part in self.special else self.added[part])
            elif part:
                ids += self._encode(part, continued or index > 0)
        return ids

    def token_bytes(self, token: int) -> bytes:
        if token in self._spelled:
            return self._spelled[token]
        return self._bytes(token) if 0 <= token < self.vocab_size else b""

    def token_id(self, name: str) -> int | None:
        """The id of the token called `name`, or None."""
        found = {**self.special, **self.added}.get(name)
        return self._named(name) if found is None else found

    def safe_cut(self, text: str, *, special: bool = False) -> int:
        return tried_cut(self, text, special)

    def files(self) -> dict[str, str | bytes]:
        table = FileTable(
            type=self.kind,
            pattern=self.pattern,
            bos_id=self.bos_id,
            eos_ids=self.eos_ids,
            tokens=chat_tokens(self.chat),
            special=self.special,
            added=self.added,
            rows=self._rows,
        )
        return {self.file: self._data, "tokenizer.toml": table.to_toml(), **chat_files(self.chat)}

    @abstractmethod
    def _open(self, data: bytes) -> int:
        """Read the file; the size of its vocabulary."""

    @abstractmethod
    def _encode(self, text: str, continued: bool) -> list[int]: ...

    @abstractmethod
    def _bytes(self, token: int) -> bytes: ...

    @abstractmethod
    def _named(self, name: str) -> int | None:
        """The token of the file that is called `name`, or None."""


class PieceTokenizer(FileTokenizer):
    """A `tokenizer.model` of SentencePiece, BPE or unigram. Needs the extra `sentencepiece`."""

    file = "tokenizer.model"
    kind = "sentencepiece"

    def _named(self, name: str) -> int | None:
        token: int = self._library.piece_to_id(name)
        return None if token == self._library.unk_id() else token

    def _open(self, data: bytes) -> int:
        _need("sentencepiece")
        import sentencepiece

        try:
            self._library = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._continuing = sentencepiece.SentencePieceProcessor(model_proto=data + NO_PREFIX)
            size: int = self._library.vocab_size()
        except Exception:  # the library raises nothing narrower
            raise TokenizerError(f"{self.file} is not a SentencePiece model; download it again") from None
        # Names of control pieces are tokens only where special tokens are asked for: the library never reads them.
        pieces = {self._library.id_to_piece(token): token for token in range(size) if self._library.is_control(token)}
        self.special = {**pieces, **self.special}
        self._spelled |= dict.fromkeys(pieces.values(), b"")
        spelled = b"".join(self._bytes(token) for token in self._library.encode("a"))
        self.leading = b" " if spelled.startswith(b" ") else b""
        return size

    def _encode(self, text: str, continued: bool) -> list[int]:
        found: list[int] = (self._continuing if continued else self._library).encode(text)
        return found

    def _bytes(self, token: int) -> bytes:
        library = self._library
        if token >= library.vocab_size() or library.is_unknown(token) or library.is_unused(token):
            return b""
        name: str = library.id_to_piece(token)
        return bytes([int(name[3:5], 16)]) if library.is_byte(token) else name.replace("▁", " ").encode()


class RankTokenizer(FileTokenizer):
    """A `tiktoken.model`: lines of a token in base64 and its rank, with a pattern. Needs the extra `tiktoken`."""

    file = "tiktoken.model"
    kind = "tiktoken"

    def _open(self, data: bytes) -> int:
        _need("tiktoken")
        import tiktoken

        if self.pattern is None:
            raise TokenizerError(f"{self.file} does not say how it cuts a text into words; give pat_str")
        ranks = _ranks(data)
        self._tokens = {rank: token for token, rank in ranks.items()}
        try:
            self._library = tiktoken.Encoding("file", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise TokenizerError(f"the pattern of {self.file} cannot be used ({error}); mend pat_str") from None
        return max(self._tokens, default=-1) + 1

    def _encode(self, text: str, continued: bool) -> list[int]:
        ends = [match.end() for match in LONGEST_RUN.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
        return [token for part in parts for token in self._library.encode_ordinary(part)]

    def _bytes(self, token: int) -> bytes:
        return self._tokens.get(token, b"")

    def _named(self, name: str) -> int | None:
        return None


def _ranks(data: bytes) -> dict[bytes, int]:
    """The tokens of a tiktoken file, which must have each single byte."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"tiktoken.model: line {number} is not a token in base64 and its rank; download it again"
            ) from None
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking or len(set(ranks.values())) != len(ranks):
        what = f"has no token for byte {lacking[0]}" if lacking else "gives two tokens one rank"
        raise TokenizerError(f"tiktoken.model {what}; download it again")
    return ranks


def _names(tokens: Mapping[str, int]) -> re.Pattern[str] | None:
    """Finds the names of tokens in a text, the longest first."""
    names = sorted((name for name in tokens if name), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None


def _need(library: str) -> None:
    if find_spec(library) is None:
        raise TokenizerError(
            f"this tokenizer needs the library {library}, which is not installed; pip install 'everstate[{library}]'"
        )
