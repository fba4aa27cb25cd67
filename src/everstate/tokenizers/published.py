"""Tokenizers as they are published beside a checkpoint. Code that comes with them is never run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from everstate.core.errors import TokenizerError
from everstate.tokenizers.base import Tokenizer
from everstate.tokenizers.chat import TEMPLATE_FILE, TEMPLATE_FOLDER, ChatTemplate
from everstate.tokenizers.file import FileTokenizer, PieceTokenizer, RankTokenizer
from everstate.tokenizers.hf import HFTokenizer

PUBLISHED, SETTINGS = "tokenizer.json", "tokenizer_config.json"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "tokenization_kimi": r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
}
"""How tiktoken tokenizers whose pattern is published as code only cut a text, by the name of that code."""


class Settings(NamedTuple):
    """What the files beside a tokenizer say of it."""

    place: Path
    config: dict[str, Any]
    tokens: dict[str, str]
    special: dict[str, int]
    added: dict[str, int]
    chat: ChatTemplate | None
    ends: tuple[int, ...]
    rows: int | None


def load_published(place: Path) -> Tokenizer | None:
    """The tokenizer published in a folder: `tokenizer.json`, else SentencePiece, else tiktoken; None for neither."""
    pieces, ranks = _pieces_file(place), _ranks_file(place)
    if not (place / PUBLISHED).exists() and pieces is None and ranks is None:
        return None
    said = _settings(place)
    wants_bos = _optional(place / SETTINGS, said.config, "add_bos_token", bool)
    tokenizer: HFTokenizer | FileTokenizer
    if (place / PUBLISHED).exists():
        tokenizer = HFTokenizer(read(place / PUBLISHED), chat=said.chat)
        starts = tokenizer.starts_with()
    else:
        tokenizer = _from_file(said, pieces, ranks)
        starts = None
    if wants_bos is not None:
        starts = tokenizer.token_id(said.tokens.get("bos_token", "")) if wants_bos else None
    elif isinstance(tokenizer, PieceTokenizer):  # the default of every published tokenizer of this kind
        starts = tokenizer.token_id(said.tokens.get("bos_token", "<s>"))
    end = tokenizer.token_id(said.tokens.get("eos_token", "</s>" if isinstance(tokenizer, PieceTokenizer) else ""))
    ends = tuple(dict.fromkeys(said.ends if end is None else (end, *said.ends)))
    padded = any(token >= tokenizer.vocab_size for token in ends)
    tokenizer.mark_(starts, ends, said.rows if padded else None)
    return tokenizer


def read(path: Path) -> str:
    """The text of a file. Raises `TokenizerError` when it is missing or not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 at byte {error.start}; download it again") from None


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises `TokenizerError` when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}; restore the file") from None


def templates(place: Path) -> tuple[str | None, dict[str, str]]:
    """The template in a folder, and further ones by their names."""
    files = [
        file for folder in (TEMPLATE_FOLDER, "chat_templates") for file in sorted((place / folder).glob("*.jinja"))
    ]
    named = {file.stem: read(file) for file in files}
    source = read(place / TEMPLATE_FILE) if (place / TEMPLATE_FILE).exists() else named.pop("default", None)
    return source, named


def chat_of(source: str | None, tokens: Mapping[str, str], named: Mapping[str, str]) -> ChatTemplate | None:
    """A template, if there is one. Where there are only named ones, the first stands for conversations of all kinds."""
    if source is None and named:
        source = next(iter(named.values()))
    return None if source is None else ChatTemplate(source, tokens, named)


def _settings(place: Path) -> Settings:
    config, generation, model = (
        _read_json(place / name) for name in (SETTINGS, "generation_config.json", "config.json")
    )
    written = {**_read_json(place / "special_tokens_map.json"), **config}
    names = {key: _token_name(value) for key, value in written.items() if key.endswith("_token")}
    tokens = {key: name for key, name in names.items() if name is not None}
    source, named = templates(place)
    if source is None and not named:
        source, named = _templates_of(place / SETTINGS, config.get("chat_template"))
    inner = model.get("text_config")
    text = {**model, **inner} if isinstance(inner, dict) else model
    rows = _optional(place / "config.json", text, "vocab_size", int)
    ends = (
        *_ids(place / "generation_config.json", generation, "eos_token_id"),
        *_ids(place / "config.json", text, "eos_token_id"),
    )
    special, added = _added(place, config, set(tokens.values()))
    return Settings(place, config, tokens, special, added, chat_of(source, tokens, named), ends, rows)


