"""The whole run: its files, its end, its interruption and its resumption."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import everstate.train.loop as loop
from everstate.checkpoints import load, read_tensors
from everstate.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from everstate.models import LM
from everstate.train import Outcome, TrainRecipe, Watch, train
from everstate.train.evaluate import HeldOut
from everstate.train.metrics import Metrics
from everstate.train.run import Run

from .conftest import SSM, MakeRecipe

HYBRID = {"layout": "ssm attn", "mixers": {"ssm": SSM, "attn": {"type": "attention", "nheads": 2, "window": 8}}}


class Recorder(Watch):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.shown: list[tuple[Metrics, float, float]] = []

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def show(self, metrics: Metrics, done: float, seconds_left: float) -> None:
        self.shown.append((metrics, done, seconds_left))


@contextmanager
def ctrl_c_in(step: int) -> Iterator[None]:
    """Inside the block, the signal of Ctrl-C arrives while this step is computed."""
    original = Run.step_

    def step_(run: Run, lr: float) -> None:
        if run.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        original(run, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step_", step_)
        yield


def lines(recipe: TrainRecipe) -> list[dict[str, Any]]:
    text = (Path(recipe.train.out) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def timeless(recipe: TrainRecipe) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines(recipe)]


def same_weights(one: Outcome, other: Outcome) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_run_leaves_a_model_its_metrics_and_its_checkpoint(make_recipe: MakeRecipe) -> None:
    recipe, watch = make_recipe(), Recorder()
    outcome = train(recipe, watch=watch)
    assert (outcome.step, outcome.finished) == (6, True)
    assert {p.name for p in Path(recipe.train.out).iterdir()} == {
        "metrics.jsonl", "model.safetensors", "tokenizer.toml", "training.safetensors",
    }  # fmt: skip
    model, tokenizer = load(recipe.train.out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), outcome.model.parameters(), strict=True))
    assert tokenizer.vocab_size == 258
    written = lines(recipe)
    assert [set(line) for line in written] == [
        {"step", "loss", "bpb", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds"}
    ] * 6
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert [line["bpb"] is not None for line in written] == [False, False, True, False, False, True]
    assert [line["tokens"] for line in written] == [96 * step for step in range(1, 7)]
    assert written[0]["loss"] == pytest.approx(math.log(258), rel=0.1)
    assert written[-1]["loss"] < written[0]["loss"] - 0.2
    assert outcome.metrics is not None
    assert json.loads(outcome.metrics.line()) == written[-1]
    assert [done for _, done, _ in watch.shown] == pytest.approx([step / 6 for step in range(1, 7)])
    assert watch.shown[-1][2] == 0.0


@pytest.mark.parametrize("model", [{}, HYBRID], ids=["ssm", "hybrid"])
@pytest.mark.parametrize(
    "settings",
    [
        {"log_every": 1},
        {"log_every": 4, "save_every": 0},
        {"log_every": 4, "state_passing": False, "accumulate": 1},
        {"log_every": 4, "dtype": "bfloat16"},
    ],
    ids=["each step", "within a line", "no state passing", "half precision"],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    make_recipe: MakeRecipe, tmp_path: Path, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    """To the bit: mid-epoch, mid-document, between two lines of metrics, and twice."""
    settings = {"steps": 9, **settings}
    whole = make_recipe(model=model, train={**settings, "out": str(tmp_path / "whole")})
    parts = make_recipe(model=model, train=settings)
    expected = train(whole)
    with ctrl_c_in(step=3):
        first = train(parts)
    assert (first.step, first.finished) == (3, False)
    with ctrl_c_in(step=6):
        second = train(parts, resume=True)
    assert (second.step, second.finished) == (6, False)
    watch = Recorder()
    last = train(parts, resume=True, watch=watch)
    assert (last.step, last.finished) == (9, True)
    assert "resumed at step 6" in watch.sentences
    assert timeless(parts) == timeless(whole)
    assert same_weights(last, expected)
    tensors = [read_tensors(Path(recipe.train.out) / "training.safetensors")[0] for recipe in (parts, whole)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


class Killed(BaseException):
    """As kill -9: nothing that handles errors handles it."""


@pytest.mark.parametrize("at_save", [1, 2])
@pytest.mark.parametrize("before", ["commit", "copy"])
def test_whenever_it_dies_while_saving_it_resumes(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, at_save: int
) -> None:
    """Dead before the training file is replaced, or between it and the copy of the model."""
    whole, recipe = (make_recipe(train={"steps": 4, "out": str(tmp_path / name)}) for name in ("whole", "run"))
    expected = train(whole)
    place, name = (loop.Checkpoint, "write") if before == "commit" else (loop, "save")
    original, count = getattr(place, name), 0

    def dying(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == at_save:
            if before == "commit":
                args[1].mkdir(exist_ok=True)
                (args[1] / ".training.safetensors.half").write_bytes(b"half a file")
            raise Killed
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, dying)
        with pytest.raises(Killed):
            train(recipe)
    begun = (Path(recipe.train.out) / "training.safetensors").exists()
    assert begun == (before == "copy" or at_save > 1)
    outcome = train(recipe, resume=begun)
    assert outcome.finished
    assert timeless(recipe) == timeless(whole)
    assert same_weights(outcome, expected)
    assert same_weights(Outcome(*load(recipe.train.out), 0, True, None), expected)
    assert not begun or not list(Path(recipe.train.out).glob(".*"))


def test_a_run_that_died_in_its_last_evaluation_evaluates_when_resumed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole, recipe = (make_recipe(train={"eval_every": 0, "out": str(tmp_path / name)}) for name in ("whole", "run"))
    train(whole)

    def dying(held_out: HeldOut, model: LM) -> float:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOut, "bits_per_byte", dying)
        with pytest.raises(Killed):
            train(recipe)
    assert len(lines(recipe)) == 5
    for _ in range(2):
        assert train(recipe, resume=True).finished
        assert timeless(recipe) == timeless(whole)


def test_resuming_refreshes_the_copy_of_the_model(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    outcome = train(recipe)
    (Path(recipe.train.out) / "model.safetensors").unlink()
    again = train(recipe, resume=True)
    assert (again.step, again.finished, again.metrics) == (6, True, None)
    assert same_weights(Outcome(*load(recipe.train.out), 0, True, None), outcome)


def test_a_run_can_be_made_longer(make_recipe: MakeRecipe) -> None:
    train(make_recipe(train={"steps": 2}))
    watch = Recorder()
    outcome = train(make_recipe(train={"steps": 4, "lr": 5e-3}), resume=True, watch=watch)
    assert (outcome.step, outcome.finished) == (4, True)
    assert "resumed at step 2, train.lr = 0.005 (was: 0.01), train.steps = 4 (was: 2)" in watch.sentences


def test_what_is_no_run_of_this_recipe_is_refused(make_recipe: MakeRecipe, tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(CheckpointError, match="no training run to resume"):
        train(make_recipe(), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"not empty \(thesis.txt is there\)"):
        train(make_recipe(train={"out": str(tmp_path / "mine")}))
    with pytest.raises(CheckpointError, match="is a file"):
        train(make_recipe(train={"out": str(tmp_path / "mine" / "thesis.txt")}))
    train(make_recipe(train={"steps": 1}))
    with pytest.raises(CheckpointError, match="holds a training run; continue it with --resume"):
        train(make_recipe())
    with pytest.raises(ConfigError, match=r"another recipe: data.lanes = 3 \(was: 2\), train.seed = 1 \(was: 0\)"):
        train(make_recipe(data={"lanes": 3}, train={"seed": 1}), resume=True)
    (corpus / "9.txt").write_text("one more document")
    with pytest.raises(DataError, match="cannot resume"):
        train(make_recipe(), resume=True)
    file = tmp_path / "run" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged"):
        train(make_recipe(), resume=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_another_tokenizer_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(train={"steps": 1}))
    other = tmp_path / "words"
    other.mkdir()
    (other / "tokenizer.toml").write_text('type = "bytes"\n')
    train(make_recipe(data={"tokenizer": str(other)}), resume=True)  # the same under another name
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ConfigError, match="not the tokenizer that the run began with"):
        train(make_recipe(data={"tokenizer": str(other)}), resume=True)


def test_a_loss_that_is_no_number_ends_the_run_and_overwrites_nothing(make_recipe: MakeRecipe) -> None:
    settings = {"lr": 1e30, "warmup": 0, "clip": 0.0, "save_every": 1, "eval_every": 0, "steps": 50}
    recipe = make_recipe(train=settings)
    with pytest.raises(TrainingError, match=r"lower train.lr \(now 1e\+30\)") as caught:
        train(recipe)
    tensors, _ = read_tensors(Path(recipe.train.out) / "training.safetensors")
    step = len(lines(recipe))
    assert f"at step {step + 1} " in str(caught.value)
    assert f"The checkpoint of step {step} " in str(caught.value)
    assert all(math.isfinite(line["loss"]) for line in lines(recipe))
    assert all(torch.isfinite(tensor).all() for name, tensor in tensors.items() if name.startswith("model."))


def test_the_first_limit_ends_the_run(make_recipe: MakeRecipe) -> None:
    per_step, settings = 2 * 2 * 24, {"eval_every": 0, "save_every": 0}
    assert train(make_recipe(train={**settings, "steps": 9, "tokens": 3 * per_step - 1})).step == 3


def test_epochs_are_counted_in_tokens(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text("x" * 401)
    recipe = make_recipe(
        data={"path": str(one), "held_out": 0.0, "lanes": 1, "seq_len": 48},
        train={"steps": 90, "epochs": 2.5, "eval_every": 0, "accumulate": 1},
    )
    outcome = train(recipe)
    assert outcome.step == math.ceil(2.5 * 402 / 48)
    assert outcome.metrics is not None
    assert outcome.metrics.bpb is None


def test_minutes_end_the_run_and_the_rate_follows_the_clock(make_recipe: MakeRecipe) -> None:
    ticks = iter(range(10_000))
    recipe = make_recipe(
        train={"steps": 10_000, "minutes": 0.5, "decay": "linear", "warmup": 0, "eval_every": 0, "save_every": 0}
    )
    outcome = train(recipe, clock=lambda: float(next(ticks)))
    assert outcome.finished
    assert 5 < outcome.step < 30
    rates = [line["lr"] for line in lines(recipe)]
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 2e-3


def test_one_document_fills_all_lanes(make_recipe: MakeRecipe, corpus: Path) -> None:
    recipe = make_recipe(data={"path": str(corpus / "1.txt"), "lanes": 3}, train={"steps": 2})
    assert train(recipe).finished


def test_attention_that_forgets_says_what_to_do(make_recipe: MakeRecipe) -> None:
    model = {"layout": "ssm attn", "mixers": {"ssm": SSM, "attn": {"type": "attention", "nheads": 2, "context": 30}}}
    with pytest.raises(TrainingError, match=r"set train.state_passing = false"):
        train(make_recipe(model=model))
    other = make_recipe(model=model, train={"state_passing": False, "out": make_recipe().train.out + "2"})
    assert train(other).finished
