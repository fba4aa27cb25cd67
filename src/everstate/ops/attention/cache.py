"""What attention remembers: the last s keys and values as a ring, in which token t lies in slot t mod s.

A ring is one piece of memory, or the blocks that a table of pages names.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everstate.core.errors import RequestError
from everstate.core.packing import Packing
from everstate.core.state import Slots, gather


class AttentionState(NamedTuple):
    """k, v: the keys and values of the last s tokens, in the dtype of the model; pos: how many tokens were read.

    They are copies of inputs and accumulate nothing, so that float32 would not make them any better.
    """

    k: Float[Tensor, "b s g p"]
    v: Float[Tensor, "b s g p"]
    pos: Int[Tensor, " b"]


def append(state: AttentionState, k: Float[Tensor, "b l g p"], v: Float[Tensor, "b l g p"]) -> AttentionState:
    """The state after l more tokens."""
    capacity, length = state.k.shape[1], k.shape[1]
    pos = state.pos + length
    if capacity == 0:
        return state._replace(pos=pos)
    kept = min(capacity, length)
    slots = (pos.unsqueeze(1) + torch.arange(-kept, 0, device=pos.device)) % capacity
    rows = torch.arange(len(pos), device=pos.device).unsqueeze(1)
    put = lambda ring, new: ring.index_put((rows, slots), new[:, length - kept :].to(ring.dtype))
    return AttentionState(put(state.k, k), put(state.v, v), pos)


def append_packed(
    state: AttentionState, k: Float[Tensor, "1 total g p"], v: Float[Tensor, "1 total g p"], packing: Packing
) -> AttentionState:
    """The state after the tokens of packed sequences, one per row."""
    capacity, device = state.k.shape[1], k.device
    pos = state.pos + (packing.ends(device) + 1 - packing.starts(device))
    if capacity == 0:
        return state._replace(pos=pos)
    kept = _kept(packing, capacity, device)
    rows = packing.sequence_ids(device)[kept]
    slots = (state.pos[rows] + packing.positions(device)[kept]) % capacity
    put = lambda ring, new: ring.index_put((rows, slots), new[0, kept].to(ring.dtype))
    return AttentionState(put(state.k, k), put(state.v, v), pos)


Pages = Int[Tensor, "rows pages"] | None
"""For each row of a pool the blocks that its ring is made of; None where each row has a ring of its own."""


def capacity_of(ring: Float[Tensor, "b s g p"], pages: Pages) -> int:
    """Slots of a ring of keys or values, be it of one piece or of blocks."""
    return ring.shape[1] * (1 if pages is None else pages.shape[1])


def rings(state: AttentionState, slots: Slots, pages: Pages, used: int | None = None) -> AttentionState:
    """The rings of the rows `slots`, or the first `used` slots of them; copies, but for all rows of no blocks."""
    pos = gather(state.pos, slots)
    if pages is None:
        keys, values = gather((state.k[:, :used], state.v[:, :used]), slots)
        return AttentionState(keys, values, pos)
    size = state.k.shape[1]
    blocks = gather(pages, slots)[:, : None if used is None else -(-used // size)].clamp(0, len(state.k) - 1)
    keys, values = (t[blocks].flatten(1, 2)[:, :used] for t in (state.k, state.v))
    return AttentionState(keys, values, pos)


def put_token_(
    state: AttentionState, slots: Slots, pages: Pages, pos: Int[Tensor, " b"],
    k: Float[Tensor, "b g p"], v: Float[Tensor, "b g p"],
) -> None:  # fmt: skip
    """Write one token of each of the rows `slots`, which have read `pos`, in place."""
    rows = torch.arange(len(pos), device=pos.device) if slots is None else slots
    size, slot = state.k.shape[1], pos % capacity_of(state.k, pages)
    block = rows if pages is None else pages[rows, slot // size]
    there = (block >= 0) & (block < len(state.k))
    place = block.clamp(0, len(state.k) - 1), slot % size
    for ring, new in ((state.k, k), (state.v, v)):
        ring.index_put_(place, torch.where(there[:, None, None], new.to(ring.dtype), ring[place]))
    state.pos.index_copy_(0, rows, pos + 1)


def check_pages(
    state: AttentionState, slots: Slots, pages: Pages, pos: Int[Tensor, " b"], window: int | None
) -> Bool[Tensor, " b"] | None:
    """The rows whose next token needs a block that there is not, None without pages.

    Raises `RequestError` for them where their numbers can be seen without making a device wait.
    """
    if pages is None:
        return None
    table, capacity, size = gather(pages, slots), capacity_of(state.k, pages), state.k.shape[1]
    seen = visible(pos.unsqueeze(1), slot_positions(pos + 1, capacity, capacity), window)[:, 0]
    lost = ((table < 0) | (table >= len(state.k))) & seen.unflatten(1, (-1, size)).any(2)
    if not torch.compiler.is_compiling() and pos.device.type == "cpu" and lost.any():
        row, page = lost.nonzero()[0].tolist()
        raise RequestError(
            f"page {page} of row {row} is block {int(table[row, page])}, and the state has {len(state.k)}; "
            "give each row the blocks of all tokens that it looks at, and of the next one"
        )
    return lost.any(1)


@lru_cache(maxsize=64)
def _kept(packing: Packing, capacity: int, device: torch.device) -> Int[Tensor, " kept"]:
    """The tokens that a ring still holds after its sequence."""
    last = [torch.arange(max(cut.start, cut.stop - capacity), cut.stop) for cut in packing.slices()]
    return torch.cat(last).to(device)


def slot_positions(pos: Int[Tensor, " b"], capacity: int, slots: int) -> Int[Tensor, "b s"]:
    """Position of the token that each of the first `slots` slots holds after `pos` tokens; negative where none."""
    last = pos.unsqueeze(1) - 1
    return last - (last - torch.arange(slots, device=pos.device)) % max(capacity, 1)


def visible(queries: Int[Tensor, "b l"], keys: Int[Tensor, "b s"], window: int | None) -> Bool[Tensor, "b l s"]:
    """Which keys each query sees: itself and what came before, of the last `window` tokens."""
    distance = queries.unsqueeze(2) - keys.unsqueeze(1)
    seen = (distance >= 0) & (keys >= 0).unsqueeze(1)
    return seen if window is None else seen & (distance < window)


def check_memory(pos: Int[Tensor, " b"], capacity: int, window: int | None) -> int | None:
    """The most tokens that a row has read, or None where nobody can tell without making a device wait.

    Raises `RequestError` when a row would look at a token that the ring holds no more. Reading `pos` would stop a GPU
    in every layer of every step, and a compiled graph has no values to read: there `spoil` stands in for the error.
    """
    if torch.compiler.is_compiling() or pos.device.type != "cpu":
        return None
    read = max(pos.tolist(), default=0)
    if _can_forget(capacity, window) and 0 < read >= capacity:
        sees = "all tokens before it" if window is None else f"the {window - 1} tokens before it"
        raise RequestError(
            f"attention has read {read} tokens, its state holds {capacity}, and the next token looks at {sees}; "
            "make the state with init_state(batch, context=N), N at least the number of tokens to read "
            "(everstate generate --context N)"
        )
    return int(read)


def spoil(
    y: Float[Tensor, "b l h p"], pos: Int[Tensor, " b"], capacity: int, window: int | None
) -> Float[Tensor, "b l h p"]:
    """Make the outputs NaN of rows that `check_memory` would have refused had it been able to see them."""
    return without(y, (pos > 0) & (pos >= capacity)) if _can_forget(capacity, window) else y


def without(y: Float[Tensor, "b *l h p"], lost: Bool[Tensor, " b"] | None) -> Float[Tensor, "b *l h p"]:
    """The outputs, NaN for the rows that are lost."""
    return y if lost is None else y.masked_fill(lost.view(-1, *(1,) * (y.ndim - 1)), torch.nan)


def _can_forget(capacity: int, window: int | None) -> bool:
    return window is None or capacity < window
