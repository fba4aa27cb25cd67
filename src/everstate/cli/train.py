"""`everstate train RECIPE.toml`: train a model, or go on with a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file with the tables [model], [data] and [train].")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value, such as train.lr=1e-3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in train.out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print each line of metrics as JSON.")] = False,
) -> None:
    """Train a model as a recipe says. Ctrl-C saves and ends; --resume goes on."""
    from rich.console import Console

    from everstate.train import Bar, JsonLines, Lines, Silent, TrainRecipe
    from everstate.train import train as run

    read = TrainRecipe.read(recipe, settings or [])
    console = Console(quiet=quiet or json, highlight=False, soft_wrap=True)
    if console.is_terminal and not console.quiet:
        with Bar(console) as bar:
            outcome = run(read, resume=resume, watch=bar)
    else:
        outcome = run(read, resume=resume, watch=JsonLines() if json else Silent() if quiet else Lines(console))
    if not outcome.finished:
        again = shlex.join(["everstate", "train", str(recipe), *(f"--set={s}" for s in settings or []), "--resume"])
        console.print(f"saved at step {outcome.step}; go on with: {again}", markup=False)
        raise typer.Exit(130)
    console.print(f"the model is in {read.train.out}; try: everstate generate -m {read.train.out}", markup=False)
