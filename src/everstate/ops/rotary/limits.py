"""What the Triton kernels of the rotations cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal

WIDEST = 8192
"""Numbers that a program turns together."""


def accepts_rotate(x: Tensor, cos: Tensor, sin: Tensor, **settings: Any) -> str | None:
    """Why the kernel of `rotate` does not serve these arguments, or None."""
    return refusal(x, cos, sin) or _refusal_of_size(x, cos)


def accepts_rotary(x: Tensor, positions: Tensor, *, rotary_dim: int | None = None, **settings: Any) -> str | None:
    """Why the kernel of `rotary` does not serve these arguments, or None."""
    return refusal(x) or _refusal_of_size(x, positions) or refusal_of_width(x.shape[-1], rotary_dim)


def width_of(headdim: int, rotary_dim: int | None) -> int:
    """How many numbers of a head are turned."""
    return headdim if rotary_dim is None else rotary_dim


def refusal_of_width(headdim: int, rotary_dim: int | None) -> str | None:
    """Why nobody can turn so many numbers of a head, or None."""
    width = width_of(headdim, rotary_dim)
    if 0 < width <= headdim and width % 2 == 0:
        return None
    return f"turns an even number of a head's {headdim} numbers, not {width}"


def _refusal_of_size(*tensors: Tensor) -> str | None:
    if any(t.numel() == 0 for t in tensors):
        return "was given nothing to turn"
    width = tensors[0].shape[-1]
    return f"takes up to {WIDEST} numbers to turn together, not {width}" if width > WIDEST else None
