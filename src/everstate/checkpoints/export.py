"""Our models in published formats, for the programs that read those."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from everstate.checkpoints.families import FAMILIES
from everstate.checkpoints.families.base import Family, entries, published_shapes, published_tensors
from everstate.checkpoints.families.describe import described, differences
from everstate.checkpoints.load import refuse_quantised
from everstate.checkpoints.published import read_config
from everstate.core.errors import CheckpointError
from everstate.models import LM
from everstate.tokenizers import Tokenizer, save_tokenizer

SHARD = "5GB"


def export(
    model: LM, path: Path | str, family: str, *, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a model into the new folder `path` in the published format of a family, such as "mamba2".

    dtype: of the weights; None for that which each has. The folder appears whole or not at all. Raises
    `CheckpointError` when the format cannot say what the model is, with the setting that stands in the way, when the
    folder is not empty, or when the disk refuses.
    """
    folder, chosen = Path(path), FAMILIES[family]
    check_new(folder)
    refuse_quantised(model)
    config = {**written_config(model, chosen), **_special_tokens(tokenizer)}
    if "architectures" in config:
        config["torch_dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    weights = _published_weights(model, chosen)
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            place = Path(temporary) / folder.name
            place.mkdir()
            _write_weights(place, chosen, weights)
            if tokenizer is not None:
                _write_tokenizer(place, tokenizer)
            (place / chosen.config_file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            place.rename(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}; nothing was written") from None


def check_new(folder: Path) -> None:
    """Raise `CheckpointError` when a folder that is to be written has something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there and not empty; give a new folder, so that nothing is lost")


def written_config(model: LM, family: Family) -> dict[str, Any]:
    """The published config of a model, which is read back to see that it says what the model is."""
    config = model.config
    refused = f"a model of layout {config.layout!r} cannot be written as {family.name!r}"
    try:
        table = family.write(config, described(config))
        names = family.names(config)
        back = read_config(family, table, published_shapes(model, entries(model, names)), family.config_file)
    except (KeyError, AssertionError):
        raise CheckpointError(f"{refused}, which has no such layers; write it as 'everstate'") from None
    found = differences(config, back)
    if found:
        raise CheckpointError(f"{refused}, which would change {found[0]}; write it as 'everstate'")
    return table


def _published_weights(model: LM, family: Family) -> dict[str, Tensor]:
    names = family.names(model.config)
    weights = published_tensors(model.state_dict(), entries(model, names))
    if family.stores_tied_head and model.config.tie_embeddings:
        weights[f"{names['head']}.weight"] = model.embedding.weight.detach().clone()
    return weights


def _special_tokens(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    ends = {"eos_token_id": list(tokenizer.eos_ids)} if tokenizer.eos_ids else {}
    return {**ends, **({} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id})}


def _write_weights(folder: Path, family: Family, weights: Mapping[str, Tensor]) -> None:
    if family.weights_file.endswith(".bin"):
        torch.save(
            {name: tensor.cpu().contiguous().clone() for name, tensor in weights.items()}, folder / family.weights_file
        )
        return
    stem = family.weights_file.removesuffix(".safetensors")
    split = split_torch_state_dict_into_shards(
        dict(weights), max_shard_size=SHARD, filename_pattern=stem + "{suffix}.safetensors"
    )
    for file, names in split.filename_to_tensors.items():
        # A copy where two names share memory, which the format refuses.
        part = {name: weights[name].cpu().contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{family.weights_file}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's own files, and beside a `tokenizer.json` the one by which transformers finds it."""
    save_tokenizer(tokenizer, folder)
    if not (folder / "tokenizer.json").exists():
        return
    tokens = {} if tokenizer.chat is None else dict(tokenizer.chat.tokens)
    table = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
