"""What the Triton kernels of the experts cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everstate.core.kernels import refusal, shared_memory
from everstate.ops.limits import refusal_of_matrices, refusal_of_strides, step_refusal
from everstate.ops.norm.limits import accepts_norm
from everstate.ops.norm.normed import Normed, as_normed

SHARED_MEMORY = 96 * 1024
"""Bytes of shared memory that a product takes."""
FEW = 32
"""Rows (a token and one of its experts) up to which each reads the weights of its expert by itself."""
MOST = 4096
"""Experts whose counts a program looks through."""
ROUTED, CHOICES = 64, 32
"""Tokens up to which one launch chooses faster than PyTorch, and experts of each that it unrolls the choice of."""


def accepts(
    x: Tensor | Normed, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor, **settings: Any
) -> str | None:
    """Why the kernels of `experts` do not serve these arguments, or None."""
    x, squares, _ = as_normed(x)
    why = refusal(x, squares, weights, w_in, w_out) or refusal_of_strides(squares)
    if why is not None:
        return why
    if shared_memory(x.device) < SHARED_MEMORY:
        return f"needs a GPU with {SHARED_MEMORY:,} bytes of shared memory, this one has {shared_memory(x.device):,}"
    if len(w_in) > MOST:
        return f"takes up to {MOST} experts, not {len(w_in)}"
    if indices.numel() >= 2**31:
        return f"counts up to 2^31 rows, not {indices.numel()}"
    return None


def accepts_add(
    x: Tensor | Normed, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor, residual: Tensor, norm: Tensor,
    *, shared: tuple[Tensor, Tensor] | None = None, gated: bool = True, **settings: Any,
) -> str | None:  # fmt: skip
    """Why the kernels of `experts_add_rms_norm` do not serve these arguments, or None."""
    if not 0 < indices.numel() <= FEW:
        return f"takes 1 to {FEW} rows (a token and one of its experts)"  # a number would be fixed by a compiler
    rows, squares, _ = as_normed(x)
    if residual.shape != rows.shape or (shared is not None and not _fits(*shared, rows.shape[-1], gated)):
        return "takes a residual stream of the shape of x, and a shared expert of its width"
    matrices = (w_in, w_out, *(shared or ()))
    if any(matrix.dtype != rows.dtype for matrix in matrices):
        return "takes weights of the dtype of x"
    refused = refusal_of_matrices(*matrices) or accepts(x, weights, indices, w_in, w_out)
    refused = refused or step_refusal(residual, norm, weights, rows, squares, *matrices)
    return refused or accepts_norm(residual, norm)


def _fits(w_in: Tensor, w_out: Tensor, width: int, gated: bool) -> bool:
    """Whether these are the weights of an expert of this width."""
    return w_in.shape == ((1 + gated) * w_out.shape[1], width) and w_out.shape[0] == width


def accepts_router(
    x: Tensor | Normed, weight: Tensor, *, top_k: int, bias: Tensor | None = None, ngroups: int = 1, **settings: Any
) -> str | None:
    """Why the kernel of `topk_router` does not serve these arguments, or None."""
    x, squares, _ = as_normed(x)
    rows = x.numel() // max(x.shape[-1], 1)
    if not 0 < rows <= ROUTED:
        return f"takes 1 to {ROUTED} tokens, not {rows}"
    if max(top_k, ngroups) > CHOICES or len(weight) > MOST:
        return (
            f"takes up to {MOST} experts, {CHOICES} of them for a token, in up to {CHOICES} groups, "
            f"not {len(weight)}, {top_k} and {ngroups}"
        )
    return refusal_of_matrices(weight) or step_refusal(x, weight, bias, squares) or refusal_of_strides(squares)
