"""The parity example runs, its plot is drawn, and the page quotes what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, ROOT / "examples" / name, *arguments], check=True, capture_output=True)


def test_a_quick_run_measures_every_model_and_is_drawn(tmp_path: Path) -> None:
    run("parity.py", "--quick", "--json", tmp_path / "parity.json")
    runs = json.loads((tmp_path / "parity.json").read_text())["runs"]
    assert [one["model"] for one in runs] == ["mamba3", "mamba3 held still", "mamba2"]
    assert all(11_500 < one["parameters"] < 12_500 for one in runs)
    assert all(0.4 < one["curve"][-1]["256"] < 0.6 for one in runs)  # four steps teach nobody
    run("plot_parity.py", tmp_path / "parity.json", tmp_path / "parity.png")
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_quotes_what_was_measured() -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())["runs"]
    page = (ROOT / "docs" / "learn" / "state-tracking.md").read_text(encoding="utf-8")
    for name in {one["model"] for one in runs}:
        finals = [one["curve"][-1] for one in runs if one["model"] == name]
        worst = [f"{100 * min(final[length] for final in finals):.1f}" for length in ("40", "64", "128", "256", "512")]
        assert " | ".join(worst) in page
    turning = [one["curve"][-1] for one in runs if one["model"] == "mamba3"]
    assert all(final["40"] >= 0.99 and final["256"] >= 0.99 for final in turning)
