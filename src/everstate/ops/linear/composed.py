"""A linear map by PyTorch, and what is behind it by its fastest implementation."""

from __future__ import annotations

from jaxtyping import Float, Int8
from torch import Tensor, nn

from everstate.core.state import Slots
from everstate.ops.activations import Activation
from everstate.ops.conv1d import causal_conv1d_step_
from everstate.ops.glu import activated
from everstate.ops.norm import add_rms_norm
from everstate.ops.norm.normed import Normed, divided


def linear(
    x: Float[Tensor, "*b k"] | Normed,
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*b n"]:
    """See `everstate.ops.linear`. 8-bit weights are widened at each call: they save memory here, not time."""
    x = divided(x)
    if scale is None:
        return nn.functional.linear(x, weight, bias)
    y = nn.functional.linear(x, weight.to(x.dtype)) * scale  # in the precision of the scale
    return (y if bias is None else y + bias).to(x.dtype)


def linear_activate(
    x: Float[Tensor, "*b k"] | Normed,
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
    activation: Activation = "silu",
    gated: bool = False,
) -> Float[Tensor, "*b f"]:
    """See `everstate.ops.linear_activate`."""
    return activated(linear(x, weight, bias, scale=scale), activation, gated)


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
    """See `everstate.ops.linear_add_rms_norm`."""
    return add_and_norm(linear(x, weight, bias, scale=scale), addend, residual, norm, eps, multiplier)


def add_and_norm(
    y: Float[Tensor, "b n"],
    addend: Float[Tensor, "b n"] | None,
    residual: Float[Tensor, "b n"],
    norm: Float[Tensor, " n"],
    eps: float,
    multiplier: float,
) -> tuple[Float[Tensor, "b n"], Normed]:
    """What `linear_add_rms_norm` does with its outputs."""
    y = y if addend is None else y + addend
    summed, normed = add_rms_norm(residual, y, norm, eps=eps, multiplier=multiplier)
    return summed, Normed(normed)


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
