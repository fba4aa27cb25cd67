"""What the Triton kernels of SSD cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal

LARGEST_STATE = 16384
"""Numbers in the state of a head, each side filled up to a power of two: what fits into registers and shared memory."""


def accepts_scan(
    x: Tensor,
    a: Tensor,
    s: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    diagonal: Tensor | None = None,
    D: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `ssd_scan` do not serve these arguments, or None."""
    rank = 1 if diagonal is None else diagonal.shape[-1]
    return refusal(x, a, s, B, C, state, diagonal, D) or refusal_of_sizes(x.shape[-1], B.shape[-1], rank)


def refusal_of_sizes(headdim: int, d_state: int, rank: int) -> str | None:
    """Why the kernels do not take heads of these sizes, or None."""
    filled = [max(1 << (size - 1).bit_length(), 16) for size in (headdim, d_state)]
    if filled[0] > 128 or filled[1] > 256 or filled[0] * filled[1] > LARGEST_STATE:
        return f"takes heads of up to 128 x 128 or 64 x 256 numbers (headdim x d_state), not {headdim} x {d_state}"
    if rank > 16:
        return f"takes up to 16 entries per group, not {rank}"
    return None
