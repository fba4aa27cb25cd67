"""Tokenizers of GGUF files: the fields `tokenizer.ggml.*` as a `tokenizer.json` (GGUF specification; llama.cpp)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from everstate.core.errors import TokenizerError, did_you_mean
from everstate.tokenizers.chat import ChatTemplate
from everstate.tokenizers.hf import HFTokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + ENDS
QWEN2 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + ENDS
QWEN35 = SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + ENDS
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + ENDS
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


class Words(NamedTuple):
    """How a text is cut into words before byte-level BPE: by each pattern in turn.

    whole: a word that is a token is that token, whatever the merges say.
    bos: texts begin with `bos_token_id` where the file does not say.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False


_LLAMA3 = Words((LLAMA3,), whole=True, bos=True)
_DIGITS = Words((r"\p{N}", GPT2))
WORDS: dict[str, Words] = {
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "falcon": Words((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "granite-docling"), Words((GPT2,))),
    **dict.fromkeys(("refact", "starcoder", "smollm", "command-r"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Words((LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), Words((QWEN2,))),
    "qwen35": Words((QWEN35,)),
    "tekken": Words((TEKKEN,), whole=True, bos=True),
}


def tokenizer_of_gguf(fields: Mapping[str, Any]) -> HFTokenizer:
    """The tokenizer in the fields of a GGUF file, given as plain Python values.

    Byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`). Raises `TokenizerError` for another
    model, an unknown pre-tokenizer, and fields that are missing or do not fit each other.
    """
    kind = _field(fields, "model", str)
    tokens = _strings(fields, "tokens")
    types = _types(fields, len(tokens))
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise TokenizerError(f"tokenizer.ggml.tokens holds {twice!r} twice; convert the model again")
    if kind == "gpt2":
        table, bos = _byte_level(fields, tokens, types)
    elif kind == "llama":
        table, bos = _sentencepiece(fields, tokens, types), True
    else:
        raise TokenizerError(f"tokenizer.ggml.model is {kind!r}; {did_you_mean(kind, ['gpt2', 'llama'])}")
    special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table["added_tokens"] = [
        {"id": token, "content": name, "special": special[kind], **flags}
        for token, (name, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in special and name
    ]
    starts = _optional(fields, "add_bos_token", bool)
    bos_id = _id(fields, "bos_token_id", tokens)
    eos = [_id(fields, key, tokens) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    ends = tuple(dict.fromkeys(token for token in eos if token is not None))
    names = {"bos_token": bos_id, "eos_token": ends[0] if ends else None}
    chat = _chat(fields, {key: tokens[token] for key, token in names.items() if token is not None})
    begins = bos_id if (bos if starts is None else starts) else None
    return HFTokenizer(json.dumps(table), bos_id=begins, eos_ids=ends, chat=chat)


def _byte_level(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[dict[str, Any], bool]:
    pre = _optional(fields, "pre", str) or "default"
    if pre not in WORDS:
        raise TokenizerError(f"tokenizer.ggml.pre is {pre!r}, which is not supported; {did_you_mean(pre, WORDS)}")
    words = WORDS[pre]
    merges = [merge.split(" ") for merge in _strings(fields, "merges")]
    bad = next((index for index, merge in enumerate(merges) if len(merge) != 2), None)
    if bad is not None:
        raise TokenizerError(f"tokenizer.ggml.merges: entry {bad} is not two tokens; convert the model again")
    model = {
        "type": "BPE",
        "vocab": {name: token for token, name in enumerate(tokens) if types[token] != UNUSED},
        "merges": merges,
        "ignore_merges": words.whole,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in words.patterns
    ]
    cut = {"type": "Sequence", "pretokenizers": [*splits, level]}
    return {"version": "1.0", "pre_tokenizer": cut, "decoder": level, "model": model}, words.bos


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = _field(fields, "scores", list)
    if len(scores) != len(tokens):
        raise TokenizerError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens; convert the model again"
        )
    prefix = _optional(fields, "add_space_prefix", bool) is not False
    unknown = [name for name, kind in zip(tokens, types, strict=True) if kind == UNKNOWN]
    vocab = {name: token for token, name in enumerate(tokens) if types[token] != UNUSED}
    pieces = {name: token for name, token in vocab.items() if types[token] == NORMAL}
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": _merges(pieces, scores),
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": unknown[0] if unknown else None,
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    begin = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [*begin, spaces]},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, those of the best pieces first."""
    found = [
        (-scores[token], pieces[name[:cut]], pieces[name[cut:]], name[:cut], name[cut:])
        for name, token in pieces.items()
        for cut in range(1, len(name))
        if name[:cut] in pieces and name[cut:] in pieces
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _chat(fields: Mapping[str, Any], tokens: Mapping[str, str]) -> ChatTemplate | None:
    source = fields.get("tokenizer.chat_template")
    start = "tokenizer.chat_template."
    named = {key.removeprefix(start): str(value) for key, value in fields.items() if key.startswith(start)}
    return ChatTemplate(source, tokens, named) if isinstance(source, str) else None


def _field(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    found = _optional(fields, key, kind)
    if found is None:
        raise TokenizerError(f"the GGUF file has no tokenizer.ggml.{key}; convert the model again with its vocabulary")
    return found


def _optional(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    found = fields.get(f"tokenizer.ggml.{key}")
    if found is not None and not isinstance(found, kind):
        raise TokenizerError(f"tokenizer.ggml.{key} is {type(found).__name__}, not {kind.__name__}; convert again")
    return found


def _strings(fields: Mapping[str, Any], key: str) -> list[str]:
    found: list[str] = _field(fields, key, list)
    if not all(isinstance(item, str) for item in found):
        raise TokenizerError(f"tokenizer.ggml.{key} holds something other than strings; convert the model again")
    return found


def _types(fields: Mapping[str, Any], size: int) -> list[int]:
    types: list[int] = _optional(fields, "token_type", list) or [NORMAL] * size
    if len(types) != size:
        raise TokenizerError(f"tokenizer.ggml.token_type has {len(types)} entries for {size} tokens; convert again")
    return types


def _id(fields: Mapping[str, Any], key: str, tokens: Sequence[str]) -> int | None:
    found: int | None = _optional(fields, key, int)
    if found is not None and not 0 <= found < len(tokens):
        raise TokenizerError(f"tokenizer.ggml.{key} is {found}, of {len(tokens)} tokens; convert the model again")
    return found
