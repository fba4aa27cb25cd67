"""What the Triton kernels of SSD cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from everstate.core.kernels import refusal, shared_memory
from everstate.core.state import Slots
from everstate.ops.limits import refusal_of_strides, step_refusal
from everstate.ops.norm.limits import refusal_of_width
from everstate.ops.ssd.pending import WIDEST, Pending, shapes_of

LARGEST = 16384
"""Numbers in the state of a head, each side filled up to a power of two: what fits into registers."""

CHUNK = 64
"""Entries that are worked on at once."""


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
    z: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `ssd_scan` do not serve these arguments, or None."""
    if len(x) == 0:
        return "was given no sequences"
    why = refusal(x, a, s, B, C, state, diagonal, D, z)
    if why is not None:
        return why
    why = refusal_of_heads(x.shape[-1], B.shape[-1], x)
    if why is not None:
        return why
    if diagonal is not None and diagonal.shape[-1] > 16:
        return f"takes up to 16 entries per group, not {diagonal.shape[-1]}"
    return None


def refusal_of_heads(headdim: int, d_state: int, x: Tensor) -> str | None:
    """Why the kernels of a scan do not serve heads of these sizes, in the dtype and on the device of x, or None."""
    filled = [max(1 << (size - 1).bit_length(), 16) for size in (headdim, d_state)]
    widest = 128 if x.dtype == torch.float32 else 256
    if filled[0] > 128 or filled[1] > widest or filled[0] * filled[1] > LARGEST:
        return (
            "takes heads of up to 128 x 128 numbers (headdim x d_state), or up to 64 x 256 unless they are float32, "
            f"not {headdim} x {d_state} in {str(x.dtype).removeprefix('torch.')}"
        )
    needed = 2 * x.dtype.itemsize * (CHUNK * filled[0] + CHUNK * filled[1] + filled[0] * filled[1])
    if shared_memory(x.device) < needed:
        return f"needs {needed:,} bytes of shared memory for such heads, this GPU has {shared_memory(x.device):,}"
    return None


def accepts_step(
    x: Tensor,
    a: Tensor,
    s: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    slots: Slots = None,
    *,
    D: Tensor | None = None,
) -> str | None:
    """Why the kernel of `ssd_step_` does not serve these arguments, or None."""
    why = step_refusal(state, x, a, s, B, C, D)
    if why is not None:
        return why
    if B.shape[-1] > 1024:
        return f"takes states of up to 1024 numbers per channel, not {B.shape[-1]}"
    if state.stride(-1) != 1:
        return f"takes a pool whose last dimension is dense, not one of strides {state.stride()}"
    return None


def accepts_mamba2_step(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    slots: Slots = None,
    *,
    dt_bias: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    delta_t: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    norm_groups: int = 1,
    pending: Pending | None = None,
) -> str | None:
    """Why the kernels of `mamba2_step_` do not serve these arguments, or None."""
    refused = step_refusal(state, A_log, dt_bias, z, delta_t, norm) or accepts_step(x, dt, dt, B, C, state, slots, D=D)
    if refused is None and pending is not None:
        refused = _refusal_of_pending(x, B, C, state, pending)
    if refused is not None or norm is None:
        return refused
    return refusal_of_strides(norm) or refusal_of_width(x.shape[1] * x.shape[2], norm_groups)


def _refusal_of_pending(x: Tensor, B: Tensor, C: Tensor, state: Tensor, pending: Pending) -> str | None:
    """Why the kernel that leaves entries pending does not serve, or None."""
    from everstate.ops.ssd.triton_step import pending_kernels  # Triton is there: `refusal` was asked

    if pending_kernels(x) is None:
        return "leaves entries pending on Hopper GPUs, of 16-bit numbers"
    if state.shape[-1] > WIDEST:
        return f"leaves entries pending for up to {WIDEST} numbers per channel, not {state.shape[-1]}"
    if any(t.dtype != x.dtype for t in (B, C, pending.x, pending.B)):
        return f"takes B, C and pending entries in the dtype of x, {x.dtype}"
    if any(part.shape != shape for part, shape in zip(pending, shapes_of(state, B.shape[1]), strict=True)):
        return "takes pending entries as `nothing_pending` makes them for such states"
    if not all(part.is_contiguous() for part in pending):
        return "takes pending entries that lie in one piece of memory"
    return refusal(*pending)
