"""Experts that were published as one tensor for all of them, read as if they had been published one by one.

`experts.gate_up_proj` `[experts, 2 width, d]`, `experts.up_proj` and `experts.down_proj`, as transformers holds them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property

from everstate.checkpoints.reader.base import Rows, TensorInfo, TensorReader

STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|up_proj|down_proj)")


def unstacked(reader: TensorReader) -> TensorReader:
    """The same tensors, stacks of experts taken apart."""
    stacks = {name for name, info in reader.infos.items() if STACK.fullmatch(name) and len(info.shape) == 3}
    return UnstackingReader(reader, stacks) if stacks else reader


class UnstackingReader(TensorReader):
    """Another reader's tensors, with each of `stacks` taken apart."""

    def __init__(self, reader: TensorReader, stacks: Collection[str]) -> None:
        self._reader, self._stacks = reader, frozenset(stacks)

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for name, info in self._reader.infos.items():
            if name not in self._stacks:
                found[name] = info
                continue
            experts, rows, columns = info.shape
            parts = _modules(name)
            for expert in range(experts):
                for part in parts:
                    found[_name(name, expert, part)] = info._replace(shape=(rows // len(parts), columns))
        return found

    def read(self, names: Collection[str]) -> Iterator[Rows]:
        wanted = set(names)
        there = [name for name, info in self._reader.infos.items() if wanted & self._made_of(name, info)]
        for rows in self._reader.read(there):
            if rows.name not in self._stacks:
                yield rows
                continue
            for i, matrix in enumerate(rows.values):
                parts = _modules(rows.name)
                for part, values in zip(parts, matrix.chunk(len(parts)), strict=True):
                    name = _name(rows.name, rows.start + i, part)
                    if name in wanted:
                        yield Rows(name, 0, values)

    def _made_of(self, name: str, info: TensorInfo) -> set[str]:
        """What becomes of a tensor: itself, or those of its experts."""
        if name not in self._stacks:
            return {name}
        return {_name(name, expert, module) for expert in range(info.shape[0]) for module in _modules(name)}


def _modules(stack: str) -> tuple[str, ...]:
    """The projections of which a stack holds the weights, one above the other."""
    own = stack.rpartition(".")[2]
    return ("gate_proj", "up_proj") if own == "gate_up_proj" else (own,)


def _name(stack: str, expert: int, module: str) -> str:
    return f"{stack.rpartition('.')[0]}.{expert}.{module}.weight"
