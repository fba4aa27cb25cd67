"""Bytes as tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstate.core.errors import TokenizerError
from everstate.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


def test_the_vocabulary() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_id, TOKENIZER.eos_ids) == (258, 256, (257,))
    assert TOKENIZER.encode("aé") == [97, 0xC3, 0xA9]
    assert [TOKENIZER.token_bytes(token) for token in (0, 255, 256, 257, 258, -1)] == [
        b"\0",
        b"\xff",
        b"",
        b"",
        b"",
        b"",
    ]


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert sum(len(TOKENIZER.token_bytes(token)) for token in ids) == len(text.encode())


@given(st.binary())
def test_any_bytes_come_back(data: bytes) -> None:
    assert TOKENIZER.decode_bytes(TOKENIZER.encode_bytes(data)) == data
    assert TOKENIZER.decode([256, *data, 257]) == data.decode("utf-8", "replace")


def test_names_of_special_tokens_are_text_unless_asked_for() -> None:
    text = "<|bos|>a<|eos|><|eos"
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode(text, special=True) == [256, 97, 257, *b"<|eos"]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800 at character 1.*read it so"):
        TOKENIZER.encode("a\ud800")
