"""Sessions and generation: however a text is read, forked, saved or batched, what follows is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import everstate
from everstate.core.errors import CheckpointError, DataError, RequestError
from everstate.engine import Sampling, Session, generate
from everstate.engine.runner import BLOCK
from everstate.models import LM, ModelConfig
from everstate.tokenizers import ByteTokenizer

CONFIG = ModelConfig(
    d_model=16,
    vocab_size=258,
    layout="mamba3 attn mamba2",
    mixers={
        "mamba3": {"type": "mamba3", "d_state": 8, "headdim": 8},
        "mamba2": {"type": "mamba2", "d_state": 8, "headdim": 8},
        "attn": {"type": "attention", "nheads": 2, "window": 16},
    },
)
BYTES = ByteTokenizer()
TEXT = "The quick brown fox jumps over the lazy dög. " * 30


@pytest.fixture(scope="module")
def model() -> LM:
    model = LM(CONFIG, dtype=torch.float64)
    with torch.no_grad():  # larger weights, so that the text depends on what was read
        model.embedding.weight.mul_(20)
    return model


def follow(session: Session, count: int = 12) -> list[int]:
    return list(session.write_tokens(count, Sampling(seed=5)))


def reading(model: LM, *texts: str) -> Session:
    session = Session(model, BYTES)
    for text in texts:
        session.read(text)
    return session


def test_text_read_in_parts_is_text_read_at_once(model: LM) -> None:
    assert len(TEXT) > 2 * BLOCK
    whole = reading(model, TEXT)
    parts = reading(model, TEXT[:1], TEXT[1:700], TEXT[700:])
    streamed = Session(model, BYTES)
    streamed.read_stream(TEXT.encode()[i : i + 7] for i in range(0, len(TEXT.encode()), 7))
    expected = follow(whole)
    assert follow(parts) == follow(streamed) == expected
    assert whole.tokens_read == parts.tokens_read == 1 + len(TEXT.encode()) + len(expected)


def test_different_texts_are_continued_differently(model: LM) -> None:
    assert follow(reading(model, "abc")) != follow(reading(model, "xbc"))


def test_a_fork_goes_its_own_way(model: LM) -> None:
    session = reading(model, "shared manual")
    fork, other = session.fork(), session.fork()
    other.read(" and more")
    assert follow(other) != follow(fork)
    assert follow(session) == follow(reading(model, "shared manual"))


def test_a_saved_session_resumes_as_if_never_stopped(model: LM, tmp_path: Path) -> None:
    session = reading(model, TEXT)
    follow(session, 3)
    session.save(tmp_path / "state")
    size = (tmp_path / "state").stat().st_size
    resumed = Session.load(tmp_path / "state", model, BYTES)
    assert resumed.tokens_read == session.tokens_read
    assert follow(resumed) == follow(session)
    reading(model, "x").save(tmp_path / "state")
    assert abs((tmp_path / "state").stat().st_size - size) < 64


def test_writing_in_parts_is_writing_at_once(model: LM, tmp_path: Path) -> None:
    whole = follow(reading(model, "abc"), 20)
    session = reading(model, "abc")
    first = follow(session, 7)
    session.save(tmp_path / "state")
    assert first + follow(Session.load(tmp_path / "state", model, BYTES), 13) == whole
    assert BYTES.decode(whole) == generate(model, BYTES, "abc", max_tokens=20, seed=5)


def test_a_read_that_fails_leaves_the_session_as_it_was(model: LM) -> None:
    session = reading(model, "abc")
    with pytest.raises(DataError, match="not UTF-8"):
        session.read_stream([b"x" * 2000, b"\xff"])
    assert session.tokens_read == 4
    assert follow(session) == follow(reading(model, "abc"))


def test_a_fresh_session_can_be_saved(model: LM, tmp_path: Path) -> None:
    Session(model, BYTES, context=20).save(tmp_path / "state")
    resumed = Session.load(tmp_path / "state", model, BYTES)
    with pytest.raises(RequestError, match="nothing was read yet"):
        follow(resumed)
    resumed.read("abc")
    assert follow(resumed) == follow(reading(model, "abc"))


def test_the_state_does_not_grow(model: LM) -> None:
    session = Session(model, BYTES)
    before = session.state_bytes
    session.read(TEXT * 3)
    assert session.state_bytes == before == everstate.cost(CONFIG, dtype=torch.float64).state_bytes


def test_states_that_do_not_belong_are_refused(model: LM, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(CheckpointError, match="does not exist"):
        Session.load(path, model, BYTES)
    reading(model, "abc").save(path)
    with pytest.raises(CheckpointError, match="state of another model"):
        Session.load(path, LM(CONFIG, seed=1, dtype=torch.float64), BYTES)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        Session.load(path, model, BYTES)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="altered"):
        Session.load(path, model, BYTES)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="no saved state"):
        Session.load(path, model, BYTES)
    assert load_file(path)["x"] == 1


def test_several_prompts_as_one_batch_are_each_as_if_alone(model: LM) -> None:
    prompts = ["a", TEXT, "something else", "a"]
    together = generate(model, BYTES, prompts, max_tokens=20, seed=4)
    assert together == [generate(model, BYTES, prompt, max_tokens=20, seed=4) for prompt in prompts]
    assert together[0] == together[3]
    assert len(set(together)) == 3


def test_a_row_that_ended_leaves_the_others_writing(model: LM) -> None:
    class Ends(ByteTokenizer):
        """Every byte below 128 ends a text, so rows end at different steps."""

        eos_ids = tuple(range(128))

    prompts = [chr(97 + i) for i in range(6)]
    together = generate(model, Ends(), prompts, max_tokens=30)
    assert together == [generate(model, Ends(), prompt, max_tokens=30) for prompt in prompts]
    assert len({len(text) for text in together}) > 1


def test_writing_streams_whole_characters(model: LM) -> None:
    session = reading(model, "ö")
    pieces = list(session.fork().write(40, Sampling(seed=1)))
    tokens = list(session.write_tokens(40, Sampling(seed=1)))
    assert "".join(pieces) == BYTES.decode(tokens)


def test_bad_requests(model: LM) -> None:
    with pytest.raises(RequestError, match="max_tokens is 0"):
        generate(model, BYTES, "x", max_tokens=0)
    with pytest.raises(RequestError, match="no prompt"):
        generate(model, BYTES, [])
    with pytest.raises(RequestError, match="temperature"):
        generate(model, BYTES, "x", temperature=-1.0)
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        Session(model, BYTES).read_tokens([])
    with pytest.raises(DataError, match="notes.txt is not UTF-8 at byte 1"):
        Session(model, BYTES).read_stream([b"a\xff"], name="notes.txt")
