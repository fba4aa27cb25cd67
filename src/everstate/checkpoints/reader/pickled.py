"""Tensors in PyTorch's `.bin` files, which are pickles: only tensors are taken from them, and no code is ever run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everstate.checkpoints.reader.base import Rows, TensorInfo, TensorReader, groups
from everstate.core.errors import CheckpointError

WRAPPERS = ("state_dict", "model")
"""Keys under which a file may hold the table of its tensors."""


class PickledReader(TensorReader):
    """The tensors of some `.bin` files, no name twice."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for path in self._files:
            for name, tensor in tensors_of(path).items():
                if name in found:
                    raise CheckpointError(f"tensor {name} is in {found[name].file} and in {path}; keep one of them")
                found[name] = TensorInfo(tuple(tensor.shape), tensor.dtype, path)
        return found

    def read(self, names: Collection[str]) -> Iterator[Rows]:
        wanted = set(names)
        for path in self._files:
            here = [name for name, info in self.infos.items() if info.file == path and name in wanted]
            tensors, mapped = tensors_of(path), zipfile.is_zipfile(path)
            for group in groups(self.infos, here):
                for name, start, end in group:
                    yield Rows(name, start, tensors[name][start:end] if end else tensors[name])
                if mapped:  # the pages of a memory map count as memory until it is gone; an old file is read but once
                    tensors = {}
                    tensors = tensors_of(path)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The table of tensors in a file, mapped into memory where its format allows it."""
    try:
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the download is not complete: download it again") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and wants to run code, or it is damaged. Nothing was run; "
            "use a safetensors version of the model"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no PyTorch file ({first}); download it again") from None
    return _checked(
        path, next((table[key] for key in WRAPPERS if _is_table(table) and _is_table(table.get(key))), table)
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _checked(path: Path, table: Any) -> dict[str, Tensor]:
    if not _is_table(table):
        raise CheckpointError(f"{path} holds a {type(table).__name__} and no table of tensors; use another file")
    for name, tensor in table.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(tensor).__name__} and no tensor; use another file")
    return table
