"""The commands as a user types them: what they print, and that an error is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import everstate
from everstate.cli.cost import size
from everstate.models import LM, ModelConfig
from everstate.tokenizers import ByteTokenizer
from tests.commands import run

CONFIG = ModelConfig(
    d_model=16, vocab_size=258, layout="mamba2", mixers={"mamba2": {"type": "mamba2", "headdim": 8, "d_state": 4}}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    everstate.save(LM(CONFIG), ByteTokenizer(), place / "model")
    (place / "model.toml").write_text(CONFIG.to_toml())
    (place / "long.txt").write_text("A line of text.\n" * 9000)
    (place / "latin.txt").write_bytes(b"caf\xe9")
    return place


def process(folder: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`run` in a process of its own, as a user has it."""
    command = [sys.executable, "-m", "everstate.cli", *words]
    return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, check=False)


def ok(folder: Path, *words: str, stdin: str = "") -> str:
    done = run(folder, *words, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_names_every_command(folder: Path) -> None:
    done = process(folder, "--help")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for command in ("train", "generate", "inspect", "convert", "verify", "cost", "doctor", "bench", "demo"):
        assert command in text


def test_generate_is_the_same_from_an_argument_a_file_and_standard_input(folder: Path) -> None:
    (folder / "short.txt").write_text("hello")
    options = ["generate", "-m", "model", "-n", "20", "--seed", "3"]
    expected = process(folder, *options, stdin="hello").stdout
    assert expected == ok(folder, *options, "-f", "short.txt") == ok(folder, *options, "hello")
    assert expected == ok(folder, *options, "-", stdin="hello")
    assert expected != ok(folder, *options, "other")


def test_generate_json_counts_and_resumes(folder: Path) -> None:
    options = ["generate", "-m", "model", "--json", "--temperature", "0"]
    long = json.loads(ok(folder, *options, "-f", "long.txt", "-n", "5", "--save-state", "state"))
    assert long["prompt_tokens"] == 1 + 16 * 9000
    assert long["completion_tokens"] == 5
    more = json.loads(ok(folder, *options, "--resume", "state", "-n", "4"))
    whole = json.loads(ok(folder, *options, "-f", "long.txt", "-n", "9"))
    assert long["text"] + more["text"] == whole["text"]
    assert more["state_bytes"] == long["state_bytes"]


def test_cost_of_a_config_and_of_a_model(folder: Path) -> None:
    lines = ok(folder, "cost", "model.toml", "--json", "--context", "1000", "--context", "2000").splitlines()
    costs = [json.loads(line) for line in lines]
    assert [each["context"] for each in costs] == [1000, 2000]
    assert costs[0]["state_bytes"] == costs[1]["state_bytes"]
    assert costs[0]["kv_cache_bytes"] * 2 == costs[1]["kv_cache_bytes"]
    assert "parameters" in ok(folder, "cost", "model")
    assert "parameters" in ok(Path(__file__).parents[2], "cost", "recipes/stdlib.toml")
    assert [size(999), size(1500), size(2.5e6), size(3e15)] == ["999 B", "1.5 kB", "2.5 MB", "3,000.0 TB"]


def test_doctor_names_a_backend_for_every_op(folder: Path) -> None:
    from everstate.ops.example import EXAMPLES

    text = ok(folder, "doctor")
    assert "torch" in text
    for name in EXAMPLES:
        assert name in text


def test_doctor_warns_of_a_triton_that_has_not_been_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from everstate.ops import triton_common

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for tried in (True, False):
        monkeypatch.setattr(triton_common, "TRIED", tried)
        assert ("has not been tried" in ok(folder, "doctor")) is not tried


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "-m", "none", "x"], "none is no folder"),
        (["generate", "-m", "model", "-f", "none.txt"], "No such file"),
        (["generate", "-m", "model", "-f", "latin.txt"], "latin.txt is not UTF-8 at byte 3"),
        (["generate", "-m", "model", "x", "--top-p", "2"], "sampling: top_p"),
        (["generate", "-m", "model", "x", "-f", "long.txt"], "give one of them"),
        (["generate", "-m", "model", "--resume", "model/model.safetensors"], "no saved state"),
        (["generate", "-m", "model", "x", "--weights", "int3"], "give int8"),
        (["generate", "-m", "model", "x", "--state-dtype", "int8"], "is not one of"),
        (["generate", "-m", "model", "--resume", "x", "--state-dtype", "bfloat16"], "has a dtype of its own"),
        (["generate", "-m", "model", "x", "--seed", "99999999999999999999999"], "sampling: seed"),
        (["cost", "none.toml"], "cannot read none.toml"),
        (["cost", "long.txt"], "long.txt is not TOML"),
        (["train", "none.toml"], "cannot read none.toml"),
    ],
)
def test_an_error_is_one_readable_line(folder: Path, words: list[str], message: str) -> None:
    first = words == ["generate", "-m", "none", "x"]
    done = (process if first else run)(folder, *words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "generate -m model hi", "verify model", "bench ops", "bench errors --quick", "bench decode --quick",
        "bench prefill --quick", "bench train --quick",
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_an_error_before_anything_is_done(folder: Path, command: str) -> None:
    done = run(folder, *command.split(), "--device", "cuda:99")
    assert done.returncode == 1 and done.stdout == ""
    assert "error: device = 'cuda:99', and PyTorch sees" in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m everstate.cli generate -m model x -n 2000 | head -c 5"
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
