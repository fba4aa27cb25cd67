"""The benchmark of ops, small: what it measures, that it writes what it prints, that a wrong op is not timed."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.bench import ops as bench
from everstate.bench.peer import Peer, available, name_with_kernels
from everstate.models import LM, ModelConfig
from everstate.ops import OPS
from everstate.ops.norm import lean

NOW = datetime(2026, 7, 1, tzinfo=UTC)
TINY = replace(bench.QUICK, layers=1, short=70, long=140, op_tokens=8, young=5, old=20, steps=2, repeats=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)
    monkeypatch.setattr(bench, "EXAMPLES", {"rms_norm": bench.EXAMPLES["rms_norm"]})


def run(output: Path | None = None) -> dict[str, Any]:
    return bench.run(quick=True, threads=1, output=output, now=NOW)


def test_it_measures_everything_and_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path / "results" / "ops.json")
    assert result["passed"]
    assert result["date"] == "2026-07-01T00:00:00+00:00"
    assert torch.__version__.startswith(result["machine"]["torch"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert json.loads((tmp_path / "results" / "ops.json").read_text()) == result
    rows = {(row["name"], row["tokens"]): row for row in result["rows"]}
    assert all(row["seconds"] > 0 for key, row in rows.items() if "cases" not in key[0])
    for kind in bench.STACKS:
        assert rows[f"1 x {kind}", 140]["ratio_of"] == "time of 70"
        assert rows[f"{kind} after 5", 2]["state_bytes"] == rows[f"{kind} after 20", 2]["state_bytes"] > 0


def test_a_wrong_op_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STACKS", ())
    right = lean.gated_rms_norm
    broken = next(i for i in OPS["gated_rms_norm"].implementations if i.backend == "torch")
    monkeypatch.setattr(broken, "_function", lambda x, z, weight: right(x, z, weight) + 1e-3)
    result = run()
    assert not result["passed"]
    untimed = [row["name"] for row in result["rows"] if not row["passed"] and "seconds" not in row]
    assert untimed == ["gated_rms_norm", "gated_rms_norm + backward"]


def test_a_peer_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")

    def fails(peer: Peer, tokens: Tensor) -> Tensor:
        raise ValueError("cannot be accessed from Triton\nand more")

    monkeypatch.setattr(Peer, "hidden", fails)
    left_out: list[str] = []
    rows = list(bench.stacks(left_out, TINY, lambda what: None))
    assert [row.name for row in rows] == [f"1 x {kind}" for kind in bench.STACKS for _ in range(2)]
    assert all(row.gate.passed and row.timing is not None for row in rows)
    reason = f"of {name_with_kernels()}: cannot be accessed from Triton"
    assert left_out == [f"1 * ({kind}) {reason}" for kind in ("mamba1", "mamba2")]


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_the_peer_computes_what_we_compute(kind: str, needs_peer: None) -> None:
    assert available(kind)
    model = LM(ModelConfig(d_model=64, vocab_size=50, layout=f"2 * ({kind})"))
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, _ = model.hidden(tokens, model.init_state(2))
        assert torch.allclose(Peer(model).hidden(tokens), hidden, atol=1e-5)
        assert torch.allclose(Peer(model).logits(tokens), model.logits(hidden), atol=1e-5)


def test_there_is_no_peer_for_mamba3() -> None:
    assert not available("mamba3")
