"""The benchmark of decoding, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from everstate.bench import decode, models
from everstate.bench.decode import state_traffic
from everstate.cli import build
from everstate.core.state import nbytes
from everstate.mixers import build_mixer
from everstate.mixers.mamba2 import Deferred, Mamba2
from everstate.models import LM
from everstate.ops.ssd.pending import ENTRIES, nothing_pending

RUNNER = CliRunner()


def test_a_quick_run_measures_every_batch_and_an_old_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "VOCABULARY", 64)
    output = tmp_path / "decode.json"
    arguments = ["bench", "decode", "--quick", "--model", "mamba2-130m", "-b", "1", "-b", "2", "--output", str(output)]
    ran = RUNNER.invoke(build(), arguments)
    assert ran.exit_code == 0, ran.output
    result = json.loads(output.read_text())
    assert [row["name"] for row in result["rows"]] == [
        "1 sequences",
        "2 sequences",
        "after 128 tokens",
        "after 512 tokens",
    ]
    assert all(row["passed"] and row["seconds"] > 0 for row in result["rows"])
    assert result["rows"][2]["state_bytes"] == result["rows"][3]["state_bytes"]


@pytest.mark.parametrize("name", models.HYBRIDS)
def test_hybrids_have_as_many_parameters_as_what_was_published(name: str) -> None:
    billions = {"granite4-h-tiny": 6.9, "falcon-h1-1.5b": 1.55, "nemotron-h-8b": 8.1}[name]
    model = LM(models.config_of(name), device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("name", models.HYBRIDS)
def test_a_quick_run_of_a_hybrid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "VOCABULARY", 64)
    ran = RUNNER.invoke(build(), ["bench", "decode", "--quick", "--model", name, "-b", "2"])
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == ["2 sequences", "after 128 tokens", "after 512 tokens"]
    assert all(row["passed"] for row in result["rows"])


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    ran = RUNNER.invoke(build(), ["bench", "decode", "--quick", "--model", "mamba2-7b"])
    assert ran.exit_code != 0
    assert "'mamba2-7b' is not one of" in str(ran.exception or ran.output)


def test_a_state_that_is_deferred_is_written_every_few_tokens() -> None:
    mixer = build_mixer({"type": "mamba2", "headdim": 8, "d_state": 4}, 16)
    assert isinstance(mixer, Mamba2)
    state = mixer.init_state(3)
    pending = nothing_pending(state.ssm, 1, torch.float32)
    deferred = Deferred(state.conv, state.ssm, pending)
    assert state_traffic((state, (state,))) == 4 * nbytes(state)
    rarely = nbytes((state.ssm, pending.x, pending.B))
    assert state_traffic(deferred) == 2 * (nbytes(deferred) - rarely) + (1 + 1 / ENTRIES) * rarely


def test_the_gate_steps_a_state_that_is_deferred(deferring: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is written, and as it is timed."""
    written, model = [], LM(models.config_of("mamba2-130m", quick=True))
    deferred = model.deferred

    def watched(state: Any) -> Any:
        written.append(deferred(state))
        return written[-1]

    monkeypatch.setattr(model, "deferred", watched)
    assert decode.step_gate(model, decode.Plan("mamba2", (2,), 8, 8), 2, None).passed
    assert decode.STEPPED > ENTRIES
    assert [int(part.pending.waiting.max()) for part in written[0]] == [(i + 1) % 8 for i in range(len(written[0]))]
