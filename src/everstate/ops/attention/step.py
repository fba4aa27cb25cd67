"""One token of attention: its key and value go into the ring, then the ring is read where it lies."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.state import Slots, gather
from everstate.ops.attention import scores
from everstate.ops.attention.cache import AttentionState, check_memory, slot_positions, spoil, visible


def fused(
    q: Float[Tensor, "b h p"],
    k: Float[Tensor, "b g p"],
    v: Float[Tensor, "b g p"],
    state: AttentionState,
    slots: Slots = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: None = None,
) -> Float[Tensor, "b h p"]:
    """See `everstate.ops.attention_step_`."""
    return _step_(partial(scores.fused, scale=scale), q, k, v, state, slots, window)


def plain(
    q: Float[Tensor, "b h p"],
    k: Float[Tensor, "b g p"],
    v: Float[Tensor, "b g p"],
    state: AttentionState,
    slots: Slots = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "b h p"]:
    """See `everstate.ops.attention_step_`."""
    return _step_(partial(scores.plain, scale=scale, softcap=softcap), q, k, v, state, slots, window)


def _step_(
    attend: scores.Attend, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, slots: Slots, window: int | None
) -> Tensor:
    pos, capacity = gather(state.pos, slots).clone(), state.k.shape[1]
    read = check_memory(pos, capacity, window)
    rows = torch.arange(len(pos), device=pos.device) if slots is None else slots
    # What the token overwrites is one that it does not see: `check_memory` has refused every other case.
    place = rows, pos % capacity
    state.k.index_put_(place, k.to(state.k.dtype))
    state.v.index_put_(place, v.to(state.v.dtype))
    state.pos.index_copy_(0, rows, pos + 1)
    used = capacity if read is None else min(capacity, read + 1)
    keys, values = gather((state.k[:, :used], state.v[:, :used]), slots)
    seen = visible(pos.unsqueeze(1), slot_positions(pos + 1, capacity, used), window)
    y = attend(q.unsqueeze(1), keys, values, seen)
    return spoil(y, pos, capacity, window)[:, 0]
