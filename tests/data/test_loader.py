"""Batches: every token once, no document meets another, and a resumed loader goes on where the other was."""

from __future__ import annotations

import json
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from everstate.core.errors import ConfigError, DataError
from everstate.core.state import detach
from everstate.data import Batch, Document, Documents, Loader, Texts, byte_lengths, bytes_in
from everstate.data.pack import document_tokens
from everstate.mixers import build_mixer
from everstate.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer
from tests.tokenizers.published import TEXTS, byte_level

BYTES = ByteTokenizer()
TOKENIZERS = [BYTES, HFTokenizer(byte_level(), eos_ids=(1,)), HFTokenizer(byte_level())]

LENGTHS = [byte_lengths(tokenizer) for tokenizer in TOKENIZERS]

CORPORA = st.lists(st.text(max_size=30), min_size=1, max_size=8)
SHAPES = st.fixed_dictionaries(
    {
        "lanes": st.integers(1, 5),
        "seq_len": st.integers(1, 12),
        "parts": st.integers(1, 3),
        "seed": st.none() | st.integers(0, 9),
    }
)


def corpus(texts: list[str]) -> Texts:
    return Texts([Document(str(i), text) for i, text in enumerate(texts)])


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("tokens", "targets", "continues", "last")]
    return one.packing == other.packing and all(torch.equal(a, b) for a, b in pairs)


def streams(batches: list[Batch]) -> list[list[int]]:
    """What was read from each fresh state on, in tokens, and last of all the token that ended it."""
    open_lanes: dict[int, list[int]] = {}
    found = []
    for batch in batches:
        assert batch.tokens.shape == batch.targets.shape == (1, batch.packing.total)
        now: dict[int, list[int]] = {}
        for i, (cut, lane) in enumerate(zip(batch.packing.slices(), batch.continues.tolist(), strict=True)):
            tokens, targets = batch.tokens[0, cut].tolist(), batch.targets[0, cut].tolist()
            assert tokens[1:] == targets[:-1]
            if lane < 0:
                stream = [tokens[0]]
                found.append(stream)
            else:
                stream = open_lanes.pop(lane)
                assert stream[-1] == tokens[0]
            stream += targets
            if i in batch.last.tolist():
                now[batch.last.tolist().index(i)] = stream
        open_lanes = now
    return found


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bos and eos", "eos", "neither"])
@given(texts=CORPORA, shape=SHAPES)
def test_every_document_is_read_once_in_an_epoch(tokenizer: Tokenizer, texts: list[str], shape: dict[str, int]) -> None:
    expected = [document_tokens(tokenizer, text).tolist() for text in texts]
    expected = [tokens for tokens in expected if len(tokens) > 1]
    loader = Loader(corpus(texts), tokenizer, epochs=1, **shape)
    if not expected:
        with pytest.raises(DataError, match="has no text"):
            next(loader)
        return
    batches, lengths = list(loader), LENGTHS[TOKENIZERS.index(tokenizer)]
    found = streams(batches)
    if shape["parts"] == 1:
        assert sorted(found) == sorted(expected)
    pairs = sorted(pair for tokens in found for pair in pairwise(tokens))
    assert pairs == sorted(pair for tokens in expected for pair in pairwise(tokens))
    assert all(batch.packing.total <= shape["lanes"] * shape["seq_len"] for batch in batches)
    assert sum(bytes_in(batch.targets, lengths) for batch in batches) == sum(
        len(tokenizer.decode_bytes(tokens[1:])) for tokens in expected
    )


