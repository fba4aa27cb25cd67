"""Experts, a shared one and the residual stream behind them, each by its fastest implementation."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from everstate.ops.activations import Activation
from everstate.ops.experts import experts
from everstate.ops.linear import linear_activate, linear_add_rms_norm
from everstate.ops.linear.composed import add_and_norm
from everstate.ops.norm.normed import Normed


def experts_add_rms_norm(
    x: Float[Tensor, "t d"] | Normed,
    weights: Float[Tensor, "t k"],
    indices: Int[Tensor, "t k"],
    w_in: Float[Tensor, "e f2 d"],
    w_out: Float[Tensor, "e d f"],
    residual: Float[Tensor, "t d"],
    norm: Float[Tensor, " d"],
    *,
    shared: tuple[Float[Tensor, "s2 d"], Float[Tensor, "d s"]] | None = None,
    activation: Activation = "silu",
    gated: bool = True,
    eps: float = 1e-5,
    multiplier: float = 1.0,
) -> tuple[Float[Tensor, "t d"], Normed]:
    """See `everstate.ops.experts_add_rms_norm`."""
    y = experts(x, weights, indices, w_in, w_out, activation=activation, gated=gated)
    if shared is None:
        return add_and_norm(y, None, residual, norm, eps, multiplier)
    hidden = linear_activate(x, shared[0], activation=activation, gated=gated)
    return linear_add_rms_norm(hidden, shared[1], None, residual, norm, addend=y, eps=eps, multiplier=multiplier)
