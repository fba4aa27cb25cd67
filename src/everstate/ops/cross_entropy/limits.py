"""What the Triton kernel of the loss cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal


def accepts_loss(
    x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **settings: Any
) -> str | None:
    """Why the kernel of `linear_cross_entropy` does not serve these arguments, or None."""
    if x.numel() == 0 or weight.shape[0] == 0:
        return "was given no tokens, or no vocabulary"
    return refusal(x, weight, bias)
