"""What the Triton kernels of the trapezoid cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.core.kernels import refusal, shared_memory

LARGEST = 16384
"""Numbers in the state of a head, its sides filled up as the kernels do: what fits into shared memory."""

SHARED_MEMORY = 99 * 1024
"""Bytes of shared memory that suffice."""


def accepts_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    lam: Tensor,
    omega: Tensor,
    B: Tensor,
    C: Tensor,
    state: Any,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `trapezoid_scan` do not serve these arguments, or None."""
    if len(x) == 0:
        return "was given no sequences"
    why = refusal(x, dt, A, lam, omega, B, C, *state, B_bias, C_bias, mimo_x, D, z)
    if why is not None:
        return why
    why = refusal_of_heads(x.shape[-1], B.shape[-1], omega.shape[-1], x)
    if why is not None:
        return why
    return None if B.shape[2] <= 16 else f"takes up to 16 ranks, not {B.shape[2]}"


def refusal_of_heads(headdim: int, d_state: int, pairs: int, x: Tensor) -> str | None:
    """Why the kernels of a scan do not serve heads of these sizes, in the dtype and on the device of x, or None."""
    if torch.version.hip is not None:
        return "has instructions of NVIDIA GPUs in it"
    widest, smallest = (128, 32) if x.dtype == torch.float32 else (256, 16)
    filled = lambda size: max(1 << (size - 1).bit_length(), smallest) if size else 0
    rows = filled(headdim)
    columns = 2 * filled(pairs) + filled(d_state - 2 * pairs)
    if rows > 128 or filled(d_state) > widest or rows * columns > LARGEST:
        return (
            "takes heads of up to 128 x 128 numbers (headdim x d_state), or up to 64 x 256 unless they are float32, "
            f"not {headdim} x {d_state} with {pairs} turning pairs in {str(x.dtype).removeprefix('torch.')}"
        )
    if shared_memory(x.device) < SHARED_MEMORY:
        return f"needs a GPU with {SHARED_MEMORY:,} bytes of shared memory, this one has {shared_memory(x.device):,}"
    return None
