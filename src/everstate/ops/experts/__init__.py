"""A mixture of experts: each token goes through a few of many small MLPs."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.ops.activations import Activation, activate
from everstate.ops.experts.limits import accepts, accepts_add, accepts_router
from everstate.ops.experts.route import Score, route
from everstate.ops.linear import linear as linear_map
from everstate.ops.linear import linear_activate
from everstate.ops.norm import add_rms_norm
from everstate.ops.norm.normed import Normed, divided

__all__ = ["Score", "experts", "experts_add_rms_norm", "route", "topk_router"]


@op
def experts(
    x: Float[Tensor, "*t d"] | Normed,
    weights: Float[Tensor, "*t k"],
    indices: Int[Tensor, "*t k"],
    w_in: Float[Tensor, "e f2 d"],
    w_out: Float[Tensor, "e d f"],
    *,
    activation: Activation = "silu",
    gated: bool = True,
) -> Float[Tensor, "*t d"]:
    """Compute `y = sum_k weights[k] w_out[i] act(w_in[i] x)` over the experts `i = indices[k]` of each token.

    With `gated`, f2 = 2 f and the first half of `w_in` makes the gate (`activate`); `route` makes the rest. Of x out of
    a norm, `Normed.divided()` is meant.

    Source: Shazeer et al. 2017 (arXiv 1701.06538).
    """
    x = divided(x)
    dtype, ys = state_dtype(x.dtype), []
    for token, shares, chosen in zip(
        x.to(dtype).flatten(0, -2), weights.to(dtype).flatten(0, -2), indices.flatten(0, -2).tolist(), strict=True
    ):
        y = torch.zeros_like(token)
        for share, i in zip(shares, chosen, strict=True):
            y = y + share * linear(activate(linear(token, w_in[i].to(dtype)), activation, gated), w_out[i].to(dtype))
        ys.append(y)
    return torch.stack(ys).view(x.shape).to(x.dtype)


@op
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
    """`add_rms_norm` of `residual` and `y = experts(x, ...) + w_out act(w_in x)`, with `(w_in, w_out) = shared`.

    The shared expert reads every token with weight 1; with `gated`, s2 = 2 s and the first half makes the gate. Of x
    out of a norm, `Normed.divided()` is meant.

    Source: Dai et al. 2024 (arXiv 2401.06066), section 3.2.
    """
    y = experts.reference(x, weights, indices, w_in, w_out, activation=activation, gated=gated)
    if shared is not None:
        hidden = linear_activate.reference(x, shared[0], activation=activation, gated=gated)
        y = y + linear_map.reference(hidden, shared[1])
    summed, normed = add_rms_norm.reference(residual, y, norm, eps=eps, multiplier=multiplier)
    return summed, Normed(normed)


@op
def topk_router(
    x: Float[Tensor, "*t d"] | Normed,
    weight: Float[Tensor, "e d"],
    *,
    top_k: int,
    score: Score = "softmax_topk",
    bias: Float[Tensor, " e"] | None = None,
    normalise: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    ngroups: int = 1,
    topk_groups: int = 1,
) -> tuple[Float[Tensor, "*t k"], Int[Tensor, "*t k"]]:
    """`route` of the logits `W x`, in float32 throughout (float64 for float64 inputs).

    A rounded logit would send a token to another expert. Of x out of a norm, `Normed.divided()` is meant.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), section 2.
    """
    x = divided(x)
    dtype = state_dtype(x.dtype)
    return route(
        linear(x.to(dtype), weight.to(dtype)), top_k=top_k, score=score, bias=bias, normalise=normalise, eps=eps,
        scale=scale, ngroups=ngroups, topk_groups=topk_groups,
    )  # fmt: skip


experts.add("triton", "everstate.ops.experts.triton:experts", accepts)
experts.add("torch", "everstate.ops.experts.grouped:experts", anywhere)
experts_add_rms_norm.add("triton", "everstate.ops.experts.triton_few:experts_add_rms_norm", accepts_add)
experts_add_rms_norm.add("torch", "everstate.ops.experts.composed:experts_add_rms_norm", anywhere)
topk_router.add("triton", "everstate.ops.experts.triton_router:topk_router", accepts_router)
