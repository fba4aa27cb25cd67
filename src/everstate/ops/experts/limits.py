"""What the Triton kernels of the experts cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal, shared_memory

SHARED_MEMORY = 96 * 1024
"""Bytes of shared memory that a product takes."""
MOST = 4096
"""Experts whose counts a program looks through."""


def accepts(x: Tensor, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor, **settings: Any) -> str | None:
    """Why the kernels of `experts` do not serve these arguments, or None."""
    why = refusal(x, weights, w_in, w_out)
    if why is not None:
        return why
    if shared_memory(x.device) < SHARED_MEMORY:
        return f"needs a GPU with {SHARED_MEMORY:,} bytes of shared memory, this one has {shared_memory(x.device):,}"
    if len(w_in) > MOST:
        return f"takes up to {MOST} experts, not {len(w_in)}"
    if indices.numel() >= 2**31:
        return f"counts up to 2^31 rows, not {indices.numel()}"
    return None
