"""`everstate bench load`: loading a published checkpoint, beside reading its file.

Each turn reads the file into memory and loads it, each in a process of its own, so that the peak of memory is that of
the loading alone. The file is in the page cache: what is compared is our work and not the disk.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from everstate.bench.report import machine
from everstate.checkpoints import export, load_model
from everstate.models import LM, ModelConfig

FAMILY, FILE = "mamba2", "model.safetensors"
CHUNK = 2**24
GOAL_SPEED, GOAL_MEMORY = 0.7, 1.15


class Cost(NamedTuple):
    """Of one process: seconds, and the most bytes that it held beyond those it started with."""

    seconds: float
    peak: int


def run(*, gigabytes: float, repeats: int, output: Path | None, now: datetime) -> dict[str, Any]:
    """Write a checkpoint of about this size, check that it loads to the bit, measure, print, and return the result."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        console.print(f"writing a checkpoint of {gigabytes} GB ...")
        _alone(_write, folder, gigabytes)
        size = (folder / FILE).stat().st_size
        rows = []
        for name, dtype in (("as stored (float32)", None), ("to bfloat16", torch.bfloat16)):
            console.print(f"loading {name}, {repeats} times ...")
            rows.append({"name": name, **_measure(folder, dtype, size, repeats)})
    result = {"benchmark": "load", "date": now.isoformat(timespec="seconds"), **machine("cpu")}
    result |= {"bytes": size, "repeats": repeats, "goal_speed": GOAL_SPEED, "goal_memory": GOAL_MEMORY, "rows": rows}
    Console().print(_table(rows))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return result


def _write(folder: Path, gigabytes: float) -> None:
    """A Mamba-2 model of the published 1.3B width, as deep as the size asks for, which is loaded back to the bit."""
    layer, ends = 25.9e6 * 4, 2 * 50_288 * 2048 * 4
    layers = max(1, round((gigabytes * 1e9 - ends) / layer))
    config = ModelConfig(d_model=2048, vocab_size=50_288, layout=f"{layers} * mamba2", tie_embeddings=False)
    model = LM(config)
    export(model, folder, FAMILY)
    back = load_model(folder).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items()), "not loaded to the bit"


def _measure(folder: Path, dtype: torch.dtype | None, size: int, repeats: int) -> dict[str, Any]:
    """The turns, after one that is not counted."""
    reads, loads = [], []
    for turn in range(repeats + 1):
        read, load = _alone(_read, folder / FILE), _alone(_load, folder, dtype)
        if turn > 0:
            reads.append(read)
            loads.append(load)
    weights = size if dtype is None else size // 2
    return {
        "load_seconds": median(load.seconds for load in loads),
        "read_seconds": median(read.seconds for read in reads),
        "speed_to_reading": median(read.seconds / load.seconds for read, load in zip(reads, loads, strict=True)),
        "peak_to_weights": max(load.peak for load in loads) / weights,
    }


def _alone(task: Callable[..., None], *arguments: Any) -> Cost:
    """What a task costs in a new process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_cost, (task, *arguments))


def _cost(task: Callable[..., None], *arguments: Any) -> Cost:
    before, started = _peak(), time.perf_counter()
    task(*arguments)
    return Cost(time.perf_counter() - started, _peak() - before)


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _read(file: Path) -> None:
    """The bytes of a file into new memory: what every loading has to do at least."""
    memory = torch.empty(file.stat().st_size, dtype=torch.uint8).numpy()
    with open(file, "rb", buffering=0) as opened:
        done = 0
        while count := opened.readinto(memory[done : done + CHUNK].data):
            done += count


def _load(folder: Path, dtype: torch.dtype | None) -> None:
    load_model(folder, dtype=dtype)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="load", caption="medians; both in the page cache", box=None, header_style="bold underline")
    for heading in ("what", "load s", "read s", f"speed (goal {GOAL_SPEED})", f"peak memory (goal {GOAL_MEMORY})"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        table.add_row(
            row["name"], f"{row['load_seconds']:.2f}", f"{row['read_seconds']:.2f}",
            f"{row['speed_to_reading']:.2f} x reading", f"{row['peak_to_weights']:.2f} x weights",
        )  # fmt: skip
    return table
