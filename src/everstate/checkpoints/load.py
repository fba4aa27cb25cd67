"""Our own format: a folder with `model.safetensors`, whose metadata holds the config, and the tokenizer's file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import torch

from everstate.checkpoints.files import read_metadata, read_tensors, write_tensors
from everstate.core.errors import CheckpointError, ConfigError
from everstate.mixers.base import cast_
from everstate.models import LM, ModelConfig
from everstate.tokenizers import Tokenizer, fingerprint, load_tokenizer, save_tokenizer

FORMAT = "everstate 1"
WEIGHTS = "model.safetensors"


def save(model: LM, tokenizer: Tokenizer | None, path: Path | str) -> None:
    """Save a model and its tokenizer (None: without) into the folder `path`, made if need be.

    The weights and the config are one file that is replaced atomically: an interrupted save leaves the previous model.
    Raises `CheckpointError` when the disk refuses.
    """
    folder = Path(path)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    name = "" if tokenizer is None else fingerprint(tokenizer)
    metadata = {"format": FORMAT, "config": model.config.to_toml(), "tokenizer": name}
    write_tensors(folder / WEIGHTS, model.state_dict(), metadata)


def load(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[LM, Tokenizer]:
    """Load the model and the tokenizer that `save` wrote, on `device`, in `dtype` (None: as saved).

    Raises `CheckpointError` when a file is missing, truncated, of another program or of another model.
    """
    model, tokenizer = load_model(path, device=device, dtype=dtype), load_tokenizer(Path(path))
    saved = read_metadata(_weights_file(path)).get("tokenizer", "")
    if saved not in ("", fingerprint(tokenizer)) or tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {path} is not that of the model there, which was saved with another one; "
            "put the original tokenizer back, or save both again"
        )
    return model, tokenizer


def load_model(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LM:
    """`load` without the tokenizer."""
    file = _weights_file(path)
    weights, metadata = read_tensors(file, device)
    model = LM(_config(file, metadata), device="meta")
    _check_names(file, model, weights)
    model.load_state_dict(weights, assign=True)
    if dtype is not None:
        cast_(model, dtype)
    return model.requires_grad_(True)


def load_config(path: Path | str) -> ModelConfig:
    """The config of a saved model, without its weights."""
    file = _weights_file(path)
    return _config(file, read_metadata(file))


def _weights_file(path: Path | str) -> Path:
    if not Path(path).is_dir():
        raise CheckpointError(f"{path} is no folder; give the folder that everstate.save or everstate train wrote")
    return Path(path) / WEIGHTS


def _config(file: Path, metadata: dict[str, str]) -> ModelConfig:
    """The config in the metadata."""
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise CheckpointError(
            f"{file} says format {metadata.get('format', 'nothing')!r} and this version reads {FORMAT!r}; "
            "save it again with the version that wrote it, or update everstate"
        )
    try:
        return ModelConfig.parse(tomllib.loads(metadata["config"]))
    except (ConfigError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"{file} holds a config that this version cannot read: {error}") from None


def _check_names(file: Path, model: LM, weights: dict[str, torch.Tensor]) -> None:
    """Every tensor used once, every parameter filled once, every shape as the config says."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise CheckpointError(
                f"{file}: tensor {name!r} is {given.get(name, 'missing')} in the file and "
                f"{wanted.get(name, 'unknown')} in the model of its config; the file belongs to another model"
            )
