"""Causal convolution along time with kernels of any length: what a time-invariant model is in convolution mode."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence

Mode = Literal["recurrence", "convolution", "scan"]
"""The three equal forms of a time-invariant model."""


@op
def lti_conv(
    u: Float[Tensor, "b l d"],
    K: Float[Tensor, "d k"],
    state: Float[Tensor, "seqs d k1"],
    *,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d k1"]]:
    """Compute `y[t] = sum_j K[j] u[t - j]` over the k taps of each channel.

    The state holds the k - 1 inputs before the first, oldest first. For a kernel of a few taps see `causal_conv1d`.
    """
    if packing is not None:
        return each_sequence(lti_conv.reference, packing, {"u": u}, state, K=K)
    dtype, width = state_dtype(u.dtype), K.shape[1]
    taps, past, ys = K.to(dtype).flip(1), state.to(dtype), []
    for t in range(u.shape[1]):
        window = torch.cat([past, u[:, t, :, None].to(dtype)], 2)
        ys.append((window * taps).sum(2))
        past = window[:, :, window.shape[2] - width + 1 :]
    return torch.stack(ys, 1).to(u.dtype), past


lti_conv.add("torch", "everstate.ops.lti_conv.fourier:lti_conv", anywhere)
