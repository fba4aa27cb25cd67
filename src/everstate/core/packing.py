"""Several sequences end to end in one row: the one convention for documents, ragged prompts and mixed batches.

`x` is `(1, total, d)` and the state's batch is the number of sequences. Time is never padded at a model's border.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from everstate.core.errors import RequestError
from everstate.core.state import concat, map_state

S = TypeVar("S")


class Packing:
    """Where each sequence of a packed row begins and ends.

    `cu_seqlens` are the cumulative lengths `(0, l_0, l_0 + l_1, ..., total)`, kept on the host so that no shape needs a
    device to answer. Raises `RequestError` when they do not start at 0 or do not increase.
    """

    def __init__(self, cu_seqlens: Sequence[int] | Int[Tensor, " n1"]) -> None:
        values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
        self.cu_seqlens = tuple(int(v) for v in values)
        rising = all(a < b for a, b in pairwise(self.cu_seqlens))
        if len(self.cu_seqlens) < 2 or self.cu_seqlens[0] != 0 or not rising:
            raise RequestError(
                f"cu_seqlens {self.cu_seqlens} cannot be packed; give 0 and then the end of each sequence, "
                "each larger than the one before (no empty sequence)"
            )

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Packing:
        """The packing of sequences of these lengths."""
        return cls([0, *accumulate(lengths)])

    def __repr__(self) -> str:
        return f"Packing({self.cu_seqlens})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packing) and self.cu_seqlens == other.cu_seqlens

    def __hash__(self) -> int:
        return hash(self.cu_seqlens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length of each sequence, in tokens."""
        return tuple(b - a for a, b in pairwise(self.cu_seqlens))

    @property
    def total(self) -> int:
        """Length of the packed row, in tokens."""
        return self.cu_seqlens[-1]

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def slices(self) -> list[slice]:
        """The place of each sequence in the row."""
        return [slice(a, b) for a, b in pairwise(self.cu_seqlens)]

    def starts(self, device: torch.device) -> Int[Tensor, " n"]:
        """Index of the first token of each sequence."""
        return _starts(self, device)

    def ends(self, device: torch.device) -> Int[Tensor, " n"]:
        """Index of the last token of each sequence."""
        return _ends(self, device)

    def sequence_ids(self, device: torch.device) -> Int[Tensor, " total"]:
        """Which sequence each token belongs to."""
        return _sequence_ids(self, device)

    def positions(self, device: torch.device) -> Int[Tensor, " total"]:
        """Position of each token within its own sequence."""
        return _positions(self, device)

    def check(self, batch: int, length: int, sequences: int | None = None) -> None:
        """Raise `RequestError` unless a `(batch, length)` input and a state of `sequences` rows fit this packing."""
        if (batch, length) != (1, self.total):
            raise RequestError(
                f"a packed input must be one row of {self.total} tokens, as its Packing says, and is "
                f"{batch} x {length}; concatenate the sequences along time"
            )
        if sequences is not None and sequences != len(self):
            raise RequestError(
                f"the state has {sequences} rows and the Packing {len(self)} sequences; "
                f"make it with init_state({len(self)})"
            )

    def pad(self, x: Shaped[Tensor, "1 total ..."], fill: float = 0.0) -> Shaped[Tensor, "n longest ..."]:
        """One row per sequence, filled up at the end, for implementations to which `fill` means "nothing happens"."""
        if self._equal:
            return x[0].unflatten(0, (len(self), -1))
        padded = x.new_full((len(self), max(self.lengths), *x.shape[2:]), fill)
        return padded.index_put(self._places(x.device), x[0])

    def unpad(self, x: Shaped[Tensor, "n longest ..."]) -> Shaped[Tensor, "1 total ..."]:
        """The inverse of `pad`."""
        if self._equal:
            return x.flatten(0, 1).unsqueeze(0)
        return x[self._places(x.device)].unsqueeze(0)

    @property
    def _equal(self) -> bool:
        """Whether all lengths are equal, as in most batches of training: then the row is already the rows."""
        return len(set(self.lengths)) == 1

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.sequence_ids(device), self.positions(device)


# Cached by value, because every layer of a model asks for the same index tensors.
@lru_cache(maxsize=64)
def _starts(packing: Packing, device: torch.device) -> Tensor:
    return torch.tensor(packing.cu_seqlens[:-1], device=device)


@lru_cache(maxsize=64)
def _ends(packing: Packing, device: torch.device) -> Tensor:
    return torch.tensor(packing.cu_seqlens[1:], device=device) - 1


@lru_cache(maxsize=64)
def _sequence_ids(packing: Packing, device: torch.device) -> Tensor:
    return torch.repeat_interleave(torch.tensor(packing.lengths, device=device))


@lru_cache(maxsize=64)
def _positions(packing: Packing, device: torch.device) -> Tensor:
    ids = _sequence_ids(packing, device)
    return torch.arange(packing.total, device=device) - _starts(packing, device)[ids]


def first_tokens(
    batch: int, length: int, packing: Packing | None, device: torch.device
) -> Bool[Tensor, "batch length"]:
    """True at the first token of every sequence."""
    if packing is None:
        return (torch.arange(length, device=device) == 0).expand(batch, length)
    return (packing.positions(device) == 0).unsqueeze(0)


def each_sequence(
    function: Callable[..., tuple[Tensor, S]],
    packing: Packing,
    timed: Mapping[str, Tensor | None],
    state: S,
    **fixed: Any,
) -> tuple[Tensor, S]:
    """What packing means: `function` called on every sequence alone, its outputs laid end to end again.

    `timed` are the arguments with a time dimension, `fixed` those without.
    """
    ys, states = [], []
    for i, cut in enumerate(packing.slices()):
        here = {name: None if t is None else t[:, cut] for name, t in timed.items()}
        y, after = function(**here, state=map_state(lambda t, i=i: t[i : i + 1], state), **fixed)
        ys.append(y)
        states.append(after)
    return torch.cat(ys, 1), concat(states)