def _added(place: Path, config: Mapping[str, Any], names: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens beside the vocabulary: those that are special, and those that any text may have."""
    special: dict[str, int] = {}
    added: dict[str, int] = {}
    path = place / "added_tokens.json"
    for name, token in _read_json(path).items():
        if not isinstance(token, int):
            raise TokenizerError(f"{path}: {name!r} is {token!r}, not a token id; download it again")
        (special if name in names else added)[name] = token
    decoder = _optional(place / SETTINGS, config, "added_tokens_decoder", dict) or {}
    for key, entry in decoder.items():
        written = _token_name(entry)
        if not (key.isascii() and key.isdigit()) or written is None:
            raise TokenizerError(
                f"{place / SETTINGS}: added_tokens_decoder has {key!r} = {entry!r}, not an id and a token; "
                "download it again"
            )
        is_special = isinstance(entry, dict) and entry.get("special") is True
        added.pop(written, None)
        (special if is_special else added)[written] = int(key)
    return special, added


def _from_file(said: Settings, pieces: Path | None, ranks: Path | None) -> FileTokenizer:
    beside: dict[str, Any] = {"special": said.special, "added": said.added, "chat": said.chat}
    try:
        if pieces is not None:
            return PieceTokenizer(read_bytes(pieces), **beside)
        assert ranks is not None
        return RankTokenizer(read_bytes(ranks), _pattern(said), **beside)
    except TokenizerError as error:
        raise TokenizerError(f"{said.place}: {error}") from None


def _pattern(said: Settings) -> str:
    given: str | None = _optional(said.place / SETTINGS, said.config, "pat_str", str)
    code = str(said.config.get("auto_map"))
    known = [pattern for name, pattern in PATTERNS.items() if f"{name}." in code]
    if given is None and not known:
        raise TokenizerError(
            f"{SETTINGS} does not say how words are cut, and code that does is never run; write the regular "
            "expression of the original into it as pat_str"
        )
    return given if given is not None else known[0]


def _pieces_file(place: Path) -> Path | None:
    """`tokenizer.model`, a numbered one as Mistral has them, or the only `.model` file."""
    others = sorted(file for file in place.glob("*.model") if file.name != "tiktoken.model")
    for found in ([place / "tokenizer.model"], sorted(place.glob("tokenizer.model.v*"))[-1:], others):
        if len(found) == 1 and found[0].exists():
            return found[0]
    return None


def _ranks_file(place: Path) -> Path | None:
    found = [*place.glob("tiktoken.model"), *sorted(place.glob("*.tiktoken"))]
    return found[0] if found else None


def _templates_of(path: Path, entry: object) -> tuple[str | None, dict[str, str]]:
    """The `chat_template` of `tokenizer_config.json`: one, or a list of named ones."""
    if not isinstance(entry, list):
        if entry is not None and not isinstance(entry, str):
            raise TokenizerError(f"{path}: chat_template is neither a template nor a list of them; download it again")
        return entry, {}
    named: dict[str, str] = {}
    for item in entry:
        match item:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                raise TokenizerError(f"{path}: chat_template has an entry without name or template; download it again")
    return named.pop("default", None), named


def _token_name(entry: object) -> str | None:
    """A special token is written as its name, or as a table with its name."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else None


def _ids(path: Path, table: Mapping[str, Any], key: str) -> list[int]:
    found = table.get(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise TokenizerError(f"{path}: {key} is {found!r}, not a token id or a list of them; download it again")
    return ids


def _optional(path: Path, table: Mapping[str, Any], key: str, kind: type) -> Any:
    found = table.get(key)
    if found is not None and not isinstance(found, kind):
        raise TokenizerError(f"{path}: {key} is {found!r}, not {kind.__name__}; download it again")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file, empty where there is no file."""
    if not path.exists():
        return {}
    try:
        table = json.loads(read(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}; download it again") from None
    if not isinstance(table, dict):
        raise TokenizerError(f"{path} holds no table of settings; download it again")
    return table
