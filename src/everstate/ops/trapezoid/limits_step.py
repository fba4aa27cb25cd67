"""What the Triton kernel of one token of the trapezoid cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everstate.ops.limits import step_refusal

LARGEST = 1024
"""Numbers per channel of the state, and channels of a head."""

RANKS = 8


def accepts_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    lam: Tensor,
    omega: Tensor,
    B: Tensor,
    C: Tensor,
    state: Any,
    slots: Tensor | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    D: Tensor | None = None,
    interleaved: bool = True,
) -> str | None:
    """Why the kernel of `trapezoid_step_` does not serve these arguments, or None."""
    return pool_refusal(state, x, dt, A, lam, omega, B, C, B_bias, C_bias, mimo_x, D)


def pool_refusal(state: Any, *inputs: Tensor | None) -> str | None:
    """Why no kernel can step this pool of states with these inputs, or None."""
    why = step_refusal(*state, *inputs)
    if why is not None:
        return why
    ssm, k, _, angle = state
    if angle.dtype != torch.float32:
        # A rounded angle would be off by more with every token.
        return f"keeps angles in float32, not in {str(angle.dtype).removeprefix('torch.')}"
    (headdim, d_state), rank = ssm.shape[-2:], k.shape[1]
    if max(headdim, d_state) > LARGEST:
        return f"takes heads of up to {LARGEST} x {LARGEST} numbers (headdim x d_state), not {headdim} x {d_state}"
    if rank > RANKS:
        return f"takes up to {RANKS} ranks, not {rank}"
    if any(t.stride(-1) != 1 for t in state):
        return "takes a pool of states whose last dimensions are dense"
    return None
