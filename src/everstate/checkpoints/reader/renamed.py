"""Tensors under other names, for checkpoints that were published in more than one way."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property

from everstate.checkpoints.reader.base import Rows, TensorInfo, TensorReader
from everstate.core.errors import CheckpointError


def renamed(reader: TensorReader, aliases: Sequence[tuple[str, str]]) -> TensorReader:
    """The same tensors, each pattern in a name replaced by what stands beside it."""
    names = {name: _renamed(name, aliases) for name in reader.infos}
    if all(name == other for name, other in names.items()):
        return reader
    return RenamingReader(reader, {other: name for name, other in names.items()})


def _renamed(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in aliases:
        name = re.sub(pattern, replacement, name)
    return name


class RenamingReader(TensorReader):
    """Another reader's tensors; `names` has the name there for each name here."""

    def __init__(self, reader: TensorReader, names: Mapping[str, str]) -> None:
        self._reader, self._names = reader, names
        if len(names) < len(reader.infos):
            lost = next(name for name in reader.infos if name not in names.values())
            raise CheckpointError(
                f"{reader.infos[lost].file}: tensor {lost} is there under two names; keep one of them"
            )

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: self._reader.infos[there] for name, there in self._names.items()}

    def read(self, names: Collection[str]) -> Iterator[Rows]:
        here = {self._names[name]: name for name in names}
        for rows in self._reader.read(here):
            yield rows._replace(name=here[rows.name])
