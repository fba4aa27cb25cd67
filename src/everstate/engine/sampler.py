"""From logits to tokens."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from everstate.core.config import Config
from everstate.core.errors import RequestError


class Sampling(Config):
    """How the next token is chosen. The filters apply in this order: temperature, top_k, top_p, min_p.

    A wrong value raises `RequestError`.
    """

    title = "sampling"
    error = RequestError

    temperature: NonNegativeFloat = 1.0
    """0 takes the most likely token."""
    top_k: NonNegativeInt = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Keep the fewest tokens whose probabilities reach this sum."""
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Keep tokens at least this likely in comparison with the most likely one."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """The same seed gives the same text, whatever else runs in the batch and wherever a session was saved."""


def sample(logits: Float[Tensor, " v"], sampling: Sampling, position: int) -> int:
    """Choose the token at `position` of its sequence.

    The choice follows from logits, settings, seed and position alone: there is no generator whose place would have to
    be saved with a session.
    """
    u = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    scores = logits.to("cpu", torch.float64)
    if sampling.temperature == 0.0:
        return int(scores.argmax())
    values, order = torch.sort(scores / sampling.temperature, descending=True, stable=True)
    p = torch.softmax(values, 0)
    if sampling.top_k:
        p = p[: sampling.top_k] / p[: sampling.top_k].sum()
    kept = (p.cumsum(0) - p < sampling.top_p) & (p >= sampling.min_p * p[0])
    kept[0] = True
    p = p * kept
    # The last kept token takes what rounding leaves of the sum.
    chosen = min(int(torch.searchsorted(p.cumsum(0), u * p.sum(), right=True)), int(kept.nonzero()[-1]))
    return int(order[chosen])
