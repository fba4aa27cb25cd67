"""`everstate verify`: a model's own weights, read in every way, must give the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everstate.cli.loading import Device, Dtype, Model, Revision, TokenizerAt, dtype_of, reading_bar
from everstate.core.errors import DataError

if TYPE_CHECKING:
    import torch

    from everstate.models import LM


def verify(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Also measure the perplexity of this text.")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens to try the laws on.")] = 128,
    tokenizer: TokenizerAt = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Load a model and check that chunks, single tokens, packing and saved states give what one pass gives."""
    from rich.console import Console
    from rich.table import Table

    from everstate import checkpoints
    from everstate.engine.verify import TOLERANCE, deviations

    with reading_bar() as watch:
        weights = checkpoints.load_model(model, revision=revision, device=device, dtype=dtype_of(dtype), watch=watch)
    tokens = None
    if text is not None:
        words = checkpoints.load_tokenizer_of(model, tokenizer=tokenizer, revision=revision)
        begin = [] if words.bos_id is None else [words.bos_id]
        tokens = _tokens(text, begin + words.encode(_read(text)), weights)
    weights.eval().requires_grad_(False)
    bound, console = TOLERANCE[weights.dtype], Console(highlight=False)
    table = Table(title=f"{weights.config.layout}, {str(weights.dtype).removeprefix('torch.')}")
    for heading in ("read", "largest deviation of a logit", "verdict"):
        table.add_column(heading)
    found_deviations = deviations(weights, _random(weights, length) if tokens is None else tokens[:length])
    for way, deviation in found_deviations.items():
        table.add_row(way, f"{deviation:.1e} sd", "ok" if deviation <= bound else "DEVIATES")
    console.print(table)
    console.print(f"sd: standard deviations of the logits; rounding may make up to {bound:g}")
    if tokens is not None:
        _perplexities(weights, tokens)
    if not all(deviation <= bound for deviation in found_deviations.values()):  # not a number is no small deviation
        raise typer.Exit(1)


def _random(model: LM, length: int) -> torch.Tensor:
    import torch

    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {text}: {error}; give a text file in UTF-8") from None


def _tokens(text: Path, ids: list[int], model: LM) -> torch.Tensor:
    import torch

    if len(ids) < 8:
        raise DataError(f"{text} has {len(ids)} tokens, which measure nothing; give a longer text")
    return torch.tensor(ids, device=model.device)


def _perplexities(model: LM, tokens: torch.Tensor) -> None:
    """The perplexity of the text; for Mamba-3 with both activations of A, since no checkpoint says which it wants."""
    from everstate.engine.verify import perplexity

    found = {name: perplexity(each, tokens) for name, each in _variants(model).items()}
    for name, value in found.items():
        with_it = f", A_activation = {name}" if name else ""
        typer.echo(f"perplexity of {len(tokens):,} tokens{with_it}: {value:.4f}")
    if len(found) > 1:
        typer.echo(f"A_activation = {min(found, key=lambda name: found[name])} fits this text")


def _variants(model: LM) -> dict[str, LM]:
    """The model by the name of its activation of A, and the same weights with the other one."""
    from everstate.models import LM

    config = model.config
    mamba3 = [name for name in set(config.blocks) if config.mixer_table(name)["type"] == "mamba3"]
    if not mamba3:
        return {"": model}
    found = {}
    for activation in ("heavy_tail", "softplus"):
        tables = {name: {**config.mixer_table(name), "A_activation": activation} for name in mamba3}
        other = LM(config.model_copy(update={"mixers": {**config.mixers, **tables}}), device="meta", dtype=model.dtype)
        other.load_state_dict(model.state_dict(), assign=True)
        found[activation] = other
    return found
