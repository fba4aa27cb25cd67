"""The file of metrics and what a run shows."""

from __future__ import annotations

import io
import json
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from everstate.core.errors import CheckpointError
from everstate.train.metrics import Metrics, MetricsFile
from everstate.train.progress import Bar, JsonLines, Lines, duration

LINE = Metrics(7, 2.5, None, 1e-3, 0.5, 700, 1234.5678901, 3.25)
EVALUATED = Metrics(8, 2.25, 3.125, 1e-3, 0.5, 800, 1234.5678901, 3.5)


def test_a_file_forgets_what_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsFile(path, 0)) as file:
        file.write(LINE)
        position = file.commit()
        file.write(EVALUATED)
    assert len(path.read_text().splitlines()) == 2
    with closing(MetricsFile(path, position)) as file:
        assert file.commit() == position
        file.write(EVALUATED)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [7, 8]


def test_a_file_that_was_cut_is_not_filled_up(tmp_path: Path) -> None:
    with closing(MetricsFile(tmp_path / "metrics.jsonl", 1000)) as file:
        file.write(LINE)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["bpb"] is None


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write "):
        MetricsFile(tmp_path / "nowhere" / "metrics.jsonl", 0)


def test_lines_come_with_time_and_with_evaluations() -> None:
    now, text = [0.0], io.StringIO()
    lines = Lines(Console(file=text, width=120), seconds=5.0, clock=lambda: now[0])
    lines.say("reading [the corpus]")
    for second in range(12):
        now[0] = float(second)
        lines.show(LINE, 0.25, 80.0)
    lines.show(EVALUATED, 0.5, 59.0)
    assert text.getvalue().splitlines() == [
        "reading [the corpus]",
        *[" 25%  step 7  loss 2.500  1,235 tokens/s  1:20 left"] * 3,
        " 50%  step 8  loss 2.250  held-out 3.125 bits/byte  1,235 tokens/s  0:59 left",
    ]


def test_the_bar_shows_every_figure() -> None:
    text = io.StringIO()
    with Bar(Console(file=text, width=80, force_terminal=True, color_system=None)) as bar:
        bar.say("reading the corpus")
        bar.show(EVALUATED, 0.5, 59.0)
        bar.show(LINE, 0.75, 4.0)
    assert "reading the corpus" in text.getvalue()
    before, _, after = text.getvalue().rpartition("loss ")
    assert "75%" in before[-20:]
    assert after.startswith("2.50 · held-out 3.12 bits/byte · 1,235 tokens/s · 0:04 left")


def test_json_lines_are_those_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    JsonLines().show(LINE, 0.5, 1.0)
    assert json.loads(capsys.readouterr().out) == {
        "step": 7, "loss": 2.5, "bpb": None, "lr": 1e-3, "grad_norm": 0.5, "tokens": 700,
        "tokens_per_s": 1234.56789, "seconds": 3.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1.0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (725.0, "12:05"), (3599.4, "59:59"), (90061.0, "25:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
