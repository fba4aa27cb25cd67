"""The gated delta rule: a state that forgets, and then corrects what it holds under a key instead of adding to it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_


@op
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
    """Run `state = exp(a) state; state += k (beta (v - state^T k))^T; y = state^T q` along time.

    `a` is the log decay, never positive, of a head or of each of its key channels; `beta` in [0, 2] is how much of the
    error is corrected, for keys of length 1. Head h uses group h // (heads / groups) of q and k. The state is float32
    (float64 for float64 inputs), y has the dtype of v.

    Sources: Yang et al. 2024, "Gated Delta Networks" (arXiv 2412.06464), equation 10; Kimi Team 2025, "Kimi Linear"
    (decay of each channel, arXiv 2510.26692).
    """
    if packing is not None:
        return each_sequence(gated_delta_scan.reference, packing, {"q": q, "k": k, "v": v, "a": a, "beta": beta}, state)
    dtype, heads = state_dtype(v.dtype), v.shape[2]
    queries, keys = (m.to(dtype).repeat_interleave(heads // m.shape[2], 2) for m in (q, k))
    values, s, ys = v.to(dtype), state.to(dtype), []
    for t in range(v.shape[1]):
        decay = torch.exp(a[:, t].to(dtype))
        s = s * (decay[..., None, None] if a.ndim == 3 else decay[..., None])
        error = values[:, t] - torch.einsum("bhkv,bhk->bhv", s, keys[:, t])
        s = s + torch.einsum("bhk,bhv->bhkv", keys[:, t], beta[:, t, :, None].to(dtype) * error)
        ys.append(torch.einsum("bhkv,bhk->bhv", s, queries[:, t]))
    return torch.stack(ys, 1).to(v.dtype), s


@op
def gated_delta_step_(
    q: Float[Tensor, "b g k"],
    k: Float[Tensor, "b g k"],
    v: Float[Tensor, "b h v"],
    a: Float[Tensor, "b h"] | Float[Tensor, "b h k"],
    beta: Float[Tensor, "b h"],
    state: Float[Tensor, "slots h k v"],
    slots: Slots = None,
) -> Float[Tensor, "b h v"]:
    """One token of `gated_delta_scan` for the rows `slots` of a pool of states, written in place."""
    q, k, v, a, beta = (t.unsqueeze(1) for t in (q, k, v, a, beta))
    y, after = gated_delta_scan.reference(q, k, v, a, beta, gather(state, slots))
    scatter_(state, slots, after)
    return y[:, 0]


gated_delta_scan.add("torch", "everstate.ops.delta.chunked:gated_delta_scan", anywhere)
