"""What the Triton kernels of the norms cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal
from everstate.ops.limits import refusal_of_strides

WIDEST = 16_384
"""Numbers of a row that a program holds in registers."""


def accepts_norm(x: Tensor, weight: Tensor | None, *, groups: int = 1, **settings: Any) -> str | None:
    """Why the kernel of `rms_norm` does not serve these arguments, or None."""
    return refusal(x, weight) or refusal_of_strides(weight) or _refusal_of_rows(x, groups)


def accepts_gated(x: Tensor, z: Tensor, weight: Tensor | None, *, groups: int = 1, **settings: Any) -> str | None:
    """Why the kernel of `gated_rms_norm` does not serve these arguments, or None."""
    return refusal(x, z, weight) or refusal_of_strides(weight) or _refusal_of_rows(x, groups)


def accepts_add(x: Tensor, y: Tensor, weight: Tensor, **settings: Any) -> str | None:
    """Why the kernel of `add_rms_norm` does not serve these arguments, or None."""
    return refusal(x, y, weight) or refusal_of_strides(weight) or _refusal_of_rows(x, 1)


def _refusal_of_rows(x: Tensor, groups: int) -> str | None:
    return "was given no rows" if x.numel() == 0 else refusal_of_width(x.shape[-1], groups)


def refusal_of_width(width: int, groups: int) -> str | None:
    """Why the kernels do not serve rows of `width` numbers in so many groups, or None."""
    width //= groups
    return f"takes groups of up to {WIDEST} numbers, not {width}" if width > WIDEST else None
