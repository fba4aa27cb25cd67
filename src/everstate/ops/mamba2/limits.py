"""What the Triton kernels of a Mamba-2 layer cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal
from everstate.ops.conv1d.limits import refusal_of_taps
from everstate.ops.mamba2.ends import Mamba2Layer, Mamba2State
from everstate.ops.norm.limits import refusal_of_width
from everstate.ops.ssd.limits import refusal_of_heads


def accepts_scan(
    projected: Tensor,
    state: Mamba2State,
    delta_t: Tensor | None = None,
    *,
    layer: Mamba2Layer,
    out_proj: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `mamba2_scan` do not serve these arguments, or None."""
    if delta_t is not None:
        return "takes tokens at regular times, no delta_t"
    if projected.numel() == 0:
        return "was given no tokens"
    heads, headdim, d_state = state.ssm.shape[1:]
    return (
        refusal(projected, *state, *layer[:6], out_proj)
        or refusal_of_taps(layer.conv_weight)
        or refusal_of_heads(headdim, d_state, projected)
        or (None if layer.norm is None else refusal_of_width(heads * headdim, layer.ngroups))
    )
