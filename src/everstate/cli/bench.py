"""`everstate bench`: measure, after the correctness gate, beside the peers that are installed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure this machine, beside peers where they are installed.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure this machine, beside peers where they are installed."""


@app.command()
def ops(
    quick: Annotated[bool, typer.Option(help="Small sizes: seconds instead of minutes.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the kernels of a GPU.")] = "cpu",
    op: Annotated[list[str] | None, typer.Option(help="On a GPU, only this op; repeat.")] = None,
) -> None:
    """On a CPU every op against its reference and Mamba layers against transformers; on a GPU its kernels."""
    if device != "cpu":
        from everstate.bench import kernels

        only = tuple(op or ())
        result = kernels.run(quick=quick, output=output, now=datetime.now(UTC), device=device, only=only)
        raise typer.Exit(0 if result["passed"] else 1)
    from everstate.bench import ops as measure

    result = measure.run(quick=quick, threads=threads, output=output, now=datetime.now(UTC))
    raise typer.Exit(0 if result["passed"] else 1)


@app.command()
def errors(
    quick: Annotated[bool, typer.Option(help="Small sizes: seconds instead of minutes.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    op: Annotated[list[str] | None, typer.Option(help="Only this op; repeat.")] = None,
) -> None:
    """How far outputs and gradients of ops in bfloat16 are from float64, beside PyTorch forms and peers."""
    from everstate.bench import errors as measure

    only = tuple(op or ())
    result = measure.run(quick=quick, output=output, now=datetime.now(UTC), device=device, only=only)
    raise typer.Exit(0 if result["passed"] else 1)


@app.command()
def decode(
    model: Annotated[str, typer.Option("--model", "-m", help="mamba2-1.3b ..., granite4-h-tiny ...")] = "mamba2-1.3b",
    batch: Annotated[list[int] | None, typer.Option("--batch", "-b", min=1, help="Sequences at once; repeat.")] = None,
    quick: Annotated[bool, typer.Option(help="A tiny model: seconds instead of minutes.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
) -> None:
    """Tokens per second of a whole model with random weights, and whether an old stream is slower than a young one."""
    from everstate.bench import decode as measure

    batches = tuple(batch or (1, 16, 64))
    result = measure.run(model=model, batches=batches, quick=quick, device=device, output=output, now=datetime.now(UTC))
    raise typer.Exit(0 if result["passed"] else 1)


@app.command()
def prefill(
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="As for decode; repeat.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny models: seconds instead of minutes.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
) -> None:
    """Whole models with random weights read a prompt of 8,192 tokens."""
    from everstate.bench import prefill as measure

    models = tuple(model or ("mamba2-130m", "mamba2-1.3b", "mamba2-2.7b"))
    result = measure.run(models=models, quick=quick, device=device, output=output, now=datetime.now(UTC))
    raise typer.Exit(0 if result["passed"] else 1)


@app.command()
def train(
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="mamba1, mamba2 ...; repeat.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny models: seconds instead of minutes.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Also time the step under torch.compile.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
) -> None:
    """A training step of models of about 360M parameters."""
    from everstate.bench import train as measure

    models, now = tuple(model or ("mamba2", "mamba3")), datetime.now(UTC)
    result = measure.run(models=models, quick=quick, compiled=compiled, device=device, output=output, now=now)
    raise typer.Exit(0 if result["passed"] else 1)


@app.command()
def load(
    gigabytes: Annotated[float, typer.Option(min=1.0, help="Size of the checkpoint, on disk and in memory.")] = 2.0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that are counted.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
) -> None:
    """Loading a published checkpoint beside reading its file: speed and memory."""
    from everstate.bench import load as measure

    measure.run(gigabytes=gigabytes, repeats=repeats, output=output, now=datetime.now(UTC))
