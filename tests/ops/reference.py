"""Arguments of ops out of a norm, and what ops give for arguments in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.core.op import REFERENCE
from everstate.ops import Normed, use


def undivided(x: Tensor, parts: int, eps: float = 1e-5) -> Normed:
    """Rows of which a norm is still to divide: their squares are not those of x, as it has a weight."""
    squares = (x.float() * torch.linspace(0.5, 2.0, x.shape[1], device=x.device)).square()
    return Normed(x, torch.stack([part.sum(1) for part in squares.chunk(parts, 1)], 1), eps)


def wide(value: Any) -> Any:
    """An argument in float64, where it is made of such numbers."""
    if isinstance(value, Normed):
        return Normed(*map(wide, value))
    if type(value) is tuple:
        return tuple(map(wide, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def exact(op: Any, *arguments: Any, **settings: Any) -> Any:
    """What the definition of an op gives in float64."""
    with use(REFERENCE):
        return op(*(wide(a) for a in arguments), **{name: wide(v) for name, v in settings.items()})
