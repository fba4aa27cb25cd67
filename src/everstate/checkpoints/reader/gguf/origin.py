"""Of what a published tensor is made in a GGUF file, and how what llama.cpp did to it is undone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def same(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """As it is in the file."""
    return x


class Origin(NamedTuple):
    """tensors: names in the file, one above the other along the rows. expert: whose rows, of a stack for all experts.
    flat: whether it is published with one dimension. form: what undoes the rest.
    """

    tensors: tuple[str, ...]
    expert: int | None = None
    flat: bool = False
    form: Callable[[Tensor], Tensor] = same

    @property
    def is_plain(self) -> bool:
        """Whether its rows are rows of one tensor of the file, as they are."""
        return self == Origin(self.tensors) and len(self.tensors) == 1


def log_of_decay(a: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """`A_log` of `A = -exp(A_log)`."""
    return torch.log(-a)


def halves(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of heads whose pairs lie side by side, in the order in which they lie half a head apart."""
    return partial(_halves, heads)


def _halves(heads: int, rows: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
