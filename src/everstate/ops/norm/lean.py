"""The norms with few passes over memory: on a CPU each pass, and each new tensor, costs more than its arithmetic."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from everstate.core.dtypes import state_dtype


def rms_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"] | None, *, eps: float = 1e-5, groups: int = 1
) -> Float[Tensor, "*b d"]:
    """See `everstate.ops.rms_norm`."""
    return _normalise(x.to(state_dtype(x.dtype)), weight, eps, groups).to(x.dtype)


def gated_rms_norm(
    x: Float[Tensor, "*b d"],
    z: Float[Tensor, "*b d"],
    weight: Float[Tensor, " d"] | None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> Float[Tensor, "*b d"]:
    """See `everstate.ops.gated_rms_norm`."""
    dtype = state_dtype(x.dtype)
    gate, y = silu(z.to(dtype)), x.to(dtype)
    y = (
        gate.mul_(_normalise(y, weight, eps, groups))
        if norm_before_gate
        else _normalise(gate.mul_(y), weight, eps, groups)
    )
    return y.to(x.dtype)


def add_rms_norm(
    x: Float[Tensor, "*b d"],
    y: Float[Tensor, "*b d"],
    weight: Float[Tensor, " d"],
    *,
    eps: float = 1e-5,
    multiplier: float = 1.0,
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """See `everstate.ops.add_rms_norm`."""
    x = torch.add(x, y, alpha=multiplier)
    return x, rms_norm(x, weight, eps=eps).to(y.dtype)


def _normalise(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"] | None, eps: float, groups: int
) -> Float[Tensor, "*b d"]:
    """One pass to sum the squares, one to scale, one in place for the weight."""
    parts = x.unflatten(-1, (groups, -1))
    mean = torch.linalg.vector_norm(parts, dim=-1, keepdim=True).square() / parts.shape[-1]
    y = (parts * torch.rsqrt(mean + eps)).flatten(-2)
    return y if weight is None else y.mul_(weight.to(y.dtype))