@given(texts=CORPORA, shape=SHAPES, epochs=st.none() | st.integers(1, 3), before=st.integers(0, 12))
def test_a_resumed_loader_goes_on_exactly(
    texts: list[str], shape: dict[str, int], epochs: int | None, before: int
) -> None:
    if epochs is None:
        shape["lanes"] = min(shape["lanes"], len(texts))

    def make() -> Loader:
        return Loader(corpus(texts), BYTES, epochs=epochs, **shape)

    first = make()
    read = list(islice(first, before))
    assert all(same(a, b) for a, b in zip(read, islice(make(), before), strict=True))
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.state_dict() == first.state_dict()
    rest = list(islice(first, 20))
    again = list(islice(resumed, 20))
    assert len(rest) == len(again)
    assert all(same(a, b) for a, b in zip(rest, again, strict=True))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bos and eos", "eos", "neither"])
def test_a_long_document_has_the_tokens_of_its_whole_text(tokenizer: Tokenizer) -> None:
    text = " ".join(TEXTS) * 600
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert document_tokens(tokenizer, text).tolist() == [*begin, *tokenizer.encode(text), *tokenizer.eos_ids]


def test_a_batch_in_full() -> None:
    loader = Loader(corpus(["abcd", "x", "yz"]), BYTES, lanes=2, seq_len=4, epochs=1)
    bos, eos = 256, 257
    first, second = loader
    assert first.tokens.tolist() == [[bos, *b"abc", bos, ord("x"), bos, ord("y")]]
    assert first.targets.tolist() == [[*b"abcd", ord("x"), eos, *b"yz"]]
    assert first.packing.lengths == (4, 2, 2)
    assert (first.continues.tolist(), first.last.tolist()) == ([-1, -1, -1], [0, 2])
    assert (second.tokens.tolist(), second.targets.tolist()) == ([[*b"dz"]], [[eos, eos]])
    assert second.packing.lengths == (1, 1)
    assert (second.continues.tolist(), second.last.tolist()) == ([0, 1], [0, 1])


def test_lanes_end_at_different_places() -> None:
    batches = list(Loader(corpus(["abcdefg", "x"]), BYTES, lanes=3, seq_len=2, epochs=1))
    assert [batch.last.tolist() for batch in batches] == [[0, 1, -1], [0, -1, -1], [0, -1, -1], [0, -1, -1]]


def test_epochs_are_shuffled_anew_and_alike_for_one_seed() -> None:
    texts = [chr(65 + i) for i in range(20)]

    def order(seed: int | None) -> str:
        batches = islice(Loader(corpus(texts), BYTES, lanes=1, seq_len=2, seed=seed), 40)
        return "".join(BYTES.decode(batch.targets[0].tolist()) for batch in batches)

    assert order(None) == "".join(texts) * 2
    assert sorted(order(1)[:20]) == sorted(order(1)[20:]) == texts
    assert order(1) == order(1)
    assert len({order(1)[:20], order(1)[20:], order(2)[:20], order(2)[20:], "".join(texts)}) == 5


