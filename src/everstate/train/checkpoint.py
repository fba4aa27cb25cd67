"""The one file that commits a training run.

`training.safetensors` holds everything a run needs to go on: weights, optimizer, carried states, place in the data,
figures not yet written. It is replaced atomically, and only afterwards is the model folder (`everstate.save`) written
again from the same weights, as a copy for readers. So whenever the process dies, the training file is one complete
checkpoint and resuming reads nothing else; at worst the model beside it is one checkpoint older, until the run resumes.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from everstate.checkpoints import read_tensors, write_tensors
from everstate.core.errors import CheckpointError, ConfigError
from everstate.train.config import FREE, TrainRecipe

FILE = "training.safetensors"
FORMAT = "everstate training 1"


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps: its recipe, its tensors by dotted names, and its plain values."""

    recipe: TrainRecipe
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors `name.*`, without that prefix."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def write(self, folder: Path) -> None:
        """Commit. Raises `CheckpointError` when the disk refuses; the checkpoint before is then unchanged."""
        metadata = {"format": FORMAT, "recipe": self.recipe.to_toml(), "values": json.dumps(self.values)}
        # A pool and its rows may share memory, which the format refuses; a checkpoint is a copy.
        write_tensors(folder / FILE, {k: t.detach().clone() for k, t in self.tensors.items()}, metadata)

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """The checkpoint in `folder`. Raises `CheckpointError` when there is none that this version can read."""
        file = folder / FILE
        if not file.exists():
            raise CheckpointError(f"{folder} holds no training run to resume; leave --resume out, or check train.out")
        tensors, metadata = read_tensors(file)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{file} says format {metadata.get('format', 'nothing')!r} and this version reads {FORMAT!r}; "
                "resume it with the version that wrote it"
            )
        try:
            recipe = TrainRecipe.parse(tomllib.loads(metadata["recipe"]))
            return cls(recipe, tensors, json.loads(metadata["values"]))
        except (ConfigError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} holds a recipe that this version cannot read: {error}") from None


def refuse_foreign(folder: Path) -> None:
    """Raise `CheckpointError` unless a new run may begin in `folder`: it is not there, or holds nothing visible."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; choose another train.out")
    if (folder / FILE).exists():
        raise CheckpointError(f"{folder} holds a training run; continue it with --resume, or choose another train.out")
    if folder.is_dir():
        # Hidden files may be what a save left behind that was killed before the first commit.
        visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if visible:
            raise CheckpointError(
                f"{folder} is not empty ({sorted(visible)[0]} is there) and no training run of ours; "
                "choose another train.out"
            )


def refuse_another(recipe: TrainRecipe, saved: TrainRecipe, folder: Path) -> None:
    """Raise `ConfigError` when the run in `folder` has another recipe, in keys that decide what the run is."""
    changed = [f"{key} = {change}" for key, change in recipe.differences(saved).items() if key not in FREE]
    if changed:
        raise ConfigError(
            f"the run in {folder} has another recipe: {', '.join(changed)}; give these the values that they had, "
            "or begin a new run in another train.out"
        )


def sweep(folder: Path) -> None:
    """Remove what saves left behind that were killed while they wrote."""
    for left in folder.glob(".*.safetensors.*"):
        left.unlink(missing_ok=True)
