"""`everstate convert`: a model from one format into another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everstate.cli.loading import Dtype, Model, Revision, TokenizerAt, dtype_of, reading_bar
from everstate.core.errors import CheckpointError, TokenizerError

if TYPE_CHECKING:
    from everstate.tokenizers import Tokenizer

OWN = "everstate"


def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[str, typer.Option(help="'everstate', or a family such as mamba2.")] = OWN,
    dtype: Dtype = None,
    tokenizer: TokenizerAt = None,
    revision: Revision = None,
) -> None:
    """Load a model and write it in our own format, or in the published format of a family, with its tokenizer."""
    from everstate import checkpoints
    from everstate.checkpoints.families import FAMILIES
    from everstate.core.errors import did_you_mean

    if to != OWN and to not in FAMILIES:
        raise CheckpointError(f"there is no format {to!r}; {did_you_mean(to, [OWN, *FAMILIES])}")
    checkpoints.check_new(out)
    with reading_bar() as watch:
        weights = checkpoints.load_model(model, dtype=dtype_of(dtype), revision=revision, watch=watch)
    text = _tokenizer(model, tokenizer, revision)
    if to == OWN:
        checkpoints.save(weights, text, out)
    else:
        checkpoints.export(weights, out, to, tokenizer=text)
    typer.echo(f"wrote {out}" + ("" if text else ", without a tokenizer, because the model came without one"))


def _tokenizer(model: str, given: str | None, revision: str | None) -> Tokenizer | None:
    """The model's tokenizer, or None where it has none and none was given."""
    from everstate.checkpoints import load_tokenizer_of

    try:
        return load_tokenizer_of(model, tokenizer=given, revision=revision)
    except (TokenizerError, CheckpointError):
        if given is not None:
            raise
        return None
