"""Published checkpoints beside the checkout, if there are any, give the logits expected of them in every mode."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from everstate.checkpoints import export, load_model
from everstate.checkpoints.families.describe import differences
from everstate.checkpoints.published import open_published
from everstate.checkpoints.reader import read_whole
from everstate.core.packing import Packing
from everstate.engine.snapshots import Snapshot, load_snapshot, save_snapshot
from everstate.models import LM

FOLDER = Path(__file__).parents[3] / "shared" / "parity"
LEFT_OUT = ("zamba", "rwkv", "xlstm", "minimax", "bailing_hybrid", "lfm3")
"""Model types that we do not read; docs/decisions says why."""
TOLERANCE = 2e-4


def cases() -> list[str]:
    found = [path.name for path in sorted(FOLDER.glob("*")) if (path / "expected.safetensors").exists()]
    return [name for name in found if not name.startswith(LEFT_OUT)] or ["none"]


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> Path:
    folder = FOLDER / str(request.param)
    if not folder.is_dir():
        pytest.skip(f"{FOLDER} is not there")
    return folder


def expected(case: Path) -> tuple[Tensor, Tensor, Tensor]:
    tensors = load_file(case / "expected.safetensors")
    logits = tensors.get("logits_noclamp", tensors["logits"])
    return tensors["input_ids"], logits, tensors["greedy_ids"]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.fixture
def model(case: Path) -> LM:
    return load_model(case).eval().requires_grad_(False)


def test_one_forward(case: Path, model: LM) -> None:
    tokens, logits, _ = expected(case)
    got, _ = model(tokens, model.init_state(2, context=64))
    close(got, logits)


@pytest.mark.parametrize("cuts", [[1], [2, 3], [5, 6, 13], [20]], ids=str)
def test_chunks(case: Path, model: LM, cuts: list[int]) -> None:
    tokens, logits, _ = expected(case)
    state, got = model.init_state(2, context=64), []
    for part in tokens.tensor_split(cuts, 1):
        y, state = model(part, state)
        got.append(y)
    close(torch.cat(got, 1), logits)


def test_token_by_token(case: Path, model: LM) -> None:
    tokens, logits, _ = expected(case)
    state = model.init_state(2, context=64)
    close(torch.stack([model.step_(tokens[:, i], state) for i in range(tokens.shape[1])], 1), logits)


def test_packed_with_other_sequences(case: Path, model: LM) -> None:
    tokens, logits, _ = expected(case)
    lengths = [7, 21, 1, 21]
    row = torch.cat([tokens[1, :7], tokens[0], tokens[0, :1], tokens[1]]).unsqueeze(0)
    got, _ = model(row, model.init_state(4, context=64), Packing.of_lengths(lengths))
    close(torch.stack([got[0, 7:28], got[0, 29:50]]), logits)


def test_restored_from_a_saved_state(case: Path, model: LM, tmp_path: Path) -> None:
    tokens, logits, _ = expected(case)
    first, state = model(tokens[:1, :11], model.init_state(1, context=64))
    save_snapshot(tmp_path / "state", model, Snapshot(state, 64, first[0, -1], 11))
    restored = load_snapshot(tmp_path / "state", load_model(case))
    rest, _ = model(tokens[:1, 11:], restored.state)
    close(torch.cat([first, rest], 1), logits[:1])


def test_greedy_tokens(case: Path, model: LM) -> None:
    tokens, _, greedy = expected(case)
    logits, state = model(tokens, model.init_state(2, context=64))
    token, written = logits[:, -1].argmax(-1), []
    for _ in range(greedy.shape[1]):
        written.append(token)
        token = model.step_(token, state).argmax(-1)
    assert torch.equal(torch.stack(written, 1), greedy)


def test_both_dialects_say_the_same(case: Path, model: LM, tmp_path: Path) -> None:
    if not (case / "config_hf5.json").exists():
        pytest.skip("published in one dialect")
    shutil.copytree(case, tmp_path / "model")
    shutil.copy(case / "config_hf5.json", tmp_path / "model" / "config.json")
    other = load_model(tmp_path / "model")
    # The dialect of transformers 5 says outright what the older one leaves to the reader.
    assert differences(model.config, other.config) == []


def test_exported_it_is_the_published_one(case: Path, model: LM, tmp_path: Path) -> None:
    published = open_published(case)
    export(model, tmp_path / "model", published.family.name)
    back = open_published(tmp_path / "model")
    tensors = read_whole(published.reader, published.reader.infos)
    again = read_whole(back.reader, back.reader.infos)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert differences(model.config, back.config) == []
