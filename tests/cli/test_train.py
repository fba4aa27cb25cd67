"""`everstate train` as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everstate.train import TrainRecipe, train
from everstate.train.checkpoint import Checkpoint

RECIPE = """
[model]
d_model = 16
layout = "ssm"
mixers.ssm = { type = "mamba2", d_state = 4, headdim = 8 }

[data]
path = "text"
lanes = 2
seq_len = 16

[train]
out = "run"
steps = 1000000
threads = 1
log_every = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text number {i} says this. " * 20)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "everstate.cli", "train", "recipe.toml", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_line(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1]))


def wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    file = folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_text().count("\n") > 2):
        time.sleep(0.05)


def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path) -> None:
    process = start(folder, "--set", "train.lr=1e-2")
    wait_for_steps(folder, process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    steps = int(str(last_line(folder)["step"]))
    assert f"saved at step {steps}" in out
    assert "everstate train recipe.toml --set=train.lr=1e-2 --resume" in out
    again = start(folder, "--set=train.lr=1e-2", "--resume", f"--set=train.steps={steps + 3}", "--json")
    out, errors = again.communicate(timeout=60)
    assert (again.returncode, errors) == (0, "")
    shown = [json.loads(line) for line in out.splitlines()]
    assert [line["step"] for line in shown] == [steps + 1, steps + 2, steps + 3]
    assert shown[-1] == last_line(folder)


def test_killed_without_warning_it_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(folder, "--set=train.save_every=2", "--quiet")
    wait_for_steps(folder, process)
    process.kill()
    assert process.communicate(timeout=60) == ("", "")
    monkeypatch.chdir(folder)
    saved = Checkpoint.read(Path("run")).values["step"]
    assert saved % 2 == 0
    settings = ["train.save_every=2", f"train.steps={saved + 3}"]
    outcome = train(TrainRecipe.read("recipe.toml", settings), resume=True)
    assert (outcome.step, outcome.finished) == (saved + 3, True)
    assert last_line(folder)["step"] == saved + 3
