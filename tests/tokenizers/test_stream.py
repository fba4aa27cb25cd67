"""Streams of tokens and of text, cut anywhere."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from everstate.core.errors import DataError
from everstate.tokenizers import ByteTokenizer, HFTokenizer, StreamDecoder, StreamEncoder, Tokenizer, encode_stream
from everstate.tokenizers.stream import LONGEST
from tests.tokenizers.published import TEXTS, byte_level, sentencepiece

BYTES = ByteTokenizer()
BPE = HFTokenizer(byte_level())
LLAMA3 = HFTokenizer(byte_level("llama"))
PIECES = HFTokenizer(sentencepiece())
ALL = [BYTES, BPE, LLAMA3, PIECES]
NAMES = ["bytes", "gpt2", "llama3", "sentencepiece"]

WORDS = st.lists(
    st.sampled_from([*" \n\t.,'!_1é日🙂", "he", "world", "it's", "  ", "\n\n", "2024", "état", "...\n"])
).map("".join)


def pieces(whole: Sequence[int], cuts: list[int]) -> Iterator[Sequence[int]]:
    """A sequence cut in pieces of these lengths, over and over."""
    start, turn = 0, 0
    while start < len(whole):
        length = max(cuts[turn % len(cuts)], 1) if cuts else 1
        yield whole[start : start + length]
        start, turn = start + length, turn + 1


def streamed(tokenizer: Tokenizer, ids: Sequence[int], cuts: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join(decoder.push(part) for part in pieces(ids, cuts)) + decoder.flush()


CUTS = st.lists(st.integers(1, 9), max_size=4)


@given(st.binary(), CUTS)
@example(b"\xf0\x9f\x98", [1])
@example(b"\xed\xa0\x80\xe3\x81", [1])
@example(b"\xf4\x90\x80\x80\xc0\xaf", [1])
def test_any_bytes_stream_as_they_decode(data: bytes, cuts: list[int]) -> None:
    assert streamed(BYTES, list(data), cuts) == BYTES.decode(data) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3)))
    assert streamed(tokenizer, ids, data.draw(CUTS)) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@given(text=st.text())
def test_a_stream_of_text_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    decoder, shown, ids = StreamDecoder(tokenizer), "", tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for token in ids:
        shown += decoder.push([token])
        assert whole.startswith(shown)
    assert decoder.flush() == ""


def test_a_character_comes_with_its_last_byte() -> None:
    decoder = StreamDecoder(BYTES)
    assert [decoder.push([byte]) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert (decoder.push(b"\xe3\x81"), decoder.flush(), decoder.flush()) == ("", "\ufffd", "")


def test_a_continued_stream_keeps_its_leading_space() -> None:
    ids = PIECES.encode("he")
    assert streamed(PIECES, ids, []) == "he"
    assert StreamDecoder(PIECES, continued=True).push(ids) == " he"
    decoder = StreamDecoder(PIECES)
    assert [decoder.push(part) for part in ([1], ids, ids)] == ["", "he", " he"]


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@given(text=WORDS, cuts=st.lists(st.integers(1, 300), max_size=4), filler=st.booleans())
def test_a_stream_is_encoded_as_the_whole(tokenizer: Tokenizer, text: str, cuts: list[int], filler: bool) -> None:
    text = (text + TEXTS[0] + text + TEXTS[2] + text) if filler else text
    data = text.encode()
    whole = tokenizer.encode(text)
    for chunks in (pieces(data, cuts), pieces(text, cuts), [text], [data]):
        assert [token for ids in encode_stream(tokenizer, chunks) for token in ids] == whole


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_a_stream_gives_tokens_before_it_ends(tokenizer: Tokenizer) -> None:
    encoder = StreamEncoder(tokenizer)
    first = encoder.push(TEXTS[0].encode() * 4)
    assert len(tokenizer.decode(first)) > len(TEXTS[0])
    assert first + encoder.flush() == tokenizer.encode(TEXTS[0] * 4)
    assert encoder.flush() == []


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_a_word_without_end_is_cut_and_keeps_its_text(tokenizer: Tokenizer) -> None:
    text = "wo" * (LONGEST // 2 + 20_000)
    found = list(encode_stream(tokenizer, pieces(text, [10_000])))
    assert len(found) > 1
    assert tokenizer.decode(token for ids in found for token in ids) == text


def test_special_tokens_are_not_cut() -> None:
    for tokenizer, text in ((BYTES, "a<|eos|>b<|bos|><|e"), (BPE, "a <|end of text|>b" * 20)):
        whole = tokenizer.encode(text, special=True)
        for length in (1, 2, 5, 40):
            found = encode_stream(tokenizer, pieces(text, [length]), special=True)
            assert [token for ids in found for token in ids] == whole


@pytest.mark.parametrize("length", [1, 2, 3, 100])
def test_bytes_that_are_no_text_are_named(length: int) -> None:
    data = b"h\xc3\xa9llo \xff"
    with pytest.raises(
        DataError, match=r"^notes\.txt is not UTF-8 at byte 7 \(invalid start byte\); save it as UTF-8$"
    ):
        list(encode_stream(BYTES, pieces(data, [length]), name="notes.txt"))
    with pytest.raises(DataError, match="not UTF-8 at byte 5"):
        list(encode_stream(BYTES, pieces(b"hello\xf0\x9f", [length])))
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        list(encode_stream(BYTES, [b"\xf0\x9f", "text"]))


def test_memory_does_not_grow() -> None:
    chunk = TEXTS[2].encode()

    def peak(chunks: int) -> int:
        decoder = StreamDecoder(BPE, continued=True)
        tracemalloc.start()
        for ids in encode_stream(BPE, (chunk for _ in range(chunks))):
            decoder.push(ids)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(20)
    assert peak(400) < peak(100) + 20_000
