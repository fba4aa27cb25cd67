"""What the Triton kernels of attention cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal
from everstate.core.state import Slots
from everstate.ops.attention.cache import AttentionState
from everstate.ops.limits import step_refusal

WIDEST = 256
"""Numbers of a head."""


def accepts(q: Tensor, k: Tensor, v: Tensor, state: AttentionState, **settings: Any) -> str | None:
    """Why the kernels of `attention` do not serve these arguments, or None."""
    return refusal(q, k, v, state.k, state.v) or _refusal_of_heads(q, k, v)


def accepts_step(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, slots: Slots = None, **settings: Any
) -> str | None:
    """Why the kernel of `attention_step_` does not serve these arguments, or None."""
    why = step_refusal(state.k, state.v, q, k, v)
    if why is not None:
        return why
    if not state.k.shape[1]:
        return "the state has no slot to write the token to; the reference needs none"
    if state.k.stride(-1) != 1 or state.v.stride(-1) != 1:
        return f"takes a pool whose last dimension is dense, not one of strides {state.k.stride()}"
    return _refusal_of_heads(q, k, v)


def _refusal_of_heads(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.shape[-1] > WIDEST:
        return f"takes heads of up to {WIDEST} numbers, not {q.shape[-1]}"
    if not q.dtype == k.dtype == v.dtype:
        names = ", ".join(str(t.dtype).removeprefix("torch.") for t in (q, k, v))
        return f"takes queries, keys and values of one dtype, not {names}"
    return None
