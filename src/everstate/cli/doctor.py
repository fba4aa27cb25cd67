"""`everstate doctor`: what this machine has, and which implementation of each op would serve it, or why not."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

PACKAGES = ("everstate", "torch", "triton", "numpy", "tokenizers", "safetensors", "transformers")


def doctor(
    verbose: Annotated[bool, typer.Option("--verbose", help="Every op and backend, not only the chosen ones.")] = False,
) -> None:
    """Print versions, devices, and for each op which backend serves it here."""
    from rich.console import Console

    console = Console()
    console.print(f"Python {sys.version.split()[0]} on {platform.platform()}")
    console.print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    for device in _devices():
        console.print(_ops_table(device, verbose))
    _warn_of_an_untried_triton(console)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    import torch

    from everstate.core.env import cpu_threads

    typer.echo(f"cpu: {cpu_threads()} threads, {platform.processor() or platform.machine()}")
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        typer.echo(f"cuda:{i}: {torch.cuda.get_device_name(i)}")
        devices.append(torch.device("cuda", i))
    return devices


def _ops_table(device: torch.device, verbose: bool) -> Table:
    """For each op that has an example: its first accepting backend, and with `verbose` what every backend says."""
    import torch
    from rich.table import Table

    from everstate.ops import OPS
    from everstate.ops.example import EXAMPLES, Draw

    table = Table(title=f"ops on {device}")
    for heading in ("op", "case", "backend", "verdict"):
        table.add_column(heading)
    for name in EXAMPLES:
        for variant, draw in EXAMPLES[name].items():
            example = draw(Draw(dtype=torch.float32, device=device), 1, 64, 1)
            state = {} if example.state is None else {"state": example.state}
            arguments = {**example.timed, **state, **example.fixed}
            verdicts, chosen = OPS[name].explain(**arguments), OPS[name].serving(**arguments)
            for backend, verdict in verdicts.items():
                if verbose or backend == chosen:
                    table.add_row(name, variant, backend, "serves it" if backend == chosen else verdict)
    return table


def _warn_of_an_untried_triton(console: Console) -> None:
    """A GPU does its work with such a version too, but slower."""
    import torch

    from everstate.core.kernels import has_triton

    if not torch.cuda.is_available() or not has_triton():
        return
    from everstate.ops.triton_common import TRIED, VERSIONS

    if not TRIED:
        console.print(
            f"Triton {_version('triton')} has not been tried: the kernels that are made for Hopper GPUs do not serve, "
            f"those for all GPUs do, and each launch takes longer. Tried are {', '.join(VERSIONS)}."
        )
