"""Bits per byte."""

from __future__ import annotations

import math

import pytest
import torch

from everstate.data import Document, Loader, Texts
from everstate.models import LM, ModelConfig
from everstate.tokenizers import ByteTokenizer
from everstate.train import DataRecipe
from everstate.train.evaluate import HeldOut
from everstate.train.lanes import segment_loss

from .conftest import SSM

TEXTS = ("one two three four five six", "ünï", "and so it goes on and on and on")
DOCUMENTS = Texts([Document(str(i), text) for i, text in enumerate(TEXTS)])
BYTES = sum(len(text.encode()) for text in TEXTS)


def model() -> LM:
    return LM(ModelConfig(d_model=16, vocab_size=258, layout="ssm", mixers={"ssm": SSM}), dtype=torch.float64)


def bits(model: LM, *, limit: int = 10_000, passing: bool = True, seq_len: int = 7) -> float:
    data = DataRecipe(path="unused", lanes=2, seq_len=seq_len)
    return HeldOut(DOCUMENTS, ByteTokenizer(), data, passing=passing, limit=limit).bits_per_byte(model)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary() -> None:
    """For each byte and for the end of each document; ü and ï are two bytes each."""
    ignorant = model()
    torch.nn.init.zeros_(ignorant.embedding.weight)
    assert bits(ignorant) == pytest.approx(math.log2(258) * (BYTES + len(TEXTS)) / BYTES, rel=1e-12)


def test_it_is_the_loss_of_whole_documents_when_states_are_carried() -> None:
    some = model()
    nats = 0.0
    for text in TEXTS:
        (batch,) = Loader(Texts([Document("", text)]), ByteTokenizer(), lanes=1, seq_len=100, epochs=1)
        nats += segment_loss(some, batch, some.init_state(1))[0].item()
    assert bits(some) == pytest.approx(nats / math.log(2) / BYTES, rel=1e-12)
    assert bits(some, passing=False) != pytest.approx(bits(some), rel=1e-6)


def test_the_limit_is_rounded_up_to_a_batch() -> None:
    some = model()
    (first, *_) = Loader(DOCUMENTS, ByteTokenizer(), lanes=2, seq_len=7, epochs=1)
    loss, _ = segment_loss(some, first, some.init_state(len(first.packing)))
    read = int((first.targets < 256).sum())
    assert bits(some, limit=1) == pytest.approx(loss.item() / math.log(2) / read, rel=1e-12)
