"""What a family is: a two-way table between a published checkpoint format and ours.

No number changes on the way in either direction; only names, shapes and the order of rows do. So a checkpoint that was
loaded and exported is the one that was published, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from everstate.checkpoints.families.settings import Settings
from everstate.models import LM, ModelConfig

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]
Rows: TypeAlias = slice | Tensor
"""Some rows of a tensor: a range with both ends, or their indices in order."""
Place: TypeAlias = tuple[int | slice, ...]


def same_shape(shape: Shape) -> Shape:
    """For a tensor that is published as we hold it."""
    return shape


def convolution(shape: Shape) -> Shape:
    """The weight of a depthwise convolution is published as `[channels, 1, width]`."""
    return (shape[0], 1, shape[1])


@dataclass(frozen=True)
class Part:
    """Where a tensor of ours, or the next rows of it, are published.

    theirs: the name of a published tensor or module; `{}` stands for the number of an expert.
    rows: how many rows of ours these are; None for an equal share.
    of: which rows of the published tensor; None for all.
    published: the shape in which a tensor of the given shape is published.
    """

    theirs: str
    rows: int | None = None
    of: Rows | None = None
    published: Callable[[Shape], Shape] = same_shape


Names: TypeAlias = dict[str, str | Part | tuple[Part | str, ...]]
"""Our module or parameter -> where it is published. Several parts stand one after the other along the first dimension
(of each expert, if the names have a place for its number)."""


class Entry(NamedTuple):
    """One published tensor, or rows of it, and the place in one of our tensors that holds the same numbers."""

    theirs: str
    of: Rows | None
    ours: str
    place: Place
    published: Callable[[Shape], Shape]


@dataclass(frozen=True)
class Family:
    """One published format.

    read: the published config, and the shapes of the tensors where it leaves something open, to our config.
    write: the way back, from our config and the complete table of each block (`described`).
    names: our modules to the published names, for a config; it may name modules that a model does not have.
    skipped: regular expressions of published tensors that say nothing to a language model.
    aliases: regular expressions of other names under which tensors were published, and the names that `names` has.
    tokenizers: for checkpoints that come without a tokenizer, size of the vocabulary and the tokenizer's repository.
    stores_tied_head: whether a head that is tied to the embedding is stored a second time.
    """

    name: str
    read: Callable[[Settings, Shapes], ModelConfig]
    write: Callable[[ModelConfig, Blocks], dict[str, Any]]
    names: Callable[[ModelConfig], Names]
    skipped: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    tokenizers: tuple[tuple[int, str], ...] = ()
    stores_tied_head: bool = False
    config_file: str = "config.json"
    weights_file: str = "model.safetensors"


Blocks: TypeAlias = Sequence[dict[str, Any]]
"""The table of each block in order, every setting given."""


def under(ours: str, theirs: str, names: Names) -> Names:
    """The same names inside a module of ours and of theirs; the name "" is the module itself."""
    return {f"{ours}.{name}".rstrip("."): _inside(theirs, where) for name, where in names.items()}


def _inside(theirs: str, where: str | Part | tuple[Part | str, ...]) -> str | Part | tuple[Part | str, ...]:
    if isinstance(where, Part):
        return replace(where, theirs=f"{theirs}.{where.theirs}")
    if isinstance(where, str):
        return f"{theirs}.{where}"
    return tuple(
        replace(part, theirs=f"{theirs}.{part.theirs}") if isinstance(part, Part) else f"{theirs}.{part}"
        for part in where
    )


def entries(model: LM, names: Names) -> list[Entry]:
    """The table of a model, one or more entries for each of its tensors."""
    found: list[Entry] = []
    for ours, tensor in model.state_dict().items():
        module = next((m for m in _prefixes(ours) if m in names), None)
        assert module is not None, f"the family has no name for {ours}"
        where = names[module]
        parts = where if isinstance(where, tuple) else (where,)
        found += _entries_of(
            ours, tuple(tensor.shape), [Part(p) if isinstance(p, str) else p for p in parts], ours[len(module) :]
        )
    return found


def _prefixes(name: str) -> Iterator[str]:
    """A name and the modules that it lies in, the innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _entries_of(ours: str, shape: Shape, parts: Sequence[Part], suffix: str) -> Iterator[Entry]:
    experts = range(shape[0]) if any("{}" in part.theirs for part in parts) else None
    for expert in [None] if experts is None else experts:
        start, count = 0, shape[0 if expert is None else 1]
        for part in parts:
            end = start + (count // len(parts) if part.rows is None else part.rows)
            rows: Place = () if len(parts) == 1 else (slice(start, end),)
            theirs = part.theirs if expert is None else part.theirs.replace("{}", str(expert))
            place = rows if expert is None else (expert, *rows)
            yield Entry(theirs + suffix, part.of, ours, place, part.published)
            start = end


def published_shapes(model: LM, table: Sequence[Entry]) -> dict[str, Shape]:
    """The shape that every published tensor must have to fill a model."""
    weights, shapes = model.state_dict(), {}
    for theirs, group in by_tensor(table).items():
        parts = [entry.published(tuple(weights[entry.ours][entry.place].shape)) for entry in group]
        shapes[theirs] = parts[0] if group[0].of is None else (sum(part[0] for part in parts), *parts[0][1:])
    return shapes


def agree(one: Shape, other: Shape) -> bool:
    """Whether two shapes are one but for dimensions of size 1.

    Those come and go: `[channels, 1, width]` has been republished as `[channels, width, 1]`.
    """
    return [size for size in one if size != 1] == [size for size in other if size != 1]


def fill_(target: Tensor, entry: Entry, start: int, published: Tensor) -> None:
    """Copy what an entry has of some published rows, the first of which is row `start`, into our tensor."""
    place, end = target[entry.place], start + (len(published) if published.ndim else 1)
    if entry.of is None:
        rows = place if place.numel() == published.numel() else place[start:end]
        rows.copy_(published.reshape(rows.shape))
    elif isinstance(entry.of, slice):
        first, last = max(entry.of.start, start), min(entry.of.stop, end)
        if first < last:
            rows = place[first - entry.of.start : last - entry.of.start]
            rows.copy_(published[first - start : last - start].reshape(rows.shape))
    else:
        here = ((entry.of >= start) & (entry.of < end)).nonzero()[:, 0]
        place[here.to(place.device)] = published[entry.of[here] - start].to(place)


def published_tensors(weights: Mapping[str, Tensor], table: Sequence[Entry]) -> dict[str, Tensor]:
    """Our tensors under their published names and in their published shapes: views of ours where that is possible."""
    return {name: _assembled(weights, group) for name, group in by_tensor(table).items()}


def by_tensor(table: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries of each published tensor."""
    grouped: dict[str, list[Entry]] = {}
    for entry in table:
        grouped.setdefault(entry.theirs, []).append(entry)
    return grouped


def _assembled(weights: Mapping[str, Tensor], group: Sequence[Entry]) -> Tensor:
    parts = [_published(weights[entry.ours][entry.place], entry) for entry in group]
    if len(group) == 1 and group[0].of is None:
        return parts[0]
    whole = torch.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for entry, part in zip(group, parts, strict=True):
        whole[entry.of] = part
    return whole


def _published(tensor: Tensor, entry: Entry) -> Tensor:
    return tensor.detach().reshape(entry.published(tuple(tensor.shape)))
