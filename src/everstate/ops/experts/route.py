"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.dtypes import state_dtype

Score = Literal["softmax_topk", "topk_softmax", "sigmoid"]
"""Softmax over all experts and then the best k of it, softmax over the best k alone, or a sigmoid for each expert."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax_topk": lambda logits: logits.softmax(-1),
    "topk_softmax": lambda logits: logits,
    "sigmoid": torch.sigmoid,
}
"""What the best k are taken of."""


def route(
    logits: Float[Tensor, "*t e"],
    *,
    top_k: int,
    score: Score = "softmax_topk",
    bias: Float[Tensor, " e"] | None = None,
    normalise: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    ngroups: int = 1,
    topk_groups: int = 1,
) -> tuple[Float[Tensor, "*t k"], Int[Tensor, "*t k"]]:
    """The weights and indices of the `top_k` experts of each token, best first.

    The weights are the experts' scores, divided by their sum (plus `eps`) if `normalise`, times `scale`. `bias` is
    added to the scores to select with, and only for that: it balances the load without a say in the output. Of
    `ngroups` equal groups of experts only the `topk_groups` whose two best have the largest sum are selected from.

    Sources: Fedus et al. 2021 (arXiv 2101.03961), Jiang et al. 2024 (`topk_softmax`, arXiv 2401.04088), Wang et al.
    2024 (bias, arXiv 2408.15664), DeepSeek-AI 2024 (groups, arXiv 2412.19437).
    """
    logits = logits.to(state_dtype(logits.dtype))
    scores = SCORES[score](logits)
    chances = scores if bias is None else scores + bias
    if topk_groups < ngroups:
        chances = _of_best_groups(chances, ngroups, topk_groups)
    indices = chances.topk(top_k, -1).indices
    weights = scores.gather(-1, indices)
    if score == "topk_softmax":
        weights = weights.softmax(-1)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + eps).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights * scale, indices


def _of_best_groups(chances: Float[Tensor, "*t e"], ngroups: int, topk_groups: int) -> Float[Tensor, "*t e"]:
    """The same, with minus infinity for every expert outside the best groups."""
    grouped = chances.unflatten(-1, (ngroups, -1))
    best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(topk_groups, -1).indices
    kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=chances.device).scatter(-1, best, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
