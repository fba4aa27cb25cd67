"""The tables of `tokenizer.toml`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from everstate.core.config import Config


class ByteTable(Config):
    """A `ByteTokenizer`, and the names of special tokens for its chat template."""

    title = "tokenizer.toml"

    type: Literal["bytes"]
    tokens: dict[str, str] = Field(default_factory=dict)


class HFTable(Config):
    """What a `tokenizer.json` leaves open."""

    title = "tokenizer.toml"

    type: Literal["hf"]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    tokens: dict[str, str] = Field(default_factory=dict)
    rows: int | None = None


class FileTable(Config):
    """What a SentencePiece or tiktoken file leaves open.

    special: tokens that are only ever written by a template; added: tokens that any text may have.
    pattern: how tiktoken cuts a text into words.
    """

    title = "tokenizer.toml"

    type: Literal["sentencepiece", "tiktoken"]
    pattern: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    tokens: dict[str, str] = Field(default_factory=dict)
    special: dict[str, int] = Field(default_factory=dict)
    added: dict[str, int] = Field(default_factory=dict)
    rows: int | None = None
