"""Root mean square norm, plain and gated."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.ops.norm.limits import accepts_add, accepts_gated, accepts_norm


@op
def rms_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"] | None, *, eps: float = 1e-5, groups: int = 1
) -> Float[Tensor, "*b d"]:
    """Compute `x / sqrt(mean(x^2) + eps) * weight`, the mean taken within each of `groups` equal parts of d.

    Computed in float32 (float64 for float64 inputs). Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    parts = x.to(state_dtype(x.dtype)).unflatten(-1, (groups, -1))
    y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


@op
def gated_rms_norm(
    x: Float[Tensor, "*b d"],
    z: Float[Tensor, "*b d"],
    weight: Float[Tensor, " d"] | None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> Float[Tensor, "*b d"]:
    """Compute `norm(x silu(z))`, or with `norm_before_gate` `norm(x) silu(z)`; see `rms_norm`.

    Source: Dao and Gu 2024 (arXiv 2405.21060), section 7.
    """
    dtype = state_dtype(x.dtype)
    gate, y = silu(z.to(dtype)), x.to(dtype)
    if norm_before_gate:
        y = rms_norm.reference(y, weight, eps=eps, groups=groups) * gate
    else:
        y = rms_norm.reference(y * gate, weight, eps=eps, groups=groups)
    return y.to(x.dtype)


@op
def add_rms_norm(
    x: Float[Tensor, "*b d"],
    y: Float[Tensor, "*b d"],
    weight: Float[Tensor, " d"],
    *,
    eps: float = 1e-5,
    multiplier: float = 1.0,
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """`x + multiplier y`, and its `rms_norm` in the dtype of y: a residual stream x that takes in what a layer gave."""
    x = torch.add(x, y, alpha=multiplier)
    return x, rms_norm.reference(x, weight, eps=eps).to(y.dtype)


rms_norm.add("triton", "everstate.ops.norm.triton:rms_norm", accepts_norm)
rms_norm.add("torch", "everstate.ops.norm.lean:rms_norm", anywhere)
gated_rms_norm.add("triton", "everstate.ops.norm.triton:gated_rms_norm", accepts_gated)
gated_rms_norm.add("torch", "everstate.ops.norm.lean:gated_rms_norm", anywhere)
add_rms_norm.add("triton", "everstate.ops.norm.triton_add:add_rms_norm", accepts_add)
add_rms_norm.add("torch", "everstate.ops.norm.lean:add_rms_norm", anywhere)
