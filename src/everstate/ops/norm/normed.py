"""What an RMS norm gives to a linear map, a router or experts, which can do its division."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype


class Normed(NamedTuple):
    """Rows out of an RMS norm, perhaps not divided yet: what multiplies them by a matrix can divide its outputs
    instead, because `W (x / r) = (W x) / r`.

    x: rows times the weight of the norm, and divided where `squares` is None.
    squares: sums of the squares of parts of each row, before the weight; as many parts as it took.
    eps: what the norm adds to the mean of the squares.
    """

    x: Float[Tensor, "*b k"]
    squares: Float[Tensor, "*b parts"] | None = None
    eps: float = 0.0

    def divided(self) -> Float[Tensor, "*b k"]:
        """The rows as the norm defines them."""
        if self.squares is None:
            return self.x
        mean = self.squares.sum(-1, keepdim=True) / self.x.shape[-1]
        return (self.x.to(state_dtype(self.x.dtype)) * torch.rsqrt(mean + self.eps)).to(self.x.dtype)


# Plain `Tensor`, because torch.compile traces this on the way to kernels and not through checks of shapes.
def as_normed(x: Tensor | Normed) -> Normed:
    """Either as rows and what is left to do to them, which is nothing for rows alone."""
    return x if isinstance(x, Normed) else Normed(x)


def divided(x: Float[Tensor, "*b k"] | Normed) -> Float[Tensor, "*b k"]:
    """The rows of either."""
    return x.divided() if isinstance(x, Normed) else x
