"""Rotary positions of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everstate.core.packing import Packing
from everstate.ops.rotary import halves, rotary


class Rope(NamedTuple):
    """How queries and keys are turned by their positions; see `everstate.ops.rotary`."""

    theta: float = 10000.0
    interleaved: bool = False
    rotary_dim: int | None = None
    """Numbers of each head that are turned, an even number from 2 on; None: all."""


def _turn(x: Tensor, positions: Tensor, **settings: Any) -> Tensor:
    """`rotary`, by PyTorch where `use(...)` only names backends that attention has and it has not."""
    turn = rotary if rotary.is_allowed() else halves.rotary
    return turn(x, positions, **settings)


# Plain `Tensor`, because torch.compile traces this on the way to kernels and not through checks of shapes.
def turned(
    q: Tensor, k: Tensor, pos: Tensor, rope: Rope | None, packing: Packing | None = None,
    turn: Callable[..., Tensor] = _turn,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries and keys `(b, l, heads, p)`, each turned by how many tokens of its sequence were read before it, where
    `pos` were read before the first; as they are without `rope`."""
    if rope is None:
        return q, k
    if packing is None:
        positions = pos.unsqueeze(1) + torch.arange(q.shape[1], device=q.device)
    else:
        positions = (pos[packing.sequence_ids(q.device)] + packing.positions(q.device)).unsqueeze(0)
    both = turn(torch.cat([q, k], 2), positions, **rope._asdict())
    q, k = both.split([q.shape[2], k.shape[2]], 2)
    return q, k
