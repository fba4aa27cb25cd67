"""What the Triton kernels of the selective scan cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal
from everstate.core.state import Slots
from everstate.ops.limits import refusal_of_strides, step_refusal

LARGEST = 32
"""Numbers in the state of a channel that one thread holds, beside those of A."""

LARGEST_STEP = 1024


def accepts_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **settings: Any,
) -> str | None:
    """Why the kernels of `selective_scan` do not serve these arguments, or None."""
    if len(x) == 0:
        return "was given no sequences"
    why = refusal(x, dt, A, B, C, state, D, z, dt_bias)
    if why is None and A.shape[1] > LARGEST:
        why = f"takes states of up to {LARGEST} numbers per channel, not {A.shape[1]}"
    return why


def accepts_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    slots: Slots = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> str | None:
    """Why the kernel of `selective_step_` does not serve these arguments, or None."""
    why = step_refusal(state, x, dt, A, B, C, D, z, dt_bias)
    if why is not None:
        return why
    if A.shape[1] > LARGEST_STEP:
        return f"takes states of up to {LARGEST_STEP} numbers per channel, not {A.shape[1]}"
    if state.stride(-1) != 1:
        return f"takes a pool whose last dimension is dense, not one of strides {state.stride()}"
    return None


def accepts_mamba1_step(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    slots: Slots = None,
    *,
    dt_bias: Tensor,
    dt_weight: Tensor | None = None,
    dt_scale: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_t: Tensor | None = None,
) -> str | None:
    """Why the kernel of `mamba1_step_` does not serve these arguments, or None."""
    why = accepts_step(x, dt, A_log, B, C, state, slots, D=D, z=z, dt_bias=dt_bias)
    why = why or step_refusal(state, dt_weight, dt_scale, delta_t)
    return why or refusal_of_strides(A_log, D, dt_bias, dt_weight, dt_scale)
