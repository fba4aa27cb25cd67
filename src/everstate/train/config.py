"""What a training run is: a recipe of three tables, `[model]`, `[data]` and `[train]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from everstate.core.config import Config, override, read_toml
from everstate.core.errors import ConfigError
from everstate.models import ModelConfig
from everstate.train.schedule import Decay


class DataRecipe(Config):
    """What is read, and how it is cut into batches."""

    title = "[data]"

    path: str | tuple[str, ...] = ()
    """Text files, `.jsonl` files, or folders of both; relative ones are relative to the recipe's file."""
    source: Literal["stdlib"] | None = None
    """Instead of `path`, a text that every machine has: `stdlib` is the source of Python's own library."""
    patterns: tuple[str, ...] = ("**/*",)
    """Which files of a folder are read."""
    exclude: tuple[str, ...] = ()
    """Which of them are not."""
    field: str = "text"
    """Where a line of a `.jsonl` file has its text."""
    held_out: float = 0.02
    """Part of the documents that is never trained on and measures the bits per byte; 0 to train on all."""
    tokenizer: str = "bytes"
    """`bytes`, or the folder of a tokenizer; a relative one is relative to the recipe's file."""
    lanes: PositiveInt = 8
    """Streams that are read side by side: the batch."""
    seq_len: PositiveInt = 512
    """Tokens of each lane that one backward pass covers."""
    parts: NonNegativeInt = 0
    """Into how many parts each document is cut, each read from a fresh state; 0 for as few as fill the lanes."""

    @model_validator(mode="after")
    def _one_text(self) -> DataRecipe:
        if (self.source is None) == (not self.path):
            raise ValueError('give either path = "..." (files or folders) or source = "stdlib"')
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out} is not in [0, 1); give a part of the documents")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def beside(self, folder: Path) -> DataRecipe:
        """The same with paths that hold from everywhere, relative ones being relative to `folder`."""
        paths = tuple(str((folder / path).resolve()) for path in self.paths)
        tokenizer = self.tokenizer if self.tokenizer == "bytes" else str((folder / self.tokenizer).resolve())
        return self.model_copy(update={"path": paths, "tokenizer": tokenizer})


class TrainSettings(Config):
    """How the model is trained. The run ends at the first of the limits `steps`, `tokens`, `epochs`, `minutes`."""

    title = "[train]"

    out: str
    """The folder of the run, relative to where the command runs."""
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    minutes: PositiveFloat | None = None
    """Wall-clock time. The learning rate then follows the clock, and no two runs are alike to the bit."""
    lr: PositiveFloat = 1e-3
    min_lr: NonNegativeFloat = 0.0
    warmup: NonNegativeInt = 100
    """Steps."""
    decay: Decay = "cosine"
    cooldown: float = 0.2
    """The part of the run after the warm-up in which `wsd` decays."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    accumulate: PositiveInt = 1
    """Batches per optimizer step."""
    state_passing: bool = True
    """Whether a segment, in training and in evaluation, starts from the state at the end of the one before it."""
    seed: NonNegativeInt = 0
    device: str = "cpu"
    """Where the model is trained: cpu, cuda, cuda:1."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the weights. What a step changes are float32 copies of weights of bfloat16."""
    threads: NonNegativeInt = 0
    """0 for all cores that the process may use."""
    log_every: PositiveInt = 10
    eval_every: NonNegativeInt = 200
    """0 for once, at the end."""
    eval_bytes: PositiveInt = 65536
    """Bytes of held-out text that an evaluation reads."""
    save_every: NonNegativeInt = 500
    """0 for once, at the end."""

    @model_validator(mode="after")
    def _in_range(self) -> TrainSettings:
        if not any((self.steps, self.tokens, self.epochs, self.minutes)):
            raise ValueError("say when to stop: give steps, tokens, epochs or minutes")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)} are not in [0, 1)")
        if not 0 < self.cooldown <= 1:
            raise ValueError(f"cooldown = {self.cooldown} is not in (0, 1]; give the part of the run that decays")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is above lr = {self.lr}; give a smaller one")
        return self


# What a resumed run may say otherwise: how long, how often, how fast, and where things lie. Whether the corpus and the
# tokenizer are the same is seen from themselves.
FREE = frozenset(
    {"data.path", "data.tokenizer"}
    | {f"train.{key}" for key in ("out", "steps", "tokens", "epochs", "minutes", "device", "threads")}
    | {f"train.{key}" for key in ("log_every", "eval_every", "eval_bytes", "save_every")}
    | {f"train.{key}" for key in ("lr", "min_lr", "warmup", "decay", "cooldown", "clip")}
)


class TrainRecipe(Config):
    """A reproducible run. `model` has the keys of `ModelConfig`; its `vocab_size` may be left to the tokenizer."""

    title = "recipe"

    model: dict[str, Any]
    data: DataRecipe
    train: TrainSettings

    @field_validator("model")
    @classmethod
    def _readable(cls, model: dict[str, Any]) -> dict[str, Any]:
        """The table checked now and not after the data are read; with the vocabulary unknown, any will do."""
        ModelConfig.parse({"vocab_size": 1, **model})
        return model

    @classmethod
    def read(cls, path: Path | str, settings: Sequence[str] = ()) -> TrainRecipe:
        """Read a TOML recipe, apply settings such as `"train.lr=1e-3"`, and find its data from where it lies."""
        recipe = cls.parse(override(read_toml(path), settings))
        return recipe.model_copy(update={"data": recipe.data.beside(Path(path).parent)})

    def model_config_for(self, vocab_size: int) -> ModelConfig:
        """The model for a tokenizer of `vocab_size` ids. Raises `ConfigError` when the recipe asks for fewer."""
        config = ModelConfig.parse({"vocab_size": vocab_size, **self.model})
        if config.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size = {config.vocab_size} is smaller than the {vocab_size} ids of the tokenizer "
                f"{self.data.tokenizer!r}; leave vocab_size out, or give at least {vocab_size}"
            )
        return config

    def differences(self, other: TrainRecipe) -> dict[str, str]:
        """What this recipe says otherwise than `other`: dotted keys, and `"here (was: there)"`."""
        mine, theirs = (_flat(recipe.table()) for recipe in (self, other))
        return {
            key: f"{mine.get(key, 'unset')} (was: {theirs.get(key, 'unset')})"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        }


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
