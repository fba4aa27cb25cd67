"""Loading a model for a command, with a bar while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from everstate.core.errors import RequestError

if TYPE_CHECKING:
    import torch

    from everstate.checkpoints.published import Watch

DTYPES = ("float32", "bfloat16", "float16", "float64")

Model = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, or a repository of the hub such as state-spaces/mamba2-130m.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Dtype = Annotated[str | None, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}; by default as they are stored.")]
TokenizerAt = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or repository of the tokenizer, if it is not with the model.")
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")]


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of that name. Raises `RequestError` for any other name."""
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise RequestError(f"dtype {name!r} is not one of {', '.join(DTYPES)}; give one of them")
    found: torch.dtype = getattr(torch, name)
    return found


@contextmanager
def reading_bar() -> Iterator[Watch]:
    """What `load` tells its progress to: a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("reading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading")
        yield lambda done, total: progress.update(task, completed=done, total=total)
