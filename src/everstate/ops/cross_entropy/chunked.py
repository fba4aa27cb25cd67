"""Cross entropy over chunks of tokens, whose logits are made twice: for the loss and for its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from everstate.core.dtypes import state_dtype
from everstate.ops.cross_entropy import IGNORE

LOGITS = 2**24
"""Logits in memory at a time: 64 MB in float32."""


class _Settings(NamedTuple):
    softcap: float | None
    chunk_size: int


def linear_cross_entropy(
    x: Float[Tensor, "*t d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "*t"],
    *,
    bias: Float[Tensor, " v"] | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    reduction: str = "none",
) -> Float[Tensor, "*t"] | Float[Tensor, ""]:
    """See `everstate.ops.linear_cross_entropy`."""
    settings = _Settings(softcap, chunk_size or max(LOGITS // weight.shape[0], 1))
    loss: Tensor = _Loss.apply(x.flatten(0, -2), weight, bias, targets.flatten(), settings)
    return loss.sum() if reduction == "sum" else loss.view(targets.shape)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """The product in the dtype of x, as every other of the model; what follows in float32."""
    logits = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).to(state_dtype(x.dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _Loss(torch.autograd.Function):
    """Keeps the log of each token's sum between forward and backward, and no logits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> Tensor:
        losses, sums = [], []
        for u, target in zip(x.split(settings.chunk_size), targets.split(settings.chunk_size), strict=True):
            logits = _logits(u, weight, bias, settings.softcap)
            sums.append(logits.logsumexp(-1))
            chosen = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
            losses.append((sums[-1] - chosen).masked_fill(target == IGNORE, 0.0))
        ctx.save_for_backward(x, weight, bias, targets, torch.cat(sums))
        ctx.settings = settings
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, sums = ctx.saved_tensors
        softcap, size = ctx.settings
        grad = grad.masked_fill(targets == IGNORE, 0.0)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=state_dtype(x.dtype))
        grad_bias = torch.zeros_like(bias, dtype=state_dtype(x.dtype)) if bias is not None else None
        for start in range(0, x.shape[0], size):
            now = slice(start, start + size)
            logits = _logits(x[now], weight, bias, softcap)
            slope = torch.exp(logits - sums[now, None])
            rows = torch.arange(slope.shape[0], device=x.device)
            slope[rows, targets[now].clamp(min=0)] -= 1.0
            slope *= grad[now, None]
            if softcap is not None:
                slope *= 1.0 - (logits / softcap).square()
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(x.dtype)
            grad_x[now] = slope @ weight.to(x.dtype)
            grad_weight += slope.T @ x[now]
        return grad_x, grad_weight.to(weight.dtype), None if grad_bias is None else grad_bias.to(bias.dtype), None, None
