"""One token of attention: its key and value go into the ring, then the ring is read where it lies."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor

from everstate.core.state import Slots, gather
from everstate.ops.attention import scores
from everstate.ops.attention.cache import (
    AttentionState,
    Pages,
    capacity_of,
    check_memory,
    check_pages,
    put_token_,
    rings,
    slot_positions,
    spoil,
    visible,
    without,
)
from everstate.ops.attention.rope import Rope, turned


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
    rope: Rope | None = None,
    pages: Pages = None,
) -> Float[Tensor, "b h p"]:
    """See `everstate.ops.attention_step_`."""
    return _step_(partial(scores.fused, scale=scale), q, k, v, state, slots, window, rope, pages)


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
    rope: Rope | None = None,
    pages: Pages = None,
) -> Float[Tensor, "b h p"]:
    """See `everstate.ops.attention_step_`."""
    return _step_(partial(scores.plain, scale=scale, softcap=softcap), q, k, v, state, slots, window, rope, pages)


def _step_(
    attend: scores.Attend, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, slots: Slots, window: int | None,
    rope: Rope | None, pages: Pages,
) -> Tensor:  # fmt: skip
    pos, capacity = gather(state.pos, slots).clone(), capacity_of(state.k, pages)
    read = check_memory(pos, capacity, window)
    lost = check_pages(state, slots, pages, pos, window)
    queries, turned_keys = turned(q.unsqueeze(1), k.unsqueeze(1), pos, rope)
    # What the token overwrites is one that it does not see: `check_memory` has refused every other case.
    put_token_(state, slots, pages, pos, turned_keys[:, 0], v)
    used = capacity if read is None else min(capacity, read + 1)
    keys, values, _ = rings(state, slots, pages, used)
    seen = visible(pos.unsqueeze(1), slot_positions(pos + 1, capacity, used), window)
    y = attend(queries, keys, values, seen)
    return without(spoil(y, pos, capacity, window)[:, 0], lost)
