"""Entries that a state has not taken in yet: of several tokens it is then read each time, but written only once.

A step of many sequences is as fast as their states go through memory, and half of that is writing them. An entry is a
fraction of a state: `x` and `B` instead of their product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.state import Slots, gather, scatter_

ENTRIES = 8
"""Columns of a product: seven entries that wait, and the token itself. With the eighth a state is written."""
WORTH = 16 * 2**20
"""Bytes of all states of a layer from which on it pays: fewer are written in the time that launches take anyway."""
TIMED = range(65, 129)
"""Numbers per channel with which that was found."""
PART = 8192
"""Numbers of a head's state that one program of a kernel owns, with what waits for them."""
SHORTEST, LONGEST = 16, 64
"""Fewest and most channels of such a part."""
WIDEST = 256
"""Most numbers per channel: of more the registers of a thread hold no 16 channels."""
SETTLED = 16
"""Rows that are settled at once: they are computed in float32, beside the states."""


class Entry(NamedTuple):
    """A token as `ssd_step_` takes it."""

    x: Float[Tensor, "b h p"]
    a: Float[Tensor, "b h"]
    s: Float[Tensor, "b h"]
    B: Float[Tensor, "b g n"]
    C: Float[Tensor, "b g n"]


class Pending(NamedTuple):
    """What waits for a place in states, which are `decay state + sum_i weight_i x_i B_i^T` over the k entries i.

    The first `waiting` entries do wait, the others have no weight. `weight`, `decay` and `waiting` are the same for all
    t parts of a head, and `waiting` for all heads, so that each part can be read and written by itself.
    """

    x: Float[Tensor, "b k h p"]
    B: Float[Tensor, "b k g n"]
    weight: Float[Tensor, "b h t k"]
    decay: Float[Tensor, "b h t"]
    waiting: Int[Tensor, "b h t"]


def pays(state: Float[Tensor, "b h p n"]) -> bool:
    """Whether steps of such states are faster if these are not written with each."""
    return state.nbytes >= WORTH and state.shape[-1] in TIMED


def part_of(headdim: int, d_state: int) -> int:
    """Channels of a part of a head."""
    channels, width = (1 << (size - 1).bit_length() for size in (headdim, d_state))
    return min(max(channels, SHORTEST), max(PART // width, SHORTEST), LONGEST)


def shapes_of(state: Float[Tensor, "b h p n"], groups: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of what waits for states."""
    batch, heads, headdim, d_state = state.shape
    parts = -(-headdim // part_of(headdim, d_state))
    of_parts, entries = (batch, heads, parts), (batch, ENTRIES)
    return (*entries, heads, headdim), (*entries, groups, d_state), (*of_parts, ENTRIES), of_parts, of_parts


def nothing_pending(state: Float[Tensor, "b h p n"], groups: int, dtype: torch.dtype, turn: int = 0) -> Pending:
    """Room for what waits for these states, for inputs of this dtype.

    Nothing waits, but `turn` of the entries are taken, which say nothing: layers of different turns are written with
    different tokens, and each token takes as long as the next.
    """
    dtypes = dtype, dtype, state_dtype(dtype), state_dtype(dtype), torch.int32
    each = zip(shapes_of(state, groups), dtypes, strict=True)
    pending = Pending(*(state.new_zeros(shape, dtype=own) for shape, own in each))
    pending.decay.fill_(1.0)
    pending.waiting.fill_(turn % ENTRIES)
    return pending


def settled(state: Float[Tensor, "b h p n"], pending: Pending) -> Float[Tensor, "b h p n"]:
    """The states with all that waits for them."""
    dtype, heads = pending.decay.dtype, state.shape[1]
    keys = pending.B.to(dtype).repeat_interleave(heads // pending.B.shape[2], 2)
    added = torch.einsum("bhk,bkhp,bkhn->bhpn", pending.weight[:, :, 0], pending.x.to(dtype), keys)
    return pending.decay[:, :, :1, None] * state.to(dtype) + added


def settle_(state: Float[Tensor, "b h p n"], pending: Pending) -> None:
    """Have the states take in all that waits for them: entries then say nothing."""
    rows = zip(state.split(SETTLED), *(part.split(SETTLED) for part in pending), strict=True)
    for some, *waiting in rows:
        some.copy_(settled(some, Pending(*waiting)))
    pending.weight.zero_()
    pending.decay.fill_(1.0)


def step_or_wait_(
    step_: Callable[..., Float[Tensor, "b h p"]],
    entry: Entry,
    state: Float[Tensor, "slots h p n"],
    slots: Slots,
    pending: Pending | None,
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None,
) -> Float[Tensor, "b h p"]:
    """`step_`, an implementation of `ssd_step_`; with `pending` the entry waits if there is room, else states take in
    all."""
    if pending is None:
        return step_(*entry, state, slots, D=D)
    held, before = gather(state, slots), gather(pending, slots)
    after = settled(held, before)
    y = step_(*entry, after, D=D)
    scatter_(state, slots, torch.where(_is_full(before)[:, :1, :1, None], after.to(state.dtype), held))
    scatter_(pending, slots, _with_entry(before, entry))
    return y


def _is_full(pending: Pending) -> Tensor:
    """Whether states take in what waits, and the next entry, with that."""
    return pending.waiting == ENTRIES - 1


def _with_entry(pending: Pending, entry: Entry) -> Pending:
    """What waits after an entry: that too, or nothing where states have taken all in."""
    full = _is_full(pending)
    next_ = (torch.arange(ENTRIES, device=entry.x.device) == pending.waiting.unsqueeze(-1)) & ~full.unsqueeze(-1)
    of_row = next_[:, 0, 0, :, None, None]
    fade = torch.exp(entry.a.to(pending.decay.dtype)).unsqueeze(-1)
    weight = torch.where(next_, entry.s.to(fade.dtype)[..., None, None], pending.weight * fade.unsqueeze(-1))
    return Pending(
        x=torch.where(of_row, entry.x.unsqueeze(1).to(pending.x.dtype), pending.x),
        B=torch.where(of_row, entry.B.unsqueeze(1).to(pending.B.dtype), pending.B),
        weight=weight.masked_fill(full.unsqueeze(-1), 0.0),
        decay=torch.where(full, 1.0, pending.decay * fade),
        waiting=torch.where(full, 0, pending.waiting + 1),
    )
