"""A mixture of experts: each token goes through a few of many small MLPs."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.ops.activations import Activation, activate
from everstate.ops.experts.limits import accepts
from everstate.ops.experts.route import Score, route

__all__ = ["Score", "experts", "route"]


@op
def experts(
    x: Float[Tensor, "*t d"],
    weights: Float[Tensor, "*t k"],
    indices: Int[Tensor, "*t k"],
    w_in: Float[Tensor, "e f2 d"],
    w_out: Float[Tensor, "e d f"],
    *,
    activation: Activation = "silu",
    gated: bool = True,
) -> Float[Tensor, "*t d"]:
    """Compute `y = sum_k weights[k] w_out[i] act(w_in[i] x)` over the experts `i = indices[k]` of each token.

    With `gated`, f2 = 2 f and the first half of `w_in` makes the gate (`activate`); `route` makes the rest.

    Source: Shazeer et al. 2017 (arXiv 1701.06538).
    """
    dtype, ys = state_dtype(x.dtype), []
    for token, shares, chosen in zip(
        x.to(dtype).flatten(0, -2), weights.to(dtype).flatten(0, -2), indices.flatten(0, -2).tolist(), strict=True
    ):
        y = torch.zeros_like(token)
        for share, i in zip(shares, chosen, strict=True):
            y = y + share * linear(activate(linear(token, w_in[i].to(dtype)), activation, gated), w_out[i].to(dtype))
        ys.append(y)
    return torch.stack(ys).view(x.shape).to(x.dtype)


experts.add("triton", "everstate.ops.experts.triton:experts", accepts)
experts.add("torch", "everstate.ops.experts.grouped:experts", anywhere)
