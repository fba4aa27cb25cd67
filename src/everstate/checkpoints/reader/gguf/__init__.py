"""GGUF files of llama.cpp, read as if they had been published by the authors of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everstate.checkpoints.reader.base import Rows, TensorInfo, TensorReader, parts
from everstate.checkpoints.reader.gguf.file import GGUFFile
from everstate.checkpoints.reader.gguf.models import ARCHITECTURES
from everstate.checkpoints.reader.gguf.origin import Origin
from everstate.core.errors import CheckpointError, did_you_mean

__all__ = ["open_gguf"]


def open_gguf(path: Path) -> tuple[dict[str, Any], TensorReader, dict[str, Any]]:
    """A published config, the tensors under their published names, and the fields of the tokenizer.

    What llama.cpp folded, merged, split and permuted is undone, and blocks of few bits are multiplied out as they are
    read. Raises `CheckpointError` for a damaged file, an architecture or a type of numbers that we do not implement.
    """
    file = GGUFFile(path)
    name = file.architecture
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {name!r} is not implemented; {did_you_mean(name, ARCHITECTURES)}")
    config, origins = ARCHITECTURES[name](file)
    used = {tensor for origin in origins.values() for tensor in origin.tensors}
    stray = [tensor for tensor in file.tensors if tensor not in used and not file.is_skipped(tensor)]
    if stray:
        raise CheckpointError(f"{path}: tensor {stray[0]} has no place in a model of architecture {name!r}")
    return config, GGUFReader(file, origins), file.tokenizer


class GGUFReader(TensorReader):
    """The tensors of a file by their published names; `origins` says of what each is made."""

    def __init__(self, file: GGUFFile, origins: Mapping[str, Origin]) -> None:
        self._file, self._origins = file, origins
        missing = next(
            (name for origin in origins.values() for name in origin.tensors if name not in file.tensors), None
        )
        if missing is not None:
            raise CheckpointError(f"{file.path}: tensor {missing} is missing; download the file again")

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: self._info(origin) for name, origin in self._origins.items()}

    def read(self, names: Collection[str]) -> Iterator[Rows]:
        wanted = set(names)
        for name in self._origins:
            if name not in wanted:
                continue
            origin = self._origins[name]
            if not origin.is_plain:
                yield Rows(name, 0, self._values(origin))
                continue
            for _, start, end in parts(name, self.infos[name]):
                yield Rows(name, start, self._file.values(origin.tensors[0], slice(start, end)))

    def _info(self, origin: Origin) -> TensorInfo:
        shapes = [self._file.shape(name)[0 if origin.expert is None else 1 :] for name in origin.tensors]
        shape = shapes[0]
        if len(shapes) > 1:
            shape = (*shape[:-2], sum(each[-2] for each in shapes), shape[-1])
        if origin.flat:
            shape = (torch.Size(shape).numel(),)
        return TensorInfo(shape, self._file.dtype(origin.tensors[0]), self._file.path)

    def _values(self, origin: Origin) -> Tensor:
        parts = [self._file.values(name, origin.expert) for name in origin.tensors]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
        return origin.form(whole.flatten() if origin.flat else whole)
