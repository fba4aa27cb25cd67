"""Attention of a segment, a block of queries at a time: memory and, with a window, time grow with the length alone."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.packing import Packing, each_sequence
from everstate.ops.attention import scores
from everstate.ops.attention.cache import AttentionState, append, check_memory, slot_positions, spoil, visible
from everstate.ops.attention.rope import Rope, turned

# Queries handled in one go: with a window about as many as one of them sees, so that at most half of the work is masked
# out again, but enough for a matrix product and few enough for their scores to stay small.
FEWEST, MOST = 64, 512


def fused(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b l g p"],
    v: Float[Tensor, "b l g p"],
    state: AttentionState,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: None = None,
    rope: Rope | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l h p"], AttentionState]:
    """See `everstate.ops.attention`."""
    q, k = turned(q, k, state.pos, rope, packing)
    causal = partial(scores.fused_causal, scale=scale)
    return _attention(partial(scores.fused, scale=scale), causal, q, k, v, state, window, packing)


def plain(
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
    """See `everstate.ops.attention`."""
    q, k = turned(q, k, state.pos, rope, packing)
    return _attention(partial(scores.plain, scale=scale, softcap=softcap), None, q, k, v, state, window, packing)


def _attention(
    attend: scores.Attend,
    causal: scores.Causal | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AttentionState,
    window: int | None,
    packing: Packing | None = None,
) -> tuple[Tensor, AttentionState]:
    """Attention by `attend`, or where nothing is masked but the future by `causal`, if there is such a function."""
    if packing is not None:
        # One at a time: padded to the longest, short sequences would pay the square of its length.
        function = partial(_attention, attend, causal, window=window)
        return each_sequence(function, packing, {"q": q, "k": k, "v": v}, state)
    capacity = state.k.shape[1]
    read = check_memory(state.pos, capacity, window)
    past = capacity if read is None else min(capacity, read)
    if past:
        y = _with_past(attend, q, k, v, state, past, window)
    elif causal is not None and (window is None or window >= q.shape[1]):
        y = causal(q, k, v)
    else:
        now = torch.arange(q.shape[1], device=q.device).unsqueeze(0)
        y = _blocks(attend, q, k, v, now, now, window)
    return spoil(y, state.pos, capacity, window), append(state, k, v)


def _with_past(
    attend: scores.Attend, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, past: int, window: int | None
) -> Tensor:
    """Attention to the first `past` slots of the ring and to the segment."""
    now = state.pos.unsqueeze(1) + torch.arange(q.shape[1], device=q.device)
    positions = torch.cat([slot_positions(state.pos, state.k.shape[1], past), now], 1)
    keys, values = (torch.cat([old[:, :past].to(new.dtype), new], 1) for old, new in ((state.k, k), (state.v, v)))
    return _blocks(attend, q, keys, values, now, positions, window)


def _blocks(
    attend: scores.Attend, q: Tensor, k: Tensor, v: Tensor, now: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    """Attention in blocks of queries at positions `now`, each to the keys that its window can reach."""
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    size = MOST if window is None else min(max(window, FEWEST), MOST)
    ys = []
    for start in range(0, length, size):
        end = min(start + size, length)
        # The slots of the ring are in no order of time: all of them, until the window has passed them by.
        reached = 0 if window is None or start < window - 1 else past + start - window + 1
        keys, queries = slice(reached, past + end), slice(start, end)
        seen = visible(now[:, queries], positions[:, keys], window)
        ys.append(attend(q[:, queries], k[:, keys], v[:, keys], seen))
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0]
