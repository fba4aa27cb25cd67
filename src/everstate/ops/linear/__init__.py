"""A linear map, with an activation, a short convolution or a residual stream and its norm behind it, and with weights
of 8 bits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.state import Slots
from everstate.ops.activations import Activation, activate
from everstate.ops.conv1d import causal_conv1d_step_
from everstate.ops.linear.limits import accepts_activate, accepts_add, accepts_conv_step, accepts_linear
from everstate.ops.norm import add_rms_norm
from everstate.ops.norm.normed import Normed, divided


@op
def linear(
    x: Float[Tensor, "*b k"] | Normed,
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*b n"]:
    """Compute `scale * (W x) + bias`; of x out of a norm, `Normed.divided()`.

    Weights of 8 bits have a `scale` for each output, others may. Computed in float32 (float64 for float64 inputs); the
    result has the dtype of x.
    """
    x = divided(x)
    dtype = state_dtype(x.dtype)
    y = torch.einsum("...k,nk->...n", x.to(dtype), weight.to(dtype))
    y = y if scale is None else y * scale.to(dtype)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


@op
def linear_activate(
    x: Float[Tensor, "*b k"] | Normed,
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
    activation: Activation = "silu",
    gated: bool = False,
) -> Float[Tensor, "*b f"]:
    """`activate` of what `linear` gives: the first half of an MLP. With `gated`, n = 2 f, otherwise n = f."""
    return activate(linear.reference(x, weight, bias, scale=scale), activation, gated)


@op
def linear_conv_step_(
    x: Float[Tensor, "b k"] | Normed,
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


@op
def linear_add_rms_norm(
    x: Float[Tensor, "b k"] | Normed,
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None,
    residual: Float[Tensor, "b n"],
    norm: Float[Tensor, " n"],
    *,
    scale: Float[Tensor, " n"] | None = None,
    addend: Float[Tensor, "b n"] | None = None,
    eps: float = 1e-5,
    multiplier: float = 1.0,
) -> tuple[Float[Tensor, "b n"], Normed]:
    """`add_rms_norm` of a residual stream and what `linear` gives: the last of one layer, and the first of the next.

    What else the layer gives, such as that of another mixer beside it, is the `addend`.
    """
    y = linear.reference(x, weight, bias, scale=scale)
    y = y if addend is None else y + addend
    summed, normed = add_rms_norm.reference(residual, y, norm, eps=eps, multiplier=multiplier)
    return summed, Normed(normed)


linear.add("triton", "everstate.ops.linear.triton:linear", accepts_linear)
linear.add("torch", "everstate.ops.linear.composed:linear", anywhere)
linear_activate.add("triton", "everstate.ops.linear.triton:linear_activate", accepts_activate)
linear_activate.add("torch", "everstate.ops.linear.composed:linear_activate", anywhere)
linear_conv_step_.add("triton", "everstate.ops.linear.triton:linear_conv_step_", accepts_conv_step)
linear_conv_step_.add("torch", "everstate.ops.linear.composed:linear_conv_step_", anywhere)
linear_add_rms_norm.add("triton", "everstate.ops.linear.triton:linear_add_rms_norm", accepts_add)
linear_add_rms_norm.add("torch", "everstate.ops.linear.composed:linear_add_rms_norm", anywhere)
