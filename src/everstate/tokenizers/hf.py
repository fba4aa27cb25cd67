"""Published tokenizers: a `tokenizer.json` through the `tokenizers` library."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import tokenizers

from everstate.core.errors import TokenizerError
from everstate.tokenizers.base import Tokenizer, check_marks, tried_cut, utf8_of
from everstate.tokenizers.chat import ChatTemplate, chat_files, chat_tokens
from everstate.tokenizers.toml import HFTable


class HFTokenizer(Tokenizer):
    """A tokenizer whose decoder spells each token as bytes: byte-level BPE, or SentencePiece with byte fallback.

    `text` is the content of a `tokenizer.json`. Truncation and padding that it asks for are turned off: both would lose
    or invent text. Raises `TokenizerError` when the library cannot read it, for a decoder that is not of these kinds,
    and for a `bos_id` or `eos_ids` that it does not have. `rows` are those of a model with a padded vocabulary, whose
    published `eos_ids` may lie beyond that of the tokenizer.
    """

    def __init__(
        self,
        text: str,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat: ChatTemplate | None = None,
        rows: int | None = None,
    ) -> None:
        self._backend = _backend(text)
        self._spelling = _spelling(json.loads(text).get("decoder"))
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        # One object, whose switch for special tokens is set for each call.
        self._lock = threading.Lock()
        self.vocab_size = max(self._backend.get_vocab().values(), default=-1) + 1
        self.leading = self._spelling.leading
        self.chat = chat
        self.mark_(bos_id, eos_ids, rows)

    def mark_(self, bos_id: int | None, eos_ids: Sequence[int], rows: int | None = None) -> None:
        """Say which token begins a text and which end it."""
        check_marks(bos_id, eos_ids, max(self.vocab_size, rows or 0))
        self.bos_id, self.eos_ids, self._rows = bos_id, tuple(eos_ids), rows

    def encode(self, text: str, *, special: bool = False, continued: bool = False) -> list[int]:
        utf8_of(text)
        backend = self._continuing if continued else self._backend
        with self._lock:
            backend.encode_special_tokens = not special
            return backend.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        if token in self._special or not 0 <= token < self.vocab_size:
            return b""
        name = self._backend.id_to_token(token)
        return b"" if name is None else self._spelling.bytes_of(name)

    def token_id(self, name: str) -> int | None:
        """The id of the token called `name`, or None."""
        return self._backend.token_to_id(name)

    def starts_with(self) -> int | None:
        """The token that the file itself puts in front of every text, or None."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        return encoding.ids[0] if encoding.ids and encoding.special_tokens_mask[0] else None

    def safe_cut(self, text: str, *, special: bool = False) -> int:
        return tried_cut(self, text, special)

    def files(self) -> dict[str, str | bytes]:
        table = HFTable(
            type="hf", bos_id=self.bos_id, eos_ids=self.eos_ids, tokens=chat_tokens(self.chat), rows=self._rows
        )
        return {"tokenizer.json": self._backend.to_str(), "tokenizer.toml": table.to_toml(), **chat_files(self.chat)}

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but for the space that many put in front of a text."""
        table = json.loads(self._backend.to_str())
        changed = {part: _without_prefix(table[part]) for part in ("normalizer", "pre_tokenizer")}
        return self._backend if table == {**table, **changed} else _backend(json.dumps({**table, **changed}))


class Spelling(NamedTuple):
    """How the name of a token in the vocabulary spells bytes."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    leading: bytes

    def bytes_of(self, name: str) -> bytes:
        """The bytes of one token."""
        if self.byte_level:
            known = all(char in BYTE_OF for char in name)
            return bytes(BYTE_OF[char] for char in name) if known else name.encode("utf-8")
        if self.byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
            return bytes([int(name[3:5], 16)])
        for old, new in self.replacements:
            name = name.replace(old, new)
        return name.encode("utf-8")


def _spelling(decoder: dict[str, Any] | None) -> Spelling:
    """Read the `decoder` of a `tokenizer.json`, of which we do what can be done token by token."""
    steps: list[Any] = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    byte_level = byte_fallback = fused = False
    replacements, leading = [], b""
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if fused:
                leading = b" " * start
            case {"type": "Metaspace", "replacement": str(old)}:
                replacements.append((old, " "))
                leading = b"" if step.get("prepend_scheme") == "never" else b" "
            case _:
                kind = step["type"] if step else "none"
                raise TokenizerError(
                    f"tokenizer.json has a decoder that is not supported: {kind}; use a tokenizer that decodes by "
                    "ByteLevel, Metaspace, or Replace, ByteFallback, Fuse, Strip"
                )
    return Spelling(byte_level, byte_fallback, tuple(replacements), leading)


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer, but for what puts a space in front of the text."""
    match part:
        case {"type": "Prepend"}:
            return None
        case {"type": "Sequence"}:
            return {key: _without_prefix(value) for key, value in part.items()}
        case list():
            changed = [_without_prefix(item) for item in part]
            return [item for item in changed if item is not None]
        case dict():
            off = {"prepend_scheme": "never", "add_prefix_space": False}
            return {key: off.get(key, value) for key, value in part.items()}
    return part


def _backend(text: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(
            f"tokenizer.json cannot be read by tokenizers {tokenizers.__version__} ({error}); download it again, "
            "or update tokenizers"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _byte_names() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte: itself where it can be printed, else one from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_names()
