"""What a model is: a layout, and a table that says what each name in it means."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from everstate.core.config import Config, read_toml
from everstate.core.errors import ConfigError, did_you_mean
from everstate.mixers import MIXERS
from everstate.mixers.base import parse_mixer
from everstate.mixers.modules import Multiplier, NormKind
from everstate.models.layout import parse_layout


class ModelConfig(Config):
    """A language model of residual blocks `x + residual_multiplier * mixer(norm(x))`.

    `layout` orders the blocks by name and `mixers` says what each name is, such as `{"ssm": {"type": "mamba2",
    "d_state": 64}}`. A name that `mixers` does not list is a mixer type with its default settings. Raises `ConfigError`
    for unknown keys, values out of range and layouts that cannot be read; shapes that do not fit are found when the
    model is built.
    """

    title = "model config"

    d_model: PositiveInt
    """Width of the residual stream."""
    vocab_size: PositiveInt
    layout: str
    mixers: dict[str, dict[str, Any]] = {}
    norm: NormKind = "rms"
    """Kind of the norm of each block and of the last one."""
    norm_eps: PositiveFloat = 1e-5
    post_norm: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Names of blocks whose norm comes after the mixer: `x + residual_multiplier * norm(mixer(x))`."""
    embedding_multiplier: Multiplier = 1.0
    residual_multiplier: Multiplier = 1.0
    logit_multiplier: Multiplier = 1.0
    logit_softcap: PositiveFloat | None = None
    """Bound of the logits, `softcap * tanh(logits / softcap)`; default: none."""
    tie_embeddings: bool = True
    """Whether the embedding is also the weight of the output head."""

    @field_validator("mixers")
    @classmethod
    def _plain_tables(cls, mixers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Each table checked, and in the one form that TOML gives back, so that equal configs compare equal."""
        return {name: _plain_table(name, table) for name, table in mixers.items()}

    @model_validator(mode="after")
    def _every_name_means_something(self) -> ModelConfig:
        names = set(self.blocks)
        for name in sorted(names - set(self.mixers)):
            if name not in MIXERS:
                allowed = [*self.mixers, *MIXERS]
                raise ConfigError(f"layout names {name!r}, which is no mixer; {did_you_mean(name, allowed)}")
        strange = sorted(set(self.post_norm) - names)
        if strange:
            raise ConfigError(f"post_norm names {strange[0]!r}, which is no block; {did_you_mean(strange[0], names)}")
        unused = sorted(set(self.mixers) - names)
        if unused:
            raise ConfigError(
                f"mixers describes {unused[0]!r}, which layout {self.layout!r} does not use; "
                "take it out of mixers or put it into the layout"
            )
        return self

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The name of each block in order."""
        return parse_layout(self.layout)

    def mixer_table(self, name: str) -> dict[str, Any]:
        """The table from which the blocks called `name` are built."""
        return self.mixers.get(name, {"type": name})

    @classmethod
    def from_toml(cls, path: Path | str) -> ModelConfig:
        """Read a TOML file that holds the config, either as the whole file or as its `[model]` table."""
        table = read_toml(path)
        return cls.parse(table.get("model", table))


def _plain_table(name: str, table: dict[str, Any]) -> dict[str, Any]:
    try:
        config, _ = parse_mixer(table)
    except ConfigError as error:
        raise ConfigError(f"mixers.{name}: {error}") from None
    return {"type": table["type"], **config.model_dump(mode="json", exclude_unset=True, exclude_none=True)}
