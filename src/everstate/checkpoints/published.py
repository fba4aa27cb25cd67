"""Checkpoints in published formats: found out, checked against our model, and read into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from everstate.checkpoints.families import FAMILIES
from everstate.checkpoints.families.base import Entry, Family, agree, by_tensor, entries, fill_, published_shapes
from everstate.checkpoints.families.settings import Settings, read_json
from everstate.checkpoints.reader import TensorReader, dequantised, open_gguf, open_tensors, renamed, unstacked
from everstate.core.errors import CheckpointError, ConfigError, did_you_mean
from everstate.mixers.base import allocate_
from everstate.models import LM, ModelConfig

CONFIG, PARAMS, QUANTIZATION = "config.json", "params.json", "hf_quant_config.json"
SKIPPED = (r".*\.rotary_emb\.inv_freq",)
"""Tensors that are computed from the config, wherever they are stored."""

LEFT_OUT = dict.fromkeys(
    ("zamba", "zamba2"), "its shared blocks are no residual blocks (docs/decisions/0007-no-zamba.md)"
)

Watch: TypeAlias = Callable[[int, int], None]
"""Told after each tensor how many bytes were read, and how many there are."""


class Published(NamedTuple):
    """A published checkpoint whose weights have not been read.

    table: which of its tensors is which of ours.
    skipped: tensors of it that say nothing to a language model, such as a head that predicts several tokens.
    tokenizer: the fields of a GGUF file's own tokenizer; None where it is a file beside the weights.
    """

    path: Path
    family: Family
    config: ModelConfig
    reader: TensorReader
    table: list[Entry]
    skipped: tuple[str, ...]
    tokenizer: Mapping[str, Any] | None


def open_published(path: Path) -> Published:
    """Find out what lies in a folder, or in a GGUF file, without reading its weights.

    Raises `CheckpointError` for a missing or damaged file, a family that we do not know, a setting or a quantisation
    that we do not implement, and for a tensor that is missing, left over, or of another shape than the config makes it.
    """
    if path.suffix == ".gguf":
        table, reader, fields = open_gguf(path)
        return _published(path, table, reader, path, fields)
    file = next((path / name for name in (CONFIG, PARAMS) if (path / name).exists()), None)
    if file is None:
        raise CheckpointError(
            f"{path} holds neither a model that everstate saved nor {CONFIG} or {PARAMS} of a published one; give the "
            "folder of a model"
        )
    table = read_json(file)
    quantization = table.get("quantization_config")
    if quantization is None and (path / QUANTIZATION).exists():
        quantization = read_json(path / QUANTIZATION)
    return _published(path, table, dequantised(open_tensors(path), quantization), file, None)


def _published(
    path: Path, table: Mapping[str, Any], reader: TensorReader, file: Path, fields: Mapping[str, Any] | None
) -> Published:
    family = family_of(table, file)
    reader = unstacked(renamed(reader, family.aliases))
    shapes = {name: info.shape for name, info in reader.infos.items()}
    config = read_config(family, table, shapes, file)
    skipped = re.compile("|".join((*SKIPPED, *family.skipped)))
    model = LM(config, device="meta")
    table_of = entries(model, family.names(config))
    unused = tuple(name for name in shapes if skipped.fullmatch(name))
    published = Published(path, family, config, reader, table_of, unused, fields)
    _check(published, published_shapes(model, table_of))
    return published


def family_of(table: Mapping[str, Any], file: Path) -> Family:
    """The family that a published config belongs to."""
    if file.name == PARAMS:
        return FAMILIES["codestral"]
    name = table.get("model_type")
    if name is None and "d_model" in table and "n_layer" in table:
        return FAMILIES["mamba_ssm"]
    if name in LEFT_OUT:
        raise CheckpointError(f"{file}: model_type {name!r} is left out: {LEFT_OUT[name]}; run it with transformers")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"{file}: model_type {name!r} is not implemented; {did_you_mean(str(name), FAMILIES)}")
    return FAMILIES[name]


def read_config(
    family: Family, table: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file: Path | str
) -> ModelConfig:
    """Our config of a published one, every key of which was obeyed."""
    settings = Settings(table, file)
    try:
        config = family.read(settings, shapes)
        settings.closed()
        LM(config, device="meta")
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return config


def load_published(
    published: Published,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> LM:
    """Read the weights, tensor by tensor, straight to where they belong.

    dtype: None for that of the published embedding. Raises `CheckpointError` when a file is damaged, or when the head
    is said to be the embedding and is not.
    """
    model = LM(published.config, device="meta", dtype=stored_dtype(published) if dtype is None else dtype)
    allocate_(model, device)
    _fill(model, published.reader, published.table, watch)
    copy = _copied_head(published)
    if copy is not None:
        _check_tied(model, published, copy)
    return model.requires_grad_(True)


def stored_dtype(published: Published) -> torch.dtype:
    """The dtype of the published embedding, which is that of the model."""
    return published.reader.infos[f"{published.family.names(published.config)['embedding']}.weight"].dtype


def _copied_head(published: Published) -> str | None:
    """The published head of a model whose head is its embedding, if it is stored a second time."""
    name = f"{published.family.names(published.config)['head']}.weight"
    return name if published.config.tie_embeddings and name in published.reader.infos else None


def _check(published: Published, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Every published tensor is used once and has the shape that the model has for it; none is missing."""
    infos, copy = published.reader.infos, _copied_head(published)
    for name, shape in wanted.items():
        if name not in infos:
            raise CheckpointError(
                f"{published.path}: tensor {name} {shape} is missing; the download is not complete, or the config "
                "belongs to another model"
            )
        if not agree(infos[name].shape, shape):
            raise CheckpointError(
                f"{infos[name].file}: tensor {name} is {infos[name].shape} and the config makes it {shape}; "
                "the config belongs to another model"
            )
    for name, info in infos.items():
        if name not in wanted and name != copy and name not in published.skipped:
            raise CheckpointError(
                f"{info.file}: tensor {name} {info.shape} has no place in a {published.family.name} model of this "
                "config; the config belongs to another model"
            )


@torch.no_grad()
def _fill(model: LM, reader: TensorReader, table: list[Entry], watch: Watch | None) -> None:
    weights = model.state_dict()
    uses = by_tensor(table)
    done, total = 0, sum(reader.infos[name].nbytes for name in uses)
    for name, start, values in reader.read(uses):
        for entry in uses[name]:
            fill_(weights[entry.ours], entry, start, values)
        done += values.numel() * reader.infos[name].dtype.itemsize
        if watch is not None:
            watch(done, total)


def _check_tied(model: LM, published: Published, copy: str) -> None:
    embedding = model.embedding.weight.detach()
    for _, start, rows in published.reader.read([copy]):
        held = embedding[start : start + len(rows)]
        if not torch.equal(rows.to(held.dtype), held.cpu()):
            raise CheckpointError(
                f"{published.reader.infos[copy].file}: tensor {copy} differs from the embedding, to which the config "
                "ties it; set tie_word_embeddings (tie_embeddings) to false in the config"
            )
