"""What the Triton kernel of the gated activation cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from torch import Tensor

from everstate.core.kernels import refusal
from everstate.ops.activations import Activation


def accepts(h: Tensor, activation: Activation = "silu") -> str | None:
    """Why the kernel of `glu` does not serve these arguments, or None."""
    if h.numel() == 0:
        return "was given no rows"
    return refusal(h)


def accepts_gate(y: Tensor, z: Tensor) -> str | None:
    """Why the kernel of `gated` does not serve these arguments, or None."""
    if y.numel() == 0:
        return "was given no rows"
    return refusal(y, z)
