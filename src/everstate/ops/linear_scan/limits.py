"""What the Triton kernels of the linear scan cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal


def accepts_scan(a: Tensor, b: Tensor, state: Tensor, **settings: Any) -> str | None:
    """Why the kernels of `linear_scan` do not serve these arguments, or None."""
    return "was given no sequences" if len(a) == 0 else refusal(a, b, state, pairs=True)
