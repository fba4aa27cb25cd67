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


def accepts_rotary(x: Tensor, positions: Tensor, **settings: Any) -> str | None:
    """Why the kernel of `rotary` does not serve these arguments, or None."""
    return refusal(x) or _refusal_of_size(x, positions)


def _refusal_of_size(*tensors: Tensor) -> str | None:
    if any(t.numel() == 0 for t in tensors):
        return "was given nothing to turn"
    width = tensors[0].shape[-1]
    return f"takes up to {WIDEST} numbers to turn together, not {width}" if width > WIDEST else None
