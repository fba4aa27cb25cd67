"""Causal depthwise convolution along time: the short memory in front of Mamba's scan."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.conv1d.limits import accepts_conv, accepts_step


@op
def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "seqs d k1"],
    *,
    activation: str | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d k1"]]:
    """Compute `y[t] = act(bias + sum_j weight[k - 1 - j] x[t - j])` over the last k inputs of each channel.

    The state holds the k - 1 inputs before the first, oldest first; `activation` is `"silu"` or None.
    """
    if packing is not None:
        return each_sequence(
            causal_conv1d.reference, packing, {"x": x}, state, weight=weight, bias=bias, activation=activation
        )
    dtype, width = state_dtype(x.dtype), weight.shape[1]
    window, ys = state.to(dtype), []
    for t in range(x.shape[1]):
        window = torch.cat([window, x[:, t, :, None].to(dtype)], 2)[:, :, -width:]
        y = (window * weight.to(dtype)).sum(2)
        y = y if bias is None else y + bias.to(dtype)
        ys.append(silu(y) if activation == "silu" else y)
        window = window[:, :, 1:]
    return torch.stack(ys, 1).to(x.dtype), window


@op
def causal_conv1d_step_(
    x: Float[Tensor, "b d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "slots d k1"],
    slots: Slots = None,
    *,
    activation: str | None = None,
) -> Float[Tensor, "b d"]:
    """One token of `causal_conv1d` for the rows `slots` of a pool of states, written in place."""
    y, after = causal_conv1d.reference(x.unsqueeze(1), weight, bias, gather(state, slots), activation=activation)
    scatter_(state, slots, after)
    return y[:, 0]


causal_conv1d.add("triton", "everstate.ops.conv1d.triton:causal_conv1d", accepts_conv)
causal_conv1d.add("torch", "everstate.ops.conv1d.shifted:causal_conv1d", anywhere)
causal_conv1d_step_.add("triton", "everstate.ops.conv1d.triton_step:causal_conv1d_step_", accepts_step)
causal_conv1d_step_.add("torch", "everstate.ops.conv1d.shifted:causal_conv1d_step_", anywhere)
