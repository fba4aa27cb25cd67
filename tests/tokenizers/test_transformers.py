"""A published folder, read by us and by transformers: the same ids and the same conversations."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstate.core.errors import TokenizerError
from everstate.tokenizers import Tokenizer, load_tokenizer
from tests.tokenizers.published import TEXTS, byte_level, sentencepiece

PLAIN = (
    "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}{% endfor %}{% if enable_thinking %}<think>{% endif %}"
)
TOOLS = "{{ tools | tojson }}" + PLAIN
MESSAGES = [{"role": "user", "content": "Grüße <b>"}]
TOOL = {"type": "function", "function": {"name": "größe", "description": "a < b", "parameters": {}}}


def test_ids_and_conversations_are_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(byte_level(), encoding="utf-8")
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in [*TEXTS, " \n\n  \t x", "<|bos|>a<think>"]:
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)
    assert ours.chat is not None
    for tools in (None, [TOOL]):
        for flags in ({}, {"enable_thinking": True}):
            text = ours.chat.render(MESSAGES, tools=tools, variables=flags)
            assert text == theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False, **flags)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
@pytest.mark.parametrize("kind", ["gpt2", "llama", "prepend", "metaspace", "none"])
def test_ids_of_any_text_are_the_same(kind: str, text: str) -> None:
    theirs, ours = _pair(kind)
    assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)


@lru_cache
def _pair(kind: str) -> tuple[Any, Tokenizer]:
    """One published tokenizer, in the hands of transformers and in ours."""
    transformers = pytest.importorskip("transformers")
    content = byte_level(kind) if kind in ("gpt2", "llama") else sentencepiece(kind)
    with TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(content, encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


@pytest.mark.parametrize(("says", "bos"), [({}, 1), ({"add_bos_token": False}, None), ({"add_bos_token": True}, 1)])
def test_the_settings_decide_what_the_file_leaves_open(says: dict[str, bool], bos: int | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(sentencepiece(), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    assert load_tokenizer(tmp_path).bos_id == bos


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: eos_token_id is 'x'"),
        ("config.json", {"eos_token_id": [-1]}, r"config.json: eos_token_id is \[-1\]"),
        ("generation_config.json", {"eos_token_id": 9999}, "9999 is not in the vocabulary"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is 'yes', not bool"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is neither"),
        ("tokenizer_config.json", {"chat_template": [{}]}, "an entry without name"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}, "added_tokens_decoder has 'x'"),
        ("added_tokens.json", {"x": "y"}, "added_tokens.json: 'x' is 'y'"),
    ],
)
def test_a_malformed_file_is_named_with_its_key(name: str, content: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level(), encoding="utf-8")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(tmp_path)
