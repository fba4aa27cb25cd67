"""What the Triton kernels of the experts cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal

MOST = 4096
"""Experts whose counts a program looks through."""


def accepts(x: Tensor, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor, **settings: Any) -> str | None:
    """Why the kernels of `experts` do not serve these arguments, or None."""
    why = refusal(x, weights, w_in, w_out)
    if why is not None:
        return why
    if len(w_in) > MOST:
        return f"takes up to {MOST} experts, not {len(w_in)}"
    if indices.numel() >= 2**31:
        return f"counts up to 2^31 rows, not {indices.numel()}"
    return None
