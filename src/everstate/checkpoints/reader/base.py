"""What reading the tensors of a checkpoint means, whatever files they lie in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as it is read."""
        return prod(self.shape) * self.dtype.itemsize


class Rows(NamedTuple):
    """Some rows of a tensor, from `start` on; all of it, if it is small.

    values: on the CPU, valid until the next rows are asked for.
    """

    name: str
    start: int
    values: Tensor


class TensorReader(ABC):
    """The tensors of a checkpoint by name, read in parts, so that reading all takes the memory of a few parts."""

    @property
    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order of the files. Nothing is read for it."""

    @abstractmethod
    def read(self, names: Collection[str]) -> Iterator[Rows]:
        """The named tensors in the order of the files, each row once and in order.

        Raises `CheckpointError` when a file is damaged.
        """


PART = 16 * 2**20
"""Bytes of a tensor that are read at once."""
GROUP = 4 * PART
"""Bytes that are read before a memory map is made anew, because its pages count as memory of the process until then."""


class Range(NamedTuple):
    """Some rows of a tensor; a scalar has none, from 0 to 0."""

    name: str
    start: int
    end: int


def groups(infos: Mapping[str, TensorInfo], names: Sequence[str]) -> Iterator[list[Range]]:
    """The rows of some tensors in parts of at most `PART` bytes, as many together as make `GROUP`."""
    group, size = [], 0
    for name in names:
        for part in parts(name, infos[name]):
            group.append(part)
            size += min(infos[name].nbytes, PART)
            if size >= GROUP:
                yield group
                group, size = [], 0
    yield group


def parts(name: str, info: TensorInfo) -> Iterator[Range]:
    """The rows of a tensor in parts of at most `PART` bytes."""
    if not info.shape:
        yield Range(name, 0, 0)
        return
    rows = max(1, PART * info.shape[0] // max(info.nbytes, 1))
    for start in range(0, info.shape[0], rows):
        yield Range(name, start, min(start + rows, info.shape[0]))


def read_whole(reader: TensorReader, names: Collection[str]) -> dict[str, Tensor]:
    """The named tensors in memory of their own: for a few small ones."""
    found: dict[str, list[Tensor]] = {}
    for name, _, values in reader.read(names):
        found.setdefault(name, []).append(values.clone())
    return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in found.items()}
