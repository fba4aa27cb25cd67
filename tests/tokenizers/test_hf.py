"""Tokenizers from a `tokenizer.json`, against the library that it is for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders

from everstate.core.errors import TokenizerError
from everstate.tokenizers import HFTokenizer
from tests.tokenizers.published import BOS, EOS, TEXTS, byte_level, sentencepiece

BPE = HFTokenizer(byte_level(), bos_id=0, eos_ids=(1,))
LIBRARY = Library.from_str(byte_level())
LIBRARY.no_truncation()
LIBRARY.no_padding()

SPACES = ("prepend", "metaspace", "none")
PIECES = {spaces: HFTokenizer(sentencepiece(spaces), bos_id=1, eos_ids=(2,)) for spaces in SPACES}
LIBRARIES = {spaces: Library.from_str(sentencepiece(spaces)) for spaces in SPACES}


@given(st.text())
def test_byte_level_text_comes_back_with_the_tokens_of_the_library(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    if EOS not in text and BOS not in text:
        assert ids == LIBRARY.encode(text, add_special_tokens=False).ids


@given(st.lists(st.integers(0, BPE.vocab_size + 5)))
def test_byte_level_decodes_any_tokens_as_the_library_does(ids: list[int]) -> None:
    assert BPE.decode(ids) == LIBRARY.decode(ids)
    assert BPE.decode_bytes(ids) == b"".join(BPE.token_bytes(token) for token in ids)


@pytest.mark.parametrize("spaces", ["prepend", "none"])
@given(text=st.text(alphabet=" he\nwo日ü▁0"))
def test_sentencepiece_decodes_as_the_library_does(spaces: str, text: str) -> None:
    ids = PIECES[spaces].encode(text)
    assert PIECES[spaces].decode(ids) == LIBRARIES[spaces].decode(ids)
    assert PIECES[spaces].decode(ids) == text.replace("▁", " ")


@given(st.text(alphabet=" hewo"))
def test_metaspace_decodes_as_the_library_does(text: str) -> None:
    ids = PIECES["metaspace"].encode("h" + text)
    assert PIECES["metaspace"].decode(ids) == LIBRARIES["metaspace"].decode(ids) == "h" + text


@pytest.mark.parametrize("spaces", PIECES)
@given(text=st.text(alphabet=" hewo"))
def test_a_continued_text_has_no_space_in_front(spaces: str, text: str) -> None:
    tokenizer = PIECES[spaces]
    assert tokenizer.decode(tokenizer.encode("he") + tokenizer.encode(text, continued=True)) == "he" + text


def test_truncation_and_padding_are_off() -> None:
    assert len(BPE.encode("a b c d e f g h i j k")) > 8
    assert len(BPE.encode("a")) == 1


def test_names_of_special_tokens_are_text_unless_asked_for() -> None:
    text = f"a{EOS}b"
    assert BPE.decode(BPE.encode(text)) == text
    assert 1 not in BPE.encode(text)
    assert BPE.encode(text, special=True) == [*BPE.encode("a"), 1, *BPE.encode("b")]
    assert BPE.decode(BPE.encode(text, special=True)) == "ab"
    assert BPE.decode(BPE.encode("<think>")) == "<think>"
    assert len(BPE.encode("<think>")) == 1
    assert BPE.token_bytes(BPE.encode("<no thought é日>")[0]).decode() == "<no thought é日>"


def test_what_the_file_puts_in_front_is_known() -> None:
    assert BPE.starts_with() is None
    assert PIECES["prepend"].starts_with() == 1


@pytest.mark.parametrize("text", TEXTS)
def test_a_safe_cut_is_one(text: str) -> None:
    for tokenizer in (BPE, HFTokenizer(byte_level("llama")), *PIECES.values()):
        long = text * 3
        place = tokenizer.safe_cut(long)
        assert 0 < place <= len(long) - 64
        assert tokenizer.encode(long[:place]) + tokenizer.encode(long[place:], continued=True) == tokenizer.encode(long)


def test_a_cut_that_changes_tokens_is_not_made() -> None:
    table = json.loads(sentencepiece("none"))
    table["model"]["vocab"]["e▁w"] = len(table["model"]["vocab"])
    table["model"]["merges"] = [["▁", "w"], ["e", "▁w"]]
    tokenizer = HFTokenizer(json.dumps(table))
    text = "hee war " * 30
    assert text[: tokenizer.safe_cut(text)].endswith("war")
    assert tokenizer.safe_cut("e w" * 100) == 0


def test_what_cannot_be_used_is_refused() -> None:
    table = json.loads(byte_level())
    with pytest.raises(TokenizerError, match=r"cannot be read by tokenizers .* download it again"):
        HFTokenizer("{")
    with pytest.raises(TokenizerError, match="cannot be read by tokenizers"):
        HFTokenizer("[]")
    with pytest.raises(TokenizerError, match=r"decoder that is not supported: WordPiece; use"):
        HFTokenizer(json.dumps({**table, "decoder": json.loads(decoders.WordPiece().__getstate__())}))
    with pytest.raises(TokenizerError, match="not supported: none"):
        HFTokenizer(json.dumps({**table, "decoder": None}))
    with pytest.raises(TokenizerError, match=r"token 5000 is not in the vocabulary; give an id below 398"):
        HFTokenizer(byte_level(), eos_ids=(5000,))
    with pytest.raises(TokenizerError, match="lone surrogate"):
        BPE.encode("\ud800")
