"""Tokenizers to folders and back, ours and published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everstate.core.errors import TokenizerError
from everstate.tokenizers import ByteTokenizer, ChatTemplate, HFTokenizer, Tokenizer, load_tokenizer, save_tokenizer
from tests.tokenizers.published import TEXTS, byte_level, sentencepiece

CHAT = ChatTemplate("{{ bos_token }}{{ messages[0].content }}\r\n", {"bos_token": "<s>"})

TOKENIZERS: list[Tokenizer] = [
    ByteTokenizer(),
    ByteTokenizer(CHAT),
    HFTokenizer(byte_level(), eos_ids=(1, 5)),
    HFTokenizer(sentencepiece(), bos_id=1, eos_ids=(2,), chat=CHAT),
]


def publish(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    assert type(loaded) is type(tokenizer)
    for name in ("vocab_size", "bos_id", "eos_ids", "leading", "chat"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.files() == tokenizer.files()
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_saving_over_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    for tokenizer in reversed(TOKENIZERS):
        save_tokenizer(tokenizer, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == set(tokenizer.files())
        assert load_tokenizer(tmp_path).files() == tokenizer.files()


def test_a_published_folder(tmp_path: Path) -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "unk_token": None,
        "chat_template": "old {{ eos_token }}",
    }
    publish(tmp_path, tokenizer__json=sentencepiece(), tokenizer_config__json=config)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.chat == ChatTemplate("old {{ eos_token }}", {"bos_token": "<s>", "eos_token": "</s>"})
    publish(tmp_path, generation_config__json={"eos_token_id": [5, 2]}, chat_template__jinja="new")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (2, 5)
    assert tokenizer.chat is not None
    assert tokenizer.chat.source == "new"


def test_a_published_folder_may_say_whether_texts_begin_with_a_token(tmp_path: Path) -> None:
    publish(tmp_path, tokenizer__json=byte_level())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat) == (None, (), None)
    publish(tmp_path, tokenizer_config__json={"bos_token": "<|bos|>", "add_bos_token": True})
    assert load_tokenizer(tmp_path).bos_id == 0


def test_named_templates_give_the_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    publish(tmp_path, tokenizer__json=byte_level(), tokenizer_config__json={"chat_template": named})
    chat = load_tokenizer(tmp_path).chat
    assert chat is not None
    assert chat.source == "plain"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no tokenizer; give a folder with tokenizer.toml or tokenizer.json"),
        ({"tokenizer__toml": "type = 'byte'"}, "did you mean 'bytes'? Allowed: bytes, hf, sentencepiece, tiktoken"),
        ({"tokenizer__toml": "type = 'bytes'\nbos_id = 1"}, "unknown key 'bos_id'"),
        ({"tokenizer__toml": "type = "}, "is not TOML"),
        ({"tokenizer__toml": "type = 'hf'"}, "tokenizer.json: No such file or directory; restore the file"),
        ({"tokenizer__json": "{"}, "cannot be read by tokenizers"),
        ({"tokenizer__json": byte_level(), "tokenizer_config__json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer__json": byte_level(), "tokenizer_config__json": "[]"}, "holds no table of settings"),
        ({"tokenizer__json": byte_level(), "chat_template__jinja": "{{"}, "not Jinja at line 1"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(files: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(publish(tmp_path, **files))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not UTF-8 at byte 1"):
        load_tokenizer(tmp_path)
