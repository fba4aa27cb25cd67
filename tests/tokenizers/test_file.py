"""SentencePiece and tiktoken files, against the libraries that they are for."""

from __future__ import annotations

import base64
import io
import json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstate.core.errors import TokenizerError
from everstate.tokenizers import PieceTokenizer, RankTokenizer, load_tokenizer, save_tokenizer
from everstate.tokenizers.published import PATTERNS
from tests.tokenizers.published import TEXTS

sentencepiece = pytest.importorskip("sentencepiece")
tiktoken = pytest.importorskip("tiktoken")

TEXT = st.text() | st.lists(
    st.sampled_from(["hello", " ", "  ", "\n", "日本語", "🙂", "It's", "<s>", "2024", "é"])
).map("".join)
KIMI = PATTERNS["tokenization_kimi"]


@lru_cache
def pieces(kind: str) -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS * 20 for line in text.splitlines() if line]),
        model_writer=file,
        model_type=kind,
        vocab_size=340,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return file.getvalue()


def ranks() -> bytes:
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello", b" h", b" w", "日".encode()[:2]]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@given(text=TEXT)
def test_pieces_are_those_of_the_library(kind: str, text: str) -> None:
    library, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=pieces(kind)), PieceTokenizer(pieces(kind))
    ids = tokenizer.encode(text)
    assert ids == library.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode("he") + tokenizer.encode(text, continued=True)) == "he" + text.replace(
        "▁", " "
    )


@given(text=TEXT)
def test_ranks_are_those_of_the_library(text: str) -> None:
    tokenizer = RankTokenizer(ranks(), KIMI, special={"<s>": 263, "[EOS]": 264}, added={"<think>": 265})
    known = {token: rank for rank, token in ((rank, tokenizer.token_bytes(rank)) for rank in range(263))}
    library = tiktoken.Encoding("x", pat_str=KIMI, mergeable_ranks=known, special_tokens={"<s>": 263})
    assert tokenizer.encode(text) == library.encode_ordinary(text)
    assert tokenizer.encode(text, special=True) == library.encode(text, allowed_special="all")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_and_added_tokens() -> None:
    tokenizer = RankTokenizer(ranks(), KIMI, special={"<s>": 263}, added={"<think>": 265})
    assert tokenizer.encode("<s>a<think>", special=True) == [263, 97, 265]
    assert 263 not in tokenizer.encode("<s>")
    assert (tokenizer.token_bytes(263), tokenizer.token_bytes(264), tokenizer.token_bytes(265)) == (
        b"",
        b"",
        b"<think>",
    )
    piece = PieceTokenizer(pieces("bpe"))
    assert piece.encode("<s>hello", special=True)[0] == 1
    assert 1 not in piece.encode("<s>hello")


@pytest.mark.parametrize("tokenizer", ["pieces", "ranks"])
def test_published_saved_and_loaded(tokenizer: str, tmp_path: Path) -> None:
    config: dict[str, object] = {
        "added_tokens_decoder": {"500": {"content": "<|im_end|>", "special": True}},
        "eos_token": "<|im_end|>",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [600, 7]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "vocab_size": 640}')
    name, data = ("tokenizer.model.v3", pieces("bpe")) if tokenizer == "pieces" else ("tiktoken.model", ranks())
    (tmp_path / name).write_bytes(data)
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_ids) == (1 if tokenizer == "pieces" else None, (500, 600, 7, 2))
    assert found.vocab_size == 501
    assert found.chat is not None
    assert (found.chat.render([]), found.chat.render([], tools=[{"name": "f"}])) == ("d", "t")
    save_tokenizer(found, tmp_path / "own")
    again = load_tokenizer(tmp_path / "own")
    assert again.files() == found.files()
    assert [again.encode(text) for text in TEXTS] == [found.encode(text) for text in TEXTS]
    place = again.safe_cut(TEXTS[0] * 4)
    parts = again.encode((TEXTS[0] * 4)[:place]) + again.encode((TEXTS[0] * 4)[place:], continued=True)
    assert place > 0 and parts == again.encode(TEXTS[0] * 4)


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_bytes(ranks())
    with pytest.raises(TokenizerError, match="does not say how words are cut.*pat_str"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pat_str": "("}')
    with pytest.raises(TokenizerError, match="cannot be used"):
        load_tokenizer(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"?? 1\n")
    with pytest.raises(TokenizerError, match="line 1 is not a token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path)
