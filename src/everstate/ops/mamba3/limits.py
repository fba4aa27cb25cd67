"""What the Triton kernel of one Mamba-3 token cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.ops.trapezoid.limits_step import pool_refusal


def accepts_step(
    projected: Tensor,
    state: Any,
    slots: Tensor | None = None,
    delta_t: Tensor | None = None,
    *,
    layer: Any,
) -> str | None:
    """Why the kernel of `mamba3_step_` does not serve these arguments, or None."""
    return pool_refusal(state, projected, delta_t, *(part for part in layer if isinstance(part, Tensor)))
