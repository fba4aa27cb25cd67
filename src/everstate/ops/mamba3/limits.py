"""What the Triton kernels of a Mamba-3 layer cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal
from everstate.ops.trapezoid.limits_step import pool_refusal

WIDEST = 1024
"""Numbers of a key that a program holds in registers for some tokens; heads, and pairs that turn, likewise."""


def accepts_scan(
    projected: Tensor,
    state: Any,
    delta_t: Tensor | None = None,
    *,
    layer: Any,
    out_proj: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `mamba3_scan` do not serve these arguments, or None."""
    if projected.numel() == 0:
        return "was given no tokens"
    heads, _, d_state = layer.B_bias.shape
    if max(heads, d_state, state.angle.shape[-1]) > WIDEST:
        return f"takes up to {WIDEST} heads and {WIDEST} numbers per channel, not {heads} and {d_state}"
    return refusal(projected, delta_t, out_proj, *state, *(part for part in layer if isinstance(part, Tensor)))


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
