"""Tokenizers in folders: our own, and as they are published beside a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from everstate.core.config import read_toml
from everstate.core.errors import ConfigError, TokenizerError, did_you_mean
from everstate.tokenizers.base import Tokenizer
from everstate.tokenizers.byte import ByteTokenizer
from everstate.tokenizers.chat import TEMPLATE_FILE, TEMPLATE_FOLDER, ChatTemplate
from everstate.tokenizers.file import PieceTokenizer, RankTokenizer
from everstate.tokenizers.hf import HFTokenizer
from everstate.tokenizers.published import PUBLISHED, chat_of, load_published, read, read_bytes, templates
from everstate.tokenizers.toml import ByteTable, FileTable, HFTable

OWN = "tokenizer.toml"
KINDS = ("bytes", "hf", "sentencepiece", "tiktoken")


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write the tokenizer's files into a folder; an interrupted save leaves each file as it was or as it is to be.

    Raises `TokenizerError` when the folder cannot be written.
    """
    place, files = Path(folder), tokenizer.files()
    try:
        for name, content in files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_name(f".{path.name}.new")
            written.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            os.replace(written, path)
        for name in {OWN, PUBLISHED, TEMPLATE_FILE, PieceTokenizer.file, RankTokenizer.file} - set(files):
            (place / name).unlink(missing_ok=True)
        for path in (place / TEMPLATE_FOLDER).glob("*.jinja"):
            if f"{TEMPLATE_FOLDER}/{path.name}" not in files:
                path.unlink()
    except OSError as error:
        raise TokenizerError(
            f"cannot write the tokenizer into {place}: {error}; give a folder that can be written"
        ) from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """A short name for exactly this tokenizer."""
    return blake2b(repr(sorted(tokenizer.files().items())).encode(), digest_size=16).hexdigest()


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote into a folder, or else one that was published there.

    Of a published one are read `tokenizer.json`, else a SentencePiece or a tiktoken file; `tokenizer_config.json`,
    `special_tokens_map.json`, `added_tokens.json`, `generation_config.json`, the token ids in `config.json`, and chat
    templates. Raises `TokenizerError` when there is none, or a file is not what it claims to be.
    """
    place = Path(folder)
    tokenizer = _load_own(place) if (place / OWN).exists() else load_published(place)
    if tokenizer is None:
        raise TokenizerError(
            f"{place} holds no tokenizer; give a folder with {OWN} or {PUBLISHED}, {PieceTokenizer.file} of "
            f"SentencePiece, or {RankTokenizer.file}"
        )
    return tokenizer


def _load_own(place: Path) -> Tokenizer:
    try:
        return _from_table(place, read_toml(place / OWN))
    except ConfigError as error:
        raise TokenizerError(str(error)) from None


def _from_table(place: Path, table: dict[str, Any]) -> Tokenizer:
    kind = str(table.get("type"))
    if kind == "bytes":
        return ByteTokenizer(_chat(place, ByteTable.parse(table).tokens))
    if kind == "hf":
        hf = HFTable.parse(table)
        chat, text = _chat(place, hf.tokens), read(place / PUBLISHED)
        return HFTokenizer(text, bos_id=hf.bos_id, eos_ids=hf.eos_ids, chat=chat, rows=hf.rows)
    if kind not in KINDS:
        raise TokenizerError(f"{place / OWN} has type {kind!r}; {did_you_mean(kind, KINDS)}")
    file = FileTable.parse(table)
    names = ("bos_id", "eos_ids", "special", "added", "rows")
    settings = {**{name: value for name, value in file if name in names}, "chat": _chat(place, file.tokens)}
    if file.type == "sentencepiece":
        return PieceTokenizer(read_bytes(place / PieceTokenizer.file), **settings)
    if file.pattern is None:
        raise TokenizerError(f"{place / OWN} has no pattern, by which tiktoken cuts a text; restore the file")
    return RankTokenizer(read_bytes(place / RankTokenizer.file), file.pattern, **settings)


def _chat(place: Path, tokens: Mapping[str, str]) -> ChatTemplate | None:
    source, named = templates(place)
    return chat_of(source, tokens, named)
