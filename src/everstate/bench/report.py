"""What a benchmark says: one table to read, one line of JSON to keep, and with both the machine that it is about."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from everstate.bench.timing import Gate, Timing
from everstate.core.device import device_named

PACKAGES = ("everstate", "torch", "transformers")


@dataclass(frozen=True)
class Row:
    """One measurement.

    tokens: read by one call.
    timing: None if only the gate was asked for, or if it did not pass.
    ratio, ratio_of: the figure that counts, and its unit, such as 4.2 times "the speed of transformers".
    state_bytes: held by one sequence meanwhile, where that is the point.
    figures: what else was measured, by name and unit such as `first_s`.
    """

    name: str
    tokens: int
    gate: Gate
    timing: Timing | None
    ratio: float | None = None
    ratio_of: str = ""
    state_bytes: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        """As plain values."""
        facts: dict[str, Any] = {"name": self.name, "tokens": self.tokens}
        facts |= {"error": self.gate.error, "error_allowed": self.gate.allowed, "passed": self.gate.passed}
        if self.timing is not None:
            low, high = self.timing.spread
            facts |= {"seconds": self.timing.median, "seconds_quartiles": [low, high]}
            facts |= {"repeats": len(self.timing.seconds), "tokens_per_second": self.tokens / self.timing.median}
        if self.ratio is not None:
            facts |= {"ratio": self.ratio, "ratio_of": self.ratio_of}
        facts |= self.figures
        return facts if self.state_bytes is None else {**facts, "state_bytes": self.state_bytes}


def machine(named: str) -> dict[str, Any]:
    """The hardware and the versions that a figure belongs to. Raises `ConfigError` for a device that is not there."""
    device = device_named(named)
    return {
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
        "commit": _commit(),
    }


def package_version(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout that this file lies in, marked if files have changed since; or "unknown"."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes" if status.strip() else commit


def publish(
    benchmark: str, rows: Sequence[Row], facts: dict[str, Any], now: datetime, output: Path | None,
    tabulate: Callable[[str, Sequence[Row]], Table] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Print the table, and as the last line the whole result as JSON; write that to `output` too.

    `facts["left_out"]`, where there is one, are sentences for the reader, as about a peer that is not there; each
    is said once.
    """
    result = {"benchmark": benchmark, "date": now.isoformat(timespec="seconds"), **facts}
    if "left_out" in facts:
        result["left_out"] = list(dict.fromkeys(facts["left_out"]))
    result |= {"passed": all(row.gate.passed for row in rows), "rows": [row.table() for row in rows]}
    console = Console()
    console.print((tabulate or _times)(benchmark, rows))
    for sentence in result.get("left_out", []):
        console.print(f"left out: {sentence}", markup=False, highlight=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return result


@contextmanager
def publishing(
    benchmark: str, rows: Sequence[Row], facts: dict[str, Any], now: datetime, output: Path | None,
    tabulate: Callable[[str, Sequence[Row]], Table] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """`publish` what `rows` and `facts` hold in the end, into what is given: also after an error or an interruption.

    A benchmark of many minutes then loses nothing that it has measured; `stopped_by` says what ended it.
    """
    result: dict[str, Any] = {}
    try:
        yield result
    except BaseException as stop:
        facts["stopped_by"] = type(stop).__name__
        raise
    finally:
        if rows or "stopped_by" not in facts:
            result |= publish(benchmark, rows, facts, now, output, tabulate)


def _times(title: str, rows: Sequence[Row]) -> Table:
    caption = "ms of one call: median, half the distance of the quartiles; nothing is timed before it is found correct"
    table = Table(title=title, caption=caption, box=None, header_style="bold underline")
    table.add_column("what", no_wrap=True)
    for heading in ("tokens", "ms", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("compared", no_wrap=True)
    for row in rows:
        table.add_row(row.name, f"{row.tokens:,}", *_speed(row), _comparison(row))
    return table


def _speed(row: Row) -> tuple[str, str]:
    if row.timing is None:
        return "", ""
    middle, (low, high) = row.timing.median, row.timing.spread
    return f"{1000 * middle:,.4g} ±{(high - low) / 2 / middle:.0%}", f"{row.tokens / middle:,.0f}"


def _comparison(row: Row) -> str:
    if not row.gate.passed:
        return f"[red]wrong by {row.gate.error:.0e}[/]"
    if row.ratio is not None:
        return f"{row.ratio:.2f} x {row.ratio_of}"
    if row.figures:
        return ", ".join(f"{name} {value:.3g}" for name, value in row.figures.items())
    return f"error {row.gate.error:.0e}"
