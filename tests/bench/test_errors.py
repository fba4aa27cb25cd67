"""The benchmark of errors: with the forms of a CPU, which are those that it compares with."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from everstate.bench import errors
from everstate.bench.peer_ops import Run, run_op
from everstate.bench.report import Row
from everstate.bench.timing import Gate
from everstate.core.errors import ConfigError
from everstate.ops.example import Example

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SSD = ["output", *(f"gradient of {name}" for name in ("x", "a", "s", "B", "C", "state", "D"))]


def ssd(peers: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], list[str]]:
    monkeypatch.setattr(errors, "peers_of", lambda name, example: peers)
    title, example = next(errors.cases("ssd_scan", 128, 100, "cpu"))
    left_out: list[str] = []
    return list(errors.errors("ssd_scan", title, example, 100, left_out)), left_out


def test_what_a_run_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "peers_of", lambda name, example: {})  # they may be there, and tune for minutes
    output = tmp_path / "errors.json"
    errors.run(quick=True, output=output, now=NOW, device="cpu", only=["ssd_scan"])
    kept = json.loads(output.read_text())
    titles = ("ssd_scan", "ssd_scan, 16 times slower decays")
    assert [row["name"] for row in kept["rows"]] == [f"{title}: {tensor}" for title in titles for tensor in SSD]
    assert kept["passed"]
    for row in kept["rows"]:
        rounded = row["name"].rpartition(" ")[2] in ("output", "x", "B", "C")
        low, high = (1e-3, 2e-3) if rounded else (0, 1e-6)
        assert row["everstate"] == row["error"] and low < row["torch"] < high
        assert row["torch, autocast"] > 1.2 * row["torch"]


@pytest.mark.parametrize("name", [*errors.DECAYS, "trapezoid_scan, 4 ranks"])
def test_decays_are_slower_the_second_time(name: str) -> None:
    (_, once), (_, slower) = errors.cases(name, 128, 8, "cpu")
    before, after = (each.timed | each.fixed for each in (once, slower))
    decays = errors.DECAYS[name.partition(",")[0]]
    assert torch.equal(16 * after[decays], before[decays]) and torch.equal(after["x"], before["x"])


def test_what_does_not_decay_is_measured_once() -> None:
    assert [title for title, _ in errors.cases("rotary", 128, 8, "cpu")] == ["rotary"]


def test_peers_are_compared_where_numbers_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(example: Example) -> list[Tensor]:
        return [1.01 * run_op("ssd_scan", example)[0].float()]

    rows, left_out = ssd({"peer": off, "peer without D": off}, monkeypatch)
    compared = {row.name.partition(": ")[2]: row.figures["peer"] for row in rows if "peer" in row.figures}
    assert list(compared) == ["output", "gradient of x", "gradient of B", "gradient of C"]
    assert compared["output"] == pytest.approx(0.01, rel=0.05) and not left_out
    assert all("peer without D" not in row.figures for row in rows)


def test_what_a_peer_computes_otherwise_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(example: Example) -> list[Tensor]:
        raise RuntimeError("not on this machine")

    rows, left_out = ssd({"twice": lambda one: [2 * run_op("ssd_scan", one)[0]], "fails": fails}, monkeypatch)
    assert all(row.figures.keys() == {"everstate", "torch", "torch, autocast"} for row in rows)
    assert left_out[0] == "ssd_scan of fails: not on this machine"
    assert left_out[1] == "ssd_scan, output of twice: 1e+00 from float64, which is something else"


def test_an_op_without_kernels_is_not_measured() -> None:
    with pytest.raises(ConfigError, match="bench errors: ssd_step_ is not measured on a GPU; give one or more of: ssd"):
        errors.run(quick=True, output=None, now=NOW, device="cpu", only=["ssd_step_"])


def test_the_table_says_each_op_once() -> None:
    forms = {"everstate": 2.164e-3, "torch": 1.66e-3, "torch, autocast": 3e-7}
    first = Row("op: output", 1, Gate(0.0, 1.0), None, figures={**forms, "peer": 2.1e-3})
    second = Row("op: gradient of dt", 1, Gate(2.0, 1.0), None, figures=forms)
    table = errors.table("errors", [first, second])
    assert [row.style for row in table.rows] == [None, None, "red"]
    console = Console(width=80, record=True, file=StringIO())
    console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["what", "everstate", "torch", "torch,", "autocast", "peer"] in lines and lines.count(["op"]) == 1
    assert ["output", "2.16", "1.66", "0.00", "peer", "2.10"] in lines and ["ddt", "2.16", "1.66", "0.00"] in lines


@pytest.mark.gpu
def test_kernels_of_scans_err_no_more_than_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.2 times what the PyTorch form does under autocast. In the interpreter numbers are cut, not rounded."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(errors, "peers_of", lambda name, example: {})
    scans = ["ssd_scan", "trapezoid_scan", "trapezoid_scan, 4 ranks", "selective_scan", "linear_scan"]
    result = errors.run(quick=False, output=None, now=NOW, device="cuda", only=scans)
    assert [row for row in result["rows"] if row["everstate"] > 1.2 * row["torch, autocast"] + 1e-5] == []
