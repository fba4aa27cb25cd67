"""A linear map, with a norm before it or a short convolution behind it, and with weights of 8 bits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.state import Slots
from everstate.ops.conv1d import causal_conv1d_step_
from everstate.ops.linear.limits import accepts_conv_step, accepts_linear
from everstate.ops.norm import rms_norm


@op
def linear(
    x: Float[Tensor, "*b k"],
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
    norm: Float[Tensor, " k"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*b n"]:
    """Compute `scale * (W x) + bias`; with the weight `norm` of an RMS norm, `x / sqrt(mean(x^2) + eps) * norm` for x.

    Weights of 8 bits have a `scale` for each output, others may. Computed in float32 (float64 for float64 inputs); the
    result has the dtype of x.
    """
    dtype = state_dtype(x.dtype)
    u = x.to(dtype) if norm is None else rms_norm.reference(x.to(dtype), norm, eps=eps)
    y = torch.einsum("...k,nk->...n", u, weight.to(dtype))
    y = y if scale is None else y * scale.to(dtype)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


@op
def linear_conv_step_(
    x: Float[Tensor, "b k"],
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None,
    conv_weight: Float[Tensor, "d taps"],
    conv_bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "slots d taps1"],
    slots: Slots = None,
    *,
    start: int = 0,
    activation: str | None = None,
    scale: Float[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "b before"], Float[Tensor, "b d"], Float[Tensor, "b after"]]:
    """`linear`, and then one token of `causal_conv1d` over its outputs from `start` on, one for each of d channels.

    Gives the outputs before these, theirs, and those behind. The rows `slots` of the pool `state` are written in place.
    """
    y, stop = linear.reference(x, weight, bias, scale=scale), start + len(conv_weight)
    convolved = causal_conv1d_step_.reference(
        y[:, start:stop], conv_weight, conv_bias, state, slots, activation=activation
    )
    return y[:, :start], convolved, y[:, stop:]


linear.add("triton", "everstate.ops.linear.triton:linear", accepts_linear)
linear.add("torch", "everstate.ops.linear.composed:linear", anywhere)
linear_conv_step_.add("triton", "everstate.ops.linear.triton:linear_conv_step_", accepts_conv_step)
linear_conv_step_.add("torch", "everstate.ops.linear.composed:linear_conv_step_", anywhere)
