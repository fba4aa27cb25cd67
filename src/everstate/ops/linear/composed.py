"""A linear map by PyTorch, and the norm before it and the convolution behind it by their fastest implementations."""

from __future__ import annotations

from jaxtyping import Float, Int8
from torch import Tensor, nn

from everstate.core.state import Slots
from everstate.ops.conv1d import causal_conv1d_step_
from everstate.ops.norm import rms_norm


def linear(
    x: Float[Tensor, "*b k"],
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
    norm: Float[Tensor, " k"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*b n"]:
    """See `everstate.ops.linear`. 8-bit weights are widened at each call: they save memory here, not time."""
    x = x if norm is None else rms_norm(x, norm, eps=eps)
    if scale is None:
        return nn.functional.linear(x, weight, bias)
    y = nn.functional.linear(x, weight.to(x.dtype)) * scale  # in the precision of the scale
    return (y if bias is None else y + bias).to(x.dtype)


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
    """See `everstate.ops.linear_conv_step_`."""
    return convolve_(linear(x, weight, bias, scale=scale), conv_weight, conv_bias, state, slots, start, activation)


def convolve_(
    y: Float[Tensor, "b n"],
    conv_weight: Float[Tensor, "d taps"],
    conv_bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "slots d taps1"],
    slots: Slots,
    start: int,
    activation: str | None,
) -> tuple[Float[Tensor, "b before"], Float[Tensor, "b d"], Float[Tensor, "b after"]]:
    """What `linear_conv_step_` does with its outputs."""
    stop = start + len(conv_weight)
    convolved = causal_conv1d_step_(y[:, start:stop], conv_weight, conv_bias, state, slots, activation=activation)
    return y[:, :start], convolved, y[:, stop:]
