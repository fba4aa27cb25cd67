"""A state in a file: fixed size however much was read, refused when damaged or when it belongs to another model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.checkpoints import read_tensors, write_tensors
from everstate.core.errors import CheckpointError
from everstate.core.state import map_state, named_tensors
from everstate.mixers import State
from everstate.models import LM

FORMAT = "everstate state 1"


class Snapshot(NamedTuple):
    """What continuing takes.

    state: the state of one sequence, made with `init_state(1, context=context)`.
    logits: those of the next token; None before the first.
    tokens_read: how many tokens the state has read.
    """

    state: State
    context: int | None
    logits: Float[Tensor, " v"] | None
    tokens_read: int


def save_snapshot(path: Path | str, model: LM, snapshot: Snapshot) -> None:
    """Write a snapshot atomically. It holds the conversation: treat the file as a secret."""
    tensors = {f"state.{name}": tensor for name, tensor in named_tensors(snapshot.state)}
    if snapshot.logits is not None:
        tensors["logits"] = snapshot.logits
    metadata = {
        "format": FORMAT,
        "model": fingerprint(model),
        "tokens_read": str(snapshot.tokens_read),
        "context": "" if snapshot.context is None else str(snapshot.context),
        "checksum": _checksum(tensors),
    }
    write_tensors(Path(path), tensors, metadata)


def load_snapshot(path: Path | str, model: LM) -> Snapshot:
    """Read a snapshot. Raises `CheckpointError` when it is missing, damaged, altered, or of another model."""
    tensors, metadata = read_tensors(Path(path), model.device)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} says format {metadata.get('format', 'nothing')!r} and is no saved state ({FORMAT!r})"
        )
    if metadata.get("checksum") != _checksum(tensors):
        raise CheckpointError(f"{path} was altered since it was written: its checksum does not match; use another copy")
    if metadata.get("model") != fingerprint(model):
        raise CheckpointError(
            f"{path} is the state of another model: weights or config differ; load the model it was saved with"
        )
    context = int(metadata["context"]) if metadata["context"] else None
    empty = model.init_state(1, context=context)
    names = iter([name for name, _ in named_tensors(empty)])
    state = map_state(lambda _: tensors[f"state.{next(names)}"], empty)
    return Snapshot(state, context, tensors.get("logits"), int(metadata["tokens_read"]))


def fingerprint(model: LM) -> str:
    """A digest of config and weights: equal for equal models, on any device."""
    return _checksum({**model.state_dict()}, model.config.to_toml())


def _checksum(tensors: dict[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
