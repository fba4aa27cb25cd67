"""From a folder, a GGUF file or the hub to a model: our own format and the published ones."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

import torch

from everstate.checkpoints.files import read_metadata, read_tensors, write_tensors
from everstate.checkpoints.hub import fetch, fetch_tokenizer
from everstate.checkpoints.published import Published, Watch, load_published, open_published, stored_dtype
from everstate.checkpoints.reader import open_tensors
from everstate.core.device import device_named
from everstate.core.errors import CheckpointError, ConfigError, TokenizerError
from everstate.mixers.base import cast_
from everstate.models import LM, ModelConfig
from everstate.tokenizers import Tokenizer, fingerprint, load_tokenizer, save_tokenizer, tokenizer_of_gguf

FORMAT = "everstate 1"
WEIGHTS = "model.safetensors"


def save(model: LM, tokenizer: Tokenizer | None, path: Path | str) -> None:
    """Save a model and its tokenizer (None: without) into the folder `path`, made if need be.

    The weights and the config are one file that is replaced atomically: an interrupted save leaves the previous model.
    Raises `CheckpointError` when the disk refuses, and for weights of 8 bits.
    """
    folder = Path(path)
    refuse_quantised(model)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    name = "" if tokenizer is None else fingerprint(tokenizer)
    metadata = {"format": FORMAT, "config": model.config.to_toml(), "tokenizer": name}
    write_tensors(folder / WEIGHTS, model.state_dict(), metadata)


def refuse_quantised(model: LM) -> None:
    """Raise `CheckpointError` for weights that `quantize_` has rounded: no format here holds them."""
    if model.quantised:
        raise CheckpointError("8-bit weights cannot be saved; save the model as it was before quantize_")


def load(
    model: Path | str,
    *,
    tokenizer: Path | str | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> tuple[LM, Tokenizer]:
    """Load a model and its tokenizer.

    model: a folder that `save` or `export` wrote, a folder with a published model, a GGUF file, or the name of a
        repository on the hub, such as "state-spaces/mamba2-130m".
    tokenizer: the folder or the repository of the tokenizer, for a model that comes without one.
    revision: a branch, a tag or a commit of the repository.
    dtype: of the weights; None for that in which they are stored.
    watch: told how many bytes of how many were read.

    Raises `CheckpointError` when a file is missing, damaged, or of a model that we do not implement, `TokenizerError`
    when there is no tokenizer (`load_model` needs none), and `ConfigError` for a device that is not there.
    """
    device = device_named(device)
    path = fetch(model, revision=revision)
    if is_own(path):
        text = _own_tokenizer(path) if tokenizer is None else _tokenizer_at(tokenizer)
        return _load_own(path, device, dtype), text
    published = open_published(path)
    text = _published_tokenizer(published) if tokenizer is None else _tokenizer_at(tokenizer)
    return load_published(published, device=device, dtype=dtype, watch=watch), text


def load_model(
    model: Path | str,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> LM:
    """`load` without the tokenizer."""
    device = device_named(device)
    path = fetch(model, revision=revision)
    if is_own(path):
        return _load_own(path, device, dtype)
    return load_published(open_published(path), device=device, dtype=dtype, watch=watch)


def load_tokenizer_of(
    model: Path | str, *, tokenizer: Path | str | None = None, revision: str | None = None
) -> Tokenizer:
    """`load` without the model: the tokenizer that comes with it, that its authors name, or that is given."""
    if tokenizer is not None:
        return _tokenizer_at(tokenizer)
    path = fetch(model, revision=revision)
    return _own_tokenizer(path) if is_own(path) else _published_tokenizer(open_published(path))


class Summary(NamedTuple):
    """What is known of a model before its weights are read.

    nbytes: of all tensors that are used, as they are stored.
    skipped: published tensors that say nothing to a language model.
    """

    path: Path
    family: str
    config: ModelConfig
    dtype: torch.dtype
    nbytes: int
    skipped: tuple[str, ...]


def summary(model: Path | str, *, revision: str | None = None) -> Summary:
    """Look at a model; of its weights at most the names and shapes are read. Raises as `load` does."""
    path = fetch(model, revision=revision)
    if is_own(path):
        infos, config = open_tensors(path).infos, _own_config(path)
        dtype = infos["embedding.weight"].dtype
        return Summary(path, "everstate", config, dtype, sum(info.nbytes for info in infos.values()), ())
    published = open_published(path)
    infos = published.reader.infos
    used = sum(info.nbytes for name, info in infos.items() if name not in published.skipped)
    return Summary(path, published.family.name, published.config, stored_dtype(published), used, published.skipped)


def load_config(model: Path | str, *, revision: str | None = None) -> ModelConfig:
    """The config of a saved or published model; of its weights at most the names and shapes are read."""
    path = fetch(model, revision=revision)
    return _own_config(path) if is_own(path) else open_published(path).config


def is_own(path: Path) -> bool:
    """Whether a folder was written by `save`."""
    file = path / WEIGHTS
    return path.is_dir() and file.exists() and "config" in read_metadata(file)


def _load_own(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> LM:
    config = _own_config(path)
    weights, _ = read_tensors(path / WEIGHTS, device)
    model = LM(config, device="meta")
    _check_names(path / WEIGHTS, model, weights)
    model.load_state_dict(weights, assign=True)
    if dtype is not None:
        cast_(model, dtype)
    return model.requires_grad_(True)


def _own_tokenizer(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    saved = read_metadata(path / WEIGHTS).get("tokenizer", "")
    if saved not in ("", fingerprint(tokenizer)) or tokenizer.vocab_size > _own_config(path).vocab_size:
        raise CheckpointError(
            f"the tokenizer in {path} is not that of the model there, which was saved with another one; "
            "put the original tokenizer back, or save both again"
        )
    return tokenizer


def _published_tokenizer(published: Published) -> Tokenizer:
    """The tokenizer that comes with the model, or that its authors name."""
    if published.tokenizer is not None:
        return tokenizer_of_gguf(published.tokenizer)
    try:
        return load_tokenizer(published.path)
    except TokenizerError:
        named = dict(published.family.tokenizers).get(published.config.vocab_size)
        if named is None:
            raise
    return _tokenizer_at(named)


def _tokenizer_at(place: Path | str) -> Tokenizer:
    """The tokenizer of a folder or of a repository."""
    return load_tokenizer(fetch_tokenizer(place))


def _own_config(path: Path) -> ModelConfig:
    """The config in the metadata."""
    file = path / WEIGHTS
    metadata = read_metadata(file)
    if metadata.get("format") != FORMAT:
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
