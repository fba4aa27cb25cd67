"""Tokenizers in folders: our own, and as they are published beside a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from everstate.core.config import read_toml
from everstate.core.errors import ConfigError, TokenizerError, did_you_mean
from everstate.tokenizers.base import Tokenizer
from everstate.tokenizers.byte import ByteTokenizer
from everstate.tokenizers.chat import TEMPLATE_FILE, ChatTemplate
from everstate.tokenizers.hf import HFTokenizer
from everstate.tokenizers.toml import ByteTable, HFTable

OWN, PUBLISHED = "tokenizer.toml", "tokenizer.json"


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write the tokenizer's files into a folder; an interrupted save leaves each file as it was or as it is to be.

    Raises `TokenizerError` when the folder cannot be written.
    """
    place, files = Path(folder), tokenizer.files()
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            written = place / f".{name}.new"
            written.write_text(content, encoding="utf-8", newline="")
            os.replace(written, place / name)
        for name in {OWN, PUBLISHED, TEMPLATE_FILE} - set(files):
            (place / name).unlink(missing_ok=True)
    except OSError as error:
        raise TokenizerError(
            f"cannot write the tokenizer into {place}: {error}; give a folder that can be written"
        ) from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """A short name for exactly this tokenizer."""
    return blake2b(repr(sorted(tokenizer.files().items())).encode(), digest_size=16).hexdigest()


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote into a folder, or else one that was published there.

    Of a published one are read `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and
    `chat_template.jinja`. Raises `TokenizerError` when there is none, or a file is not what it claims to be.
    """
    place = Path(folder)
    if (place / OWN).exists():
        return _load_own(place)
    if (place / PUBLISHED).exists():
        return _load_published(place)
    raise TokenizerError(f"{place} holds no tokenizer; give a folder with {OWN} or {PUBLISHED}")


def _load_own(place: Path) -> Tokenizer:
    try:
        table = read_toml(place / OWN)
        kind = str(table.get("type"))
        if kind == "bytes":
            return ByteTokenizer(_chat(_template(place), ByteTable.parse(table).tokens))
        if kind == "hf":
            hf = HFTable.parse(table)
            text = _read(place / PUBLISHED)
            return HFTokenizer(text, bos_id=hf.bos_id, eos_ids=hf.eos_ids, chat=_chat(_template(place), hf.tokens))
    except ConfigError as error:
        raise TokenizerError(str(error)) from None
    raise TokenizerError(f"{place / OWN} has type {kind!r}; {did_you_mean(kind, ['bytes', 'hf'])}")


def _load_published(place: Path) -> Tokenizer:
    config = _read_json(place / "tokenizer_config.json")
    names = {key: _token_name(value) for key, value in config.items() if key.endswith("_token")}
    tokens = {key: name for key, name in names.items() if name is not None}
    chat = _chat(_template(place) or _default_template(config.get("chat_template")), tokens)
    tokenizer = HFTokenizer(_read(place / PUBLISHED), chat=chat)
    bos_id = tokenizer.starts_with()
    if bos_id is None and config.get("add_bos_token") is True:
        bos_id = tokenizer.token_id(tokens.get("bos_token", ""))
    listed = _read_json(place / "generation_config.json").get("eos_token_id")
    ends = [tokenizer.token_id(tokens.get("eos_token", "")), *(listed if isinstance(listed, list) else [listed])]
    tokenizer.mark_(bos_id, tuple(dict.fromkeys(end for end in ends if isinstance(end, int))))
    return tokenizer


def _token_name(entry: object) -> str | None:
    """A special token is written as its name, or as a table with its name."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else None


def _default_template(entry: object) -> str | None:
    """The template of `tokenizer_config.json`: a string, or of a list of named ones the default."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


def _template(place: Path) -> str | None:
    return _read(place / TEMPLATE_FILE) if (place / TEMPLATE_FILE).exists() else None


def _chat(source: str | None, tokens: Mapping[str, str]) -> ChatTemplate | None:
    return None if source is None else ChatTemplate(source, tokens)


def _read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file, empty where there is no file."""
    if not path.exists():
        return {}
    try:
        table = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}; download it again") from None
    if not isinstance(table, dict):
        raise TokenizerError(f"{path} holds no table of settings; download it again")
    return table


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}; restore the file") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 at byte {error.start}; download it again") from None
