"""The command line. Each command is one file, and one line here; torch is imported only by a command that runs."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

from everstate.core.env import let_idle_threads_sleep
from everstate.core.errors import EverstateError
from everstate.core.registry import import_target

COMMANDS = {
    "train": "everstate.cli.train:train",
    "generate": "everstate.cli.generate:generate",
    "inspect": "everstate.cli.inspect:inspect",
    "convert": "everstate.cli.convert:convert",
    "verify": "everstate.cli.verify:verify",
    "cost": "everstate.cli.cost:cost",
    "doctor": "everstate.cli.doctor:doctor",
    "bench": "everstate.cli.bench:app",
    "demo": "everstate.cli.demo:demo",
}
"""Command -> where its function, or its group of functions, lives."""


def build() -> typer.Typer:
    """The program with all its commands."""
    app = typer.Typer(
        help="State space models: train, run and measure them, with memory that does not grow.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for name, target in COMMANDS.items():
        command = import_target(target)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main() -> None:
    """Run the command line; an error of the user's is one line and exit code 1."""
    let_idle_threads_sleep()
    try:
        build()()
    except EverstateError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone: that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
