"""A corpus of a few short documents and a recipe that trains on it in a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everstate.train import TrainRecipe

MakeRecipe = Callable[..., TrainRecipe]

SSM = {"type": "mamba2", "d_state": 4, "headdim": 8}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five documents, shorter and longer than a segment."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = "the state of a sequence is a value of constant size, and so it can be carried on".split()  # noqa: SIM905
    for i, length in enumerate((3, 90, 17, 41, 60)):
        text = " ".join(words[(i * 5 + j * j) % len(words)] for j in range(length))
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path, corpus: Path) -> MakeRecipe:
    """The recipe of a tiny run, with other values where they are given, such as `train={"lr": 1e-2}`."""

    def make(**tables: dict[str, Any]) -> TrainRecipe:
        default: dict[str, dict[str, Any]] = {
            "model": {"d_model": 16, "layout": "2 * ssm", "mixers": {"ssm": SSM}},
            "data": {"path": str(corpus), "held_out": 0.2, "lanes": 2, "seq_len": 24},
            "train": {
                "out": str(tmp_path / "run"), "steps": 6, "lr": 1e-2, "warmup": 2, "accumulate": 2, "threads": 1,
                "log_every": 1, "eval_every": 3, "eval_bytes": 100, "save_every": 2,
            },
        }  # fmt: skip
        for name, table in tables.items():
            default[name] = {**default[name], **table}
        return TrainRecipe.parse(default)

    return make
