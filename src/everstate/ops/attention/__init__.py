"""Causal attention over a ring of the last keys and values: grouped queries, sliding window, soft cap."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, scatter_
from everstate.ops.attention.cache import (
    AttentionState,
    Pages,
    append,
    check_memory,
    check_pages,
    put_token_,
    rings,
    slot_positions,
    spoil,
    visible,
    without,
)
from everstate.ops.attention.limits import accepts, accepts_step
from everstate.ops.attention.rope import Rope, turned
from everstate.ops.rotary import rotary

__all__ = ["AttentionState", "Rope", "attention", "attention_step_"]


@op
def attention(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b l g p"],
    v: Float[Tensor, "b l g p"],
    state: AttentionState,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rope: Rope | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l h p"], AttentionState]:
    """Compute `y[t] = sum_s softmax_s(cap(scale q[t] . k[s])) v[s]` over the tokens s <= t of the sequence.

    Head h uses group h // (heads / groups) of k and v. With a `window` a token sees itself and window - 1 before it.
    `scale` defaults to p^-0.5; `cap(x) = softcap tanh(x / softcap)`. With `rope`, q and k are turned by their positions
    first, and keys are kept so; without, as they are given.

    The state is a ring of fixed capacity. It needs `window` slots, or without a window as many as tokens will ever be
    read in pieces; none at all (s = 0) if everything is read in one call, which is the fast way to train. A call that
    would look at a token no longer there raises `RequestError` (on a GPU and in a compiled graph: its outputs are NaN).

    Source: Vaswani et al. 2017 (arXiv 1706.03762); Ainslie et al. 2023 (grouped queries, arXiv 2305.13245).
    """
    if packing is not None:
        settings = {"window": window, "scale": scale, "softcap": softcap, "rope": rope}
        return each_sequence(attention.reference, packing, {"q": q, "k": k, "v": v}, state, **settings)
    capacity = state.k.shape[1]
    check_memory(state.pos, capacity, window)
    q, k = turned(q, k, state.pos, rope, turn=rotary.reference)
    dtype, (_, length, heads, headdim) = state_dtype(q.dtype), q.shape
    now = state.pos.unsqueeze(1) + torch.arange(length, device=q.device)
    seen = visible(now, torch.cat([slot_positions(state.pos, capacity, capacity), now], 1), window)
    keys, values = (torch.cat([old.to(dtype), new.to(dtype)], 1) for old, new in ((state.k, k), (state.v, v)))
    keys, values = (t.repeat_interleave(heads // t.shape[2], 2) for t in (keys, values))
    scores = torch.einsum("blhp,bshp->bhls", q.to(dtype), keys) * (headdim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen.unsqueeze(1), -torch.inf), -1)
    y = torch.einsum("bhls,bshp->blhp", weights, values).to(q.dtype)
    return spoil(y, state.pos, capacity, window), append(state, k, v)


@op
def attention_step_(
    q: Float[Tensor, "b h p"],
    k: Float[Tensor, "b g p"],
    v: Float[Tensor, "b g p"],
    state: AttentionState,
    slots: Slots = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rope: Rope | None = None,
    pages: Pages = None,
) -> Float[Tensor, "b h p"]:
    """One token of `attention` for the rows `slots` of a pool of states, written in place.

    With `pages` the keys and values are *blocks* `(blocks, size, g, p)` that rows share out, so that long and short
    contexts fit side by side: slot t of the ring of row r is slot `t % size` of block `pages[r, t // size]`, and the
    ring has `pages.shape[1] * size` slots. `pos` has a number for each row. Entries that a row has not come to yet may
    be anything; rows may share blocks that they only read. Where an entry that is needed names no block, that is a
    `RequestError` (on a GPU and in a compiled graph: the outputs of the row are NaN, and nothing is written for it).

    Source of the blocks: Kwon et al. 2023, "PagedAttention" (arXiv 2309.06180).
    """
    ring = rings(state, slots, pages)
    lost = check_pages(state, slots, pages, ring.pos, window)
    q, k, v = (t.unsqueeze(1) for t in (q, k, v))
    q, k = turned(q, k, ring.pos, rope, turn=rotary.reference)
    y, after = attention.reference(q, k, v, ring, window=window, scale=scale, softcap=softcap)
    if pages is None:
        scatter_(state, slots, after)
    else:
        put_token_(state, slots, pages, ring.pos, k[:, 0], v[:, 0])
    return without(y[:, 0], lost)


def _fuses(*args: Any, softcap: float | None = None, **settings: Any) -> str | None:
    return None if softcap is None else "torch's fused attention has no soft cap on its scores; 'torch' has"


def _writes(q: Tensor, k: Tensor, v: Tensor, state: AttentionState, slots: Slots = None, **settings: Any) -> str | None:
    return None if state.k.shape[1] else "the state has no slot to write the token to; the reference needs none"


attention.add("triton", "everstate.ops.attention.triton:attention", accepts)
attention.add("sdpa", "everstate.ops.attention.blocks:fused", _fuses)
attention.add("torch", "everstate.ops.attention.blocks:plain", anywhere)
attention_step_.add("triton", "everstate.ops.attention.triton_step:attention_step_", accepts_step)
attention_step_.add(
    "sdpa", "everstate.ops.attention.step:fused", lambda *args, **kwargs: _fuses(**kwargs) or _writes(*args, **kwargs)
)
attention_step_.add("torch", "everstate.ops.attention.step:plain", _writes)
