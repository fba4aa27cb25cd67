"""The gated delta rule as matrix products over chunks.

Inside a chunk that the state S enters, let G be the cumulative sum of `a` and u_j what token j adds under its key. Then

    u_j = beta_j (v_j - S^T (exp(G_j) k_j) - sum_{i<j} u_i (k_j . exp(G_j - G_i) k_i))
    y_t = S^T (exp(G_t) q_t) + sum_{j<=t} u_j (q_t . exp(G_t - G_j) k_j)
    S'  = exp(G_last) S + sum_j (exp(G_last - G_j) k_j) u_j^T

The first line is a triangular system for all u of the chunk (the UT transform of Yang et al. 2024, arXiv 2406.06484).
Every exponent is a difference that is not positive, so nothing overflows, however strong the decay.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing

CHANNEL_CHUNK = 16
"""Largest chunk with a decay of each channel, whose pairs of tokens have a number for every channel."""


def gated_delta_scan(
    q: Float[Tensor, "b l g k"],
    k: Float[Tensor, "b l g k"],
    v: Float[Tensor, "b l h v"],
    a: Float[Tensor, "b l h"] | Float[Tensor, "b l h k"],
    beta: Float[Tensor, "b l h"],
    state: Float[Tensor, "seqs h k v"],
    *,
    packing: Packing | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b l h v"], Float[Tensor, "seqs h k v"]]:
    """See `everstate.ops.gated_delta_scan`."""
    dtype, heads = state_dtype(v.dtype), v.shape[2]
    inputs = [t.to(dtype) for t in (q, k, v, a if a.ndim == 4 else a.unsqueeze(-1), beta)]
    if packing is not None:
        # Zeros change nothing: a = 0 keeps the state and beta = 0 adds nothing to it.
        inputs = [packing.pad(t) for t in inputs]
    inputs[:2] = [t.repeat_interleave(heads // t.shape[2], 2) for t in inputs[:2]]
    length, s, ys = inputs[2].shape[1], state.to(dtype), []
    chunk = min(chunk_size if a.ndim == 3 else min(chunk_size, CHANNEL_CHUNK), length)
    for start in range(0, length, chunk):
        now = [t[:, start : start + chunk].transpose(1, 2) for t in inputs]
        y, s = _chunk(now[0], now[1], now[2], now[3], now[4], s)
        ys.append(y)
    y = torch.cat(ys, 2).transpose(1, 2)
    return (y if packing is None else packing.unpad(y)).to(v.dtype), s


def _chunk(
    q: Float[Tensor, "b h l k"],
    k: Float[Tensor, "b h l k"],
    v: Float[Tensor, "b h l v"],
    a: Float[Tensor, "b h l c"],
    beta: Float[Tensor, "b h l"],
    state: Float[Tensor, "b h k v"],
) -> tuple[Float[Tensor, "b h l v"], Float[Tensor, "b h k v"]]:
    """The outputs of one chunk and the state after it; `a` has a channel for each of k, or one for all."""
    total = a.cumsum(2)
    decay, weight = torch.exp(total), beta.unsqueeze(-1)
    among = (weight * _pairs(k, k, total)).tril(-1)
    wanted = weight * (v - (decay * k) @ state)
    added = torch.linalg.solve_triangular(among, wanted, upper=False, unitriangular=True)
    y = (decay * q) @ state + _pairs(q, k, total).tril() @ added
    last = total[:, :, -1:]
    kept = torch.exp(last).transpose(2, 3) * state
    return y, kept + (torch.exp(last - total) * k).transpose(2, 3) @ added


def _pairs(
    x: Float[Tensor, "b h l k"], k: Float[Tensor, "b h l k"], total: Float[Tensor, "b h l c"]
) -> Float[Tensor, "b h l l"]:
    """`x_t . exp(G_t - G_j) k_j` for j <= t; above the diagonal any finite number."""
    past = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()
    differences = total.unsqueeze(3) - total.unsqueeze(2)
    factors = torch.exp(differences.masked_fill(~past.unsqueeze(-1), 0.0))
    if total.shape[-1] == 1:
        return (x @ k.transpose(2, 3)) * factors.squeeze(-1)
    return torch.einsum("bhtk,bhjk,bhtjk->bhtj", x, k, factors)
