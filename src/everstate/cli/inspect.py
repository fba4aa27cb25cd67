"""`everstate inspect`: what a model is and what it costs, before its weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everstate.cli.cost import size
from everstate.cli.loading import Model, Revision

if TYPE_CHECKING:
    from everstate.models import ModelConfig

LETTERS = {"attention": "*", "mla": "*", "mlp": "-", "moe": "E", "parallel": "P", "bidirectional": "B"}
"""How a block is drawn, as in the patterns of Nemotron-H; every other layer is an M, the state space layers."""
CONTEXTS = (1_000, 32_000, 1_000_000)
WIDTH = 64


def inspect(model: Model, revision: Revision = None) -> None:
    """Print family, layout, parameters, bytes, and what a sequence holds beside a Transformer's cache."""
    from rich.console import Console
    from rich.table import Table

    from everstate import models
    from everstate.checkpoints import summary

    console, found = Console(highlight=False, soft_wrap=True), summary(model, revision=revision)
    config = found.config
    console.print(f"[bold]{found.family}[/] {found.path}")
    console.print(f"layout      {config.layout}", markup=False)
    for line in picture(config):
        console.print(line, markup=False)
    costs = [models.cost(config, context=context, dtype=found.dtype) for context in CONTEXTS]
    console.print(f"parameters  {costs[0].parameters:,}, of which a token uses {_active(config):,}")
    console.print(f"weights     {size(found.nbytes)} in {str(found.dtype).removeprefix('torch.')}")
    if found.skipped:
        console.print(f"skipped     {len(found.skipped)} tensors, such as {found.skipped[0]}", markup=False)
    table = Table()
    for heading in ("context", "state of a sequence", "cache of a Transformer (bf16)", "operations per token"):
        table.add_column(heading, justify="right")
    for each in costs:
        table.add_row(
            f"{each.context:,}", size(each.state_bytes), size(each.kv_cache_bytes), f"{each.flops_per_token:,}"
        )
    console.print(table)


def picture(config: ModelConfig) -> list[str]:
    """The blocks as letters, and what each letter is."""
    kinds = [config.mixer_table(name)["type"] for name in config.blocks]
    drawn = "".join(LETTERS.get(kind, "M") for kind in kinds)
    rows = [drawn[i : i + WIDTH] for i in range(0, len(drawn), WIDTH)]
    legend = "; ".join(f"{LETTERS.get(kind, 'M')} {kind}, {kinds.count(kind)} times" for kind in dict.fromkeys(kinds))
    return [f"blocks      {rows[0]}", *(f"            {row}" for row in rows[1:]), f"            {legend}"]


def _active(config: ModelConfig) -> int:
    """Parameters that one token goes through: of experts only those that are chosen."""
    from everstate.models import LM

    model, unused = LM(config, device="meta"), 0
    for block in model.layers:
        unused += _unused(block.mixer)
    return sum(p.numel() for p in model.parameters()) - unused


def _unused(mixer: object) -> int:
    from everstate.mixers.moe import MoE

    if not isinstance(mixer, MoE):
        return 0
    stacks = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel()
    return stacks - stacks // mixer.config.nexperts * mixer.config.top_k
