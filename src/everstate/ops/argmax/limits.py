"""What the Triton kernel of `argmax` cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from torch import Tensor

from everstate.core.kernels import refusal

WIDEST = 2**19
"""Numbers of a row that one program reads without waiting in between."""


def accepts_argmax(x: Tensor) -> str | None:
    """Why the kernel does not serve these arguments, or None."""
    if not 0 < x.shape[1] <= WIDEST or x.shape[0] == 0:
        return f"takes rows of 1 to {WIDEST} numbers, not {tuple(x.shape)}"
    return refusal(x)