def run(texts: list[str], lanes: int, seq_len: int) -> dict[str, Tensor]:
    """What a Mamba-2 layer makes of each document (by its first letter) when lanes carry the state on."""
    mixer = build_mixer({"type": "mamba2", "d_state": 4, "headdim": 4}, 4, dtype=torch.float64)
    table = torch.randn(258, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    carry = mixer.init_state(lanes)
    outputs: dict[str, list[Tensor]] = {}
    reading = [""] * lanes
    for batch in Loader(corpus(texts), BYTES, lanes=lanes, seq_len=seq_len, epochs=1):
        state = batch.first_states(carry, mixer.init_state(len(batch.packing)))
        y, final = mixer(table[batch.tokens], state, batch.packing)
        carry = detach(batch.last_states(final))
        names = []
        for cut, lane in zip(batch.packing.slices(), batch.continues.tolist(), strict=True):
            names.append(chr(batch.targets[0, cut.start]) if lane < 0 else reading[lane])
            outputs.setdefault(names[-1], []).append(y[0, cut])
        reading = [names[last] for last in batch.last.tolist()]
    return {name: torch.cat(parts) for name, parts in outputs.items()}


@pytest.mark.parametrize(("lanes", "seq_len"), [(1, 7), (2, 5), (3, 1), (3, 64)])
def test_lanes_carry_the_state_and_documents_do_not_meet(lanes: int, seq_len: int) -> None:
    texts = ["a long document that goes on", "b short", "c", "d another one of some length"]
    together = run(texts, lanes, seq_len)
    assert set(together) == set("abcd")
    for text in texts:
        alone = run([text], 1, 1000)[text[0]]
        assert len(alone) == len(text) + 1
        torch.testing.assert_close(together[text[0]], alone, rtol=1e-10, atol=1e-12)
    changed = run([texts[0], "b SHORT", *texts[2:]], lanes, seq_len)
    assert not torch.equal(changed["b"], together["b"])
    assert all(torch.equal(changed[name], together[name]) for name in "acd")


def test_the_gradient_goes_through_the_carry() -> None:
    batch = list(Loader(corpus(["abcdef"]), BYTES, lanes=1, seq_len=4, epochs=1))[1]
    carry = (torch.ones(1, 2, requires_grad=True),)
    (state,) = batch.first_states(carry, (torch.zeros(1, 2),))
    state.sum().backward()
    assert torch.equal(state, torch.ones(1, 2))
    assert carry[0].grad is not None
    assert torch.equal(carry[0].grad, torch.ones(1, 2))


def test_bytes_are_counted_for_bits_per_byte() -> None:
    lengths = byte_lengths(BYTES)
    assert bytes_in(torch.tensor([[97, 256, 255], [257, -100, -1]]), lengths) == 2
    bpe = TOKENIZERS[1]
    text = TEXTS[2]
    batches = list(Loader(corpus([text]), BYTES, lanes=1, seq_len=8, epochs=1))
    assert sum(bytes_in(batch.targets, lengths) for batch in batches) == len(text.encode())
    assert bytes_in(torch.tensor(bpe.encode(text)), byte_lengths(bpe)) == len(text.encode())


def test_a_batch_moves() -> None:
    batch = next(Loader(corpus(["abc"]), BYTES, lanes=1, seq_len=2))
    moved = batch.to("meta")
    assert all(t.is_meta for t in (moved.tokens, moved.targets, moved.continues, moved.last))
    assert moved.packing is batch.packing


class Changing(Documents):
    """A corpus whose document grows each time that it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "log.txt"

    def read(self, index: int) -> str:
        self.reads += 1
        return "abc" * self.reads


def test_what_cannot_be_resumed_is_refused() -> None:
    texts = corpus(["abc", "def"])
    saved = Loader(texts, BYTES, lanes=2, seq_len=2, seed=1)
    next(saved)
    state = saved.state_dict()
    with pytest.raises(DataError, match="cannot resume with lanes = 1: the run was saved with 2; give that"):
        Loader(texts, BYTES, lanes=1, seq_len=2, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="seed = None"):
        Loader(texts, BYTES, lanes=2, seq_len=2).load_state_dict(state)
    with pytest.raises(DataError, match="documents = 3"):
        Loader(corpus(["a", "b", "c"]), BYTES, lanes=2, seq_len=2, seed=1).load_state_dict(state)
    changing = Changing()
    growing = Loader(changing, BYTES, lanes=1, seq_len=2)
    next(growing)
    with pytest.raises(DataError, match=r"cannot resume: log\.txt is no longer what it was when saved"):
        Loader(changing, BYTES, lanes=1, seq_len=2).load_state_dict(growing.state_dict())


def test_settings_that_make_no_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len = 0 makes no batch; give at least 1"):
        Loader(corpus(["a"]), BYTES, lanes=1, seq_len=0)
    with pytest.raises(ConfigError, match=r"8 lanes cannot share 3 documents in 1 parts; .* or parts = 3"):
        Loader(corpus(["a", "b", "c"]), BYTES, lanes=8, seq_len=4)
    with pytest.raises(DataError, match="corpus of 0 documents has no text"):
        next(Loader(corpus([]), BYTES, lanes=1, seq_len=4))
