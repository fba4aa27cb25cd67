"""Attention of some queries to some keys, fused by torch or as two matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from everstate.core.dtypes import state_dtype

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(q, k, v, seen) -> y`, `seen` saying which keys each query sees."""

Causal = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(q, k, v) -> y`, each query seeing itself and what comes before."""


def fused_causal(
    q: Float[Tensor, "b l h p"], k: Float[Tensor, "b l g p"], v: Float[Tensor, "b l g p"], *, scale: float | None
) -> Float[Tensor, "b l h p"]:
    """A whole segment by `scaled_dot_product_attention`, without a mask or the scores in memory."""
    shared, (q, k, v) = k.shape[2] < q.shape[2], (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared).transpose(1, 2)


def fused(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b s g p"],
    v: Float[Tensor, "b s g p"],
    seen: Bool[Tensor, "#b l s"],
    *,
    scale: float | None,
) -> Float[Tensor, "b l h p"]:
    """By `scaled_dot_product_attention`, which never holds the scores."""
    groups, length = k.shape[2], q.shape[1]
    keys, values = k.to(q.dtype).transpose(1, 2), v.to(q.dtype).transpose(1, 2)
    # The heads of a group become queries of their one key head: every backend takes that, and a single token
    # reads its keys once instead of once per head.
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    heads = q.shape[2]
    mask = seen.unsqueeze(1).expand(-1, heads, -1, -1).flatten(1, 2).unsqueeze(1)
    y = scaled_dot_product_attention(q.flatten(2, 3), keys, values, attn_mask=mask, scale=scale)
    return y.unflatten(2, (heads, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def plain(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b s g p"],
    v: Float[Tensor, "b s g p"],
    seen: Bool[Tensor, "#b l s"],
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Tensor, "b l h p"]:
    """By matrix products, which leaves room for a soft cap."""
    dtype = state_dtype(q.dtype)
    queries = q.to(dtype).unflatten(2, (k.shape[2], -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.einsum("blgmp,bsgp->bgmls", queries, k.to(dtype))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen[:, None, None], -torch.inf), -1)
    return torch.einsum("bgmls,bsgp->blgmp", weights, v.to(dtype)).flatten(2, 3).to(q.dtype)
