"""`everstate cost`: what a model will cost, before a tensor of it exists."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from everstate.models import ModelConfig


def cost(
    model: Annotated[
        Path, typer.Argument(help="A TOML file with a model config or a recipe, or the folder of a model.")
    ],
    context: Annotated[list[int] | None, typer.Option(min=0, help="Context lengths, in tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per context length.")] = False,
) -> None:
    """Print parameters, operations per token, and bytes per sequence beside a Transformer's cache."""
    from rich.console import Console
    from rich.table import Table

    from everstate import models

    config = _config(model)
    costs = [models.cost(config, context=length) for length in context or [1_000, 10_000, 100_000, 1_000_000]]
    if as_json:
        for each in costs:
            typer.echo(json.dumps(asdict(each)))
        return
    table = Table(title=f"{config.layout}: {costs[0].parameters:,} parameters")
    for heading in ("context", "operations per token", "state", "cache of a Transformer (bf16)"):
        table.add_column(heading, justify="right")
    for each in costs:
        table.add_row(
            f"{each.context:,}", f"{each.flops_per_token:,}", size(each.state_bytes), size(each.kv_cache_bytes)
        )
    Console().print(table)


def _config(path: Path) -> ModelConfig:
    """The config of a saved model, of a recipe, or of a file that holds just it."""
    from everstate import checkpoints, models, train
    from everstate.core.config import read_toml
    from everstate.train.corpus import open_tokenizer

    if path.is_dir():
        return checkpoints.load_config(path)
    if "data" in read_toml(path):
        recipe = train.TrainRecipe.read(path)
        return recipe.model_config_for(open_tokenizer(recipe.data).vocab_size)
    return models.ModelConfig.from_toml(path)


def size(count: int | float) -> str:
    """Bytes for people: `1.5 MB`.

    >>> size(1500)
    '1.5 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
