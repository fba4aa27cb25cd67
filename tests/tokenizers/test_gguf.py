"""Tokenizers of GGUF files, against the tokenizer that the fields were taken from."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from everstate.core.errors import TokenizerError
from everstate.tokenizers import tokenizer_of_gguf
from everstate.tokenizers.gguf import WORDS
from tests.tokenizers.published import byte_level, sentencepiece


def fields(text: str, **changes: Any) -> dict[str, Any]:
    table = json.loads(text)
    names = {token: name for name, token in table["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, 1)
    for entry in table["added_tokens"]:
        names[entry["id"]], kinds[entry["id"]] = entry["content"], 3 if entry["special"] else 4
    tokens = [names[token] for token in range(len(names))]
    found: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [kinds[token] for token in range(len(names))],
        "merges": [" ".join(pair) for pair in table["model"]["merges"]],
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**found, **changes}.items() if value is not None}


@pytest.mark.parametrize(("words", "pre"), [("gpt2", "gpt-2"), ("llama", "dbrx")])
@given(text=st.text())
def test_byte_level_ids_are_those_of_the_original(words: str, pre: str, text: str) -> None:
    library = Library.from_str(byte_level(words))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    tokenizer = tokenizer_of_gguf(fields(byte_level(words), pre=pre))
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(alphabet=" hewolrdé\n日"))
def test_sentencepiece_ids_are_those_of_the_original(text: str) -> None:
    original = json.loads(sentencepiece())
    merged = ["".join(pair) for pair in original["model"]["merges"]]
    given_fields = fields(sentencepiece(), model="llama", pre=None, bos_token_id=1, eos_token_id=2)
    tokens = given_fields["tokenizer.ggml.tokens"]
    scores = [-float(merged.index(token)) if token in merged else -1e6 for token in tokens]
    tokenizer = tokenizer_of_gguf({**given_fields, "tokenizer.ggml.scores": scores, "tokenizer.chat_template": "x"})
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.encode(text) == Library.from_str(sentencepiece()).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", WORDS)
def test_every_pre_tokenizer_is_one(pre: str) -> None:
    tokenizer = tokenizer_of_gguf(fields(byte_level(), pre=pre, bos_token_id=0))
    text = "Hello, It's 12345 été  日本語\n\n `a+b` $5"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos_id == (0 if WORDS[pre].bos else None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "bloom"}, "tokenizer.ggml.pre is 'bloom', which is not supported"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"eos_token_id": 10_000}, "tokenizer.ggml.eos_token_id is 10000"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"merges": ["a"]}, "merges: entry 0 is not two tokens"),
        ({"tokens": ["a", "a"], "token_type": None}, "holds 'a' twice"),
    ],
)
def test_fields_that_do_not_fit_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        tokenizer_of_gguf(fields(byte_level(), **changes))
    assert words in str(caught.value)
