"""What no step kernel can take. Read without Triton, which need not be there."""

from __future__ import annotations

import torch
from torch import Tensor

from everstate.core.kernels import refusal


def step_refusal(state: Tensor, *inputs: Tensor | None) -> str | None:
    """Why kernels of one token cannot serve this pool of states and these inputs, or None."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, *inputs)):
        return "has no gradient for a single token; call it under torch.no_grad()"
    return refusal(*inputs, state)


def refusal_of_matrices(*matrices: Tensor) -> str | None:
    """Why kernels that read weights row by row cannot serve, or None."""
    if all(matrix.is_contiguous() for matrix in matrices):
        return None
    return "takes weights that lie row by row in memory"


def refusal_of_strides(*vectors: Tensor | None) -> str | None:
    """Why kernels that read these from end to end cannot serve, or None. A copy is too late where kernels overlap."""
    if all(t is None or t.is_contiguous() for t in vectors):
        return None
    return "takes weights, biases and scales that lie in one piece of memory"
