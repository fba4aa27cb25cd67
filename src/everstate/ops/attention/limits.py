"""What the Triton kernels of attention cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.core.kernels import capability, refusal, shared_memory
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.ops.attention.cache import AttentionState, Pages, capacity_of
from everstate.ops.attention.rope import Rope
from everstate.ops.limits import step_refusal
from everstate.ops.rotary.limits import refusal_of_width

WIDEST = 256
"""Numbers of a head."""
LONG = 8192
"""Mean length of packed sequences from which on torch's kernels are faster though they take one at a time."""
SHARED_MEMORY, SHARED_MEMORY_WIDE = 97 * 1024, 208 * 1024
"""Bytes of shared memory that a segment takes, with heads of up to 128 numbers and with wider ones."""
SHARED_MEMORY_PRODUCTS = 132 * 1024
"""The first on GPUs whose products read shared memory, which then holds more tiles: compute capability 9 and 10."""
SHARED_MEMORY_STEP = 80 * 1024
"""The same of a token. On GPUs with more, many heads of a group take more."""


def accepts(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, *, window: int | None = None, scale: float | None = None,
    softcap: float | None = None, rope: Rope | None = None, packing: Packing | None = None,
) -> str | None:  # fmt: skip
    """Why the kernels of `attention` do not serve these arguments, or None."""
    why = refusal(q, k, v, state.k, state.v) or _refusal_of_heads(q, k, v)
    if why is not None:
        return why
    nothing_read = state.k.shape[1] == 0 and q.dtype != torch.float32 and softcap is None
    if nothing_read and (packing is None or packing.total >= LONG * len(packing)) and _sees_all(q, window, packing):
        return "is slower than torch's own kernels where nothing was read before and only the future is masked"
    narrow = SHARED_MEMORY_PRODUCTS if capability(q.device)[0] in (9, 10) else SHARED_MEMORY
    return _refusal_of_memory(q, SHARED_MEMORY_WIDE if q.shape[-1] > 128 else narrow)


def _sees_all(q: Tensor, window: int | None, packing: Packing | None) -> bool:
    """Whether the window is no shorter than any sequence."""
    return window is None or window >= (q.shape[1] if packing is None else max(packing.lengths))


def accepts_step(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, slots: Slots = None, *, rope: Rope | None = None,
    pages: Pages = None, **settings: Any,
) -> str | None:  # fmt: skip
    """Why the kernel of `attention_step_` does not serve these arguments, or None."""
    why = step_refusal(state.k, state.v, q, k, v) or _refusal_of_heads(q, k, v)
    if why is not None:
        return why
    if not capacity_of(state.k, pages):
        return "the state has no slot to write the token to; the reference needs none"
    if state.k.stride(-1) != 1 or state.v.stride(-1) != 1:
        return f"takes a pool whose last dimension is dense, not one of strides {state.k.stride()}"
    if pages is not None and pages.dtype not in (torch.int32, torch.int64):
        return f"takes pages as int32 or int64, not {str(pages.dtype).removeprefix('torch.')}"
    why = None if rope is None else refusal_of_width(q.shape[-1], rope.rotary_dim)
    return why or _refusal_of_memory(q, SHARED_MEMORY_STEP)


def _refusal_of_heads(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.shape[-1] > WIDEST:
        return f"takes heads of up to {WIDEST} numbers, not {q.shape[-1]}"
    if not q.dtype == k.dtype == v.dtype:
        names = ", ".join(str(t.dtype).removeprefix("torch.") for t in (q, k, v))
        return f"takes queries, keys and values of one dtype, not {names}"
    return None


def _refusal_of_memory(q: Tensor, needed: int) -> str | None:
    there = shared_memory(q.device)
    if there < needed:
        return f"needs a GPU with {needed:,} bytes of shared memory for heads of {q.shape[-1]}, this one has {there:,}"
    return None
