"""The short convolution as a sum of k shifted products, which reads `(b, l, d)` as it lies in memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing
from everstate.core.state import Slots, gather, scatter_


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "seqs d k1"],
    *,
    activation: str | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d k1"]]:
    """See `everstate.ops.causal_conv1d`."""
    dtype, before = state_dtype(x.dtype), weight.shape[1] - 1
    past, now = state.to(dtype).transpose(1, 2), x.to(dtype)
    if packing is None:
        row = torch.cat([past, now], 1)
        # Memory of its own: a view would keep the whole segment alive as long as the state.
        after = row[:, row.shape[1] - before :].clone()
        y = _convolve(row, weight.to(dtype), bias, activation)
    else:
        # Each sequence behind its own past, all in one row; outputs that mix two sequences are cut out again.
        parts = [torch.cat([past[i], now[0, cut]]) for i, cut in enumerate(packing.slices())]
        after = torch.stack([part[part.shape[0] - before :] for part in parts])
        row = torch.cat(parts).unsqueeze(0)
        kept = torch.arange(packing.total, device=x.device) + before * packing.sequence_ids(x.device)
        y = _convolve(row, weight.to(dtype), bias, activation)[:, kept]
    return y.to(x.dtype), after.transpose(1, 2)


def _convolve(row: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The valid outputs of a row that begins with its past."""
    taps = weight.T.contiguous()
    length = row.shape[1] - len(taps) + 1
    y = row[:, :length] * taps[0] if bias is None else torch.addcmul(bias.to(row.dtype), row[:, :length], taps[0])
    for j in range(1, len(taps)):
        y = y.addcmul_(row[:, j : j + length], taps[j])
    return silu(y) if activation == "silu" else y


def causal_conv1d_step_(
    x: Float[Tensor, "b d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "slots d k1"],
    slots: Slots = None,
    *,
    activation: str | None = None,
) -> Float[Tensor, "b d"]:
    """See `everstate.ops.causal_conv1d_step_`."""
    dtype = state_dtype(x.dtype)
    window = torch.cat([gather(state, slots).to(dtype), x.to(dtype).unsqueeze(2)], 2)
    scatter_(state, slots, window[:, :, 1:])
    y = (window * weight.to(dtype)).sum(2)
    y = y if bias is None else y + bias.to(dtype)
    return (silu(y) if activation == "silu" else y).to(x.dtype)
