"""The algebra of states.

A state is a `NamedTuple` of tensors, or a tuple of such states; batch is dimension 0 and no shape depends on how
many tokens were read. Everything here follows from that, so a new mixer writes none of it.

Never test a state for truth: an empty one is falsy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

S = TypeVar("S")

Slots = Int[Tensor, " b"] | None
"""Rows of a pool that a step reads and writes, one per sequence; None means all rows in order."""


def map_state(function: Callable[..., Any], state: S, *others: S) -> S:
    """Apply `function` to the tensors of one state, or to corresponding tensors of several."""
    if isinstance(state, Tensor):
        return function(state, *others)
    assert isinstance(state, tuple), f"a state is made of tensors and tuples, not {type(state).__name__}"
    made = [map_state(function, *parts) for parts in zip(state, *others, strict=True)]
    return type(state)(*made) if hasattr(type(state), "_fields") else type(state)(made)


def named_tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state with dotted names: `"3.ssm"` is the field `ssm` of block 3."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    names = getattr(type(state), "_fields", None) or [str(i) for i in range(len(state))]
    for name, part in zip(names, state, strict=True):
        yield from named_tensors(part, f"{prefix}.{name}" if prefix else name)


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a state in order."""
    return [state] if isinstance(state, Tensor) else [tensor for part in state for tensor in tensors(part)]


def nbytes(state: Any) -> int:
    """Bytes that the state holds."""
    return sum(t.numel() * t.element_size() for t in tensors(state))


def batch_size(state: Any) -> int:
    """Rows of the state; a state without tensors has none to count and gives 0."""
    return next((tensor.shape[0] for _, tensor in named_tensors(state)), 0)


def clone(state: S) -> S:
    """A copy that shares no memory: a fork."""
    return map_state(torch.clone, state)


def detach(state: S) -> S:
    """The same values, cut off from the gradient graph, as between two segments of truncated backpropagation."""
    return map_state(torch.detach, state)


def gather(pool: S, slots: Slots) -> S:
    """The rows `slots` of a pool, copied; with None the pool itself."""
    return pool if slots is None else map_state(lambda t: t.index_select(0, slots), pool)


def scatter_(pool: S, slots: Slots, rows: S) -> None:
    """Write `rows` over the rows `slots` of a pool, in place."""
    into, values = tensors(pool), tensors(rows)
    if slots is None and into:
        torch._foreach_copy_(into, values)  # on a GPU in few launches
    elif slots is not None:
        for t, value in zip(into, values, strict=True):
            t.index_copy_(0, slots, value.to(t.dtype))


def concat(states: Sequence[S]) -> S:
    """States of several batches as one batch."""
    return map_state(lambda *parts: torch.cat(parts), *states)


def repeat(state: S, count: int) -> S:
    """Each row `count` times in a row: the state of one prompt, ready for several continuations."""
    return map_state(lambda t: t.repeat_interleave(count, 0), state)


def equal(one: Any, other: Any) -> bool:
    """Whether two states hold the same names, shapes and bits."""
    pairs = list(named_tensors(one)), list(named_tensors(other))
    if [name for name, _ in pairs[0]] != [name for name, _ in pairs[1]]:
        return False
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(*pairs, strict=True))
