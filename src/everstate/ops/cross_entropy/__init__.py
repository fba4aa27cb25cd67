"""The output head of a language model and its loss in one, because the logits of a batch do not fit in memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.ops.cross_entropy.limits import accepts_loss

IGNORE = -100
"""The target of a token that has no loss."""


@op
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
    """Compute `logsumexp(logits) - logits[target]` of each token, `logits = cap(weight x + bias)`, in float32.

    With `reduction="sum"` all of them are added; then a GPU makes the gradients together with the loss, in three large
    products where `"none"` takes four.

    A target of -100 gives 0. `cap(l) = softcap tanh(l / softcap)`. `chunk_size` is how many tokens have their logits in
    memory at a time, by default as many as make `LOGITS`; the reference holds all. Targets beyond the vocabulary are
    for the caller to refuse.
    """
    dtype = state_dtype(x.dtype)
    logits = linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return loss.sum() if reduction == "sum" else loss.view(targets.shape)


linear_cross_entropy.add("triton", "everstate.ops.cross_entropy.triton:linear_cross_entropy", accepts_loss)
linear_cross_entropy.add("torch", "everstate.ops.cross_entropy.chunked:linear_cross_entropy", anywhere)
