"""`everstate demo`, which is `make demo`: train, write, stream 200,000 tokens in constant memory, save and resume."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everstate.cli.cost import size
from everstate.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from everstate.bench.stream import Mark
    from everstate.engine import Session

MARKS = (1_000, 10_000, 100_000, 200_000)
RECIPE = Path("recipes/stdlib.toml")
PROMPT = "def "
CONTINUATION = 200


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the state and the plot.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 1.5,
    recipe: Annotated[Path, typer.Option(help="The training recipe; the default lies in the checkout.")] = RECIPE,
) -> None:
    """Train a small model on Python's own library, let it write, stream 200,000 tokens through it, save and resume."""
    from rich.console import Console

    _require_plots()
    console = Console(highlight=False, soft_wrap=True)
    started = time.perf_counter()
    console.rule("1. Train a Mamba-3 hybrid on the source of Python's standard library")
    session = _train(console, recipe, out / "model", minutes)
    console.rule("2. Let it write")
    _write(console, session.fork())
    console.rule("3. Read a stream of 200,000 tokens, in constant memory")
    marks = _stream(console, session)
    _plot(marks, out / "stream.png")
    console.print(f"plot: {out / 'stream.png'}")
    console.rule("4. Save the state, resume it in a new process")
    same = _resume(console, session, out)
    console.rule(f"done in {time.perf_counter() - started:.0f} s")
    if not same:
        raise typer.Exit(1)


def _require_plots() -> None:
    """Say now, and not after the training, that the plot cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise ConfigError("the demo draws a plot and matplotlib is not installed; pip install 'everstate[plots]'")


def _train(console: Console, recipe: Path, out: Path, minutes: float) -> Session:
    """Train by the recipe, in place of the run of an earlier demo, and open a session with the model."""
    from everstate import train
    from everstate.engine import Session
    from everstate.train.checkpoint import FILE, Checkpoint

    read = train.TrainRecipe.read(recipe, [f"train.out={out}", f"train.minutes={minutes}"])
    if (out / FILE).exists() and not Checkpoint.read(out).recipe.differences(read):
        shutil.rmtree(out)
    if console.is_terminal:
        with train.Bar(console) as bar:
            outcome = train.train(read, watch=bar)
    else:
        outcome = train.train(read, watch=train.Lines(console))
    if not outcome.finished:
        raise typer.Abort
    return Session(outcome.model, outcome.tokenizer)


def _write(console: Console, session: Session) -> None:
    from everstate.engine import Sampling

    session.read(PROMPT)
    console.print(PROMPT, end="", markup=False)
    for piece in session.write(400, Sampling(temperature=0.7, seed=1)):
        console.print(piece, end="", markup=False)
    console.print()


def _stream(console: Console, session: Session) -> list[Mark]:
    """Read the library's source as one stream, and print what it costs at each mark."""
    from rich.table import Table

    from everstate.bench.stream import measure
    from everstate.tokenizers import encode_stream

    tokens = chain.from_iterable(encode_stream(session.tokenizer, _library()))
    marks = measure(session, tokens, MARKS, on_mark=lambda mark: console.print(f"  {mark:,} tokens read"))
    table = Table()
    for heading in ("tokens read", "state", "ms/read", "ms/write", "process memory", "KV cache*"):
        table.add_column(heading, justify="right")
    for mark in marks:
        table.add_row(
            f"{mark.tokens:,}", size(mark.state_bytes), f"{mark.read_ms:.2f}", f"{mark.write_ms:.2f}",
            size(mark.resident_bytes), size(mark.kv_cache_bytes),
        )  # fmt: skip
    console.print(table)
    console.print("ms: milliseconds for one token")
    console.print("* of a Transformer, computed: keys and values in bfloat16, same width, as many sequence layers")
    return marks


def _library() -> Iterator[str]:
    """The texts of the standard library."""
    from everstate.data.stdlib import stdlib_documents

    return (document.text for document in stdlib_documents())


def _plot(marks: list[Mark], path: Path) -> None:
    """Bytes and milliseconds against tokens read, beside the computed cache of a Transformer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tokens = [mark.tokens for mark in marks]
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    memory.loglog(tokens, [mark.state_bytes for mark in marks], "o-", label="Everstate: state (measured)")
    memory.loglog(tokens, [mark.kv_cache_bytes for mark in marks], "s--", label="Transformer: cache (computed)")
    memory.set(xlabel="tokens read", ylabel="bytes per sequence", title="What a sequence holds")
    memory.legend()
    speed.semilogx(tokens, [mark.write_ms for mark in marks], "o-")
    speed.set(xlabel="tokens read", ylabel="milliseconds", title="Time to write one token")
    speed.set_ylim(0, 1.5 * max(mark.write_ms for mark in marks))
    for axes in (memory, speed):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _resume(console: Console, session: Session, out: Path) -> bool:
    """Whether a new process writes from the saved state what this one writes without a stop."""
    from everstate.engine import Sampling

    session.save(out / "state.safetensors")
    console.print(f"saved {out / 'state.safetensors'}, {size((out / 'state.safetensors').stat().st_size)}")
    here = "".join(session.write(CONTINUATION, Sampling(temperature=0.7, seed=2)))
    command = [
        sys.executable, "-m", "everstate.cli", "generate", "-m", str(out / "model"), "--json",
        "--resume", str(out / "state.safetensors"), "-n", str(CONTINUATION), "--temperature", "0.7", "--seed", "2",
    ]  # fmt: skip
    there = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    same = bool(json.loads(there.stdout)["text"] == here)
    console.print(f"a new process continued with {len(here)} characters: {'identical' if same else 'NOT identical'}")
    console.print(f"  {here[:60]!r} ...", markup=False)
    return same
