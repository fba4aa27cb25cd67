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
