"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from everstate.core.config import Config
from everstate.core.errors import RequestError
from everstate.ops import argmax


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


FEW = 1024
"""Tokens up to which those that `top_k` keeps are picked out instead of sorting all."""


class Filters(NamedTuple):
    """The settings of several rows as tensors; a `top_k` of 0 keeps all."""

    temperature: Float[Tensor, " b"]
    top_k: Int[Tensor, " b"]
    top_p: Float[Tensor, " b"]
    min_p: Float[Tensor, " b"]

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> Filters:
        """Those of each row."""
        real = [[s.temperature, s.top_p, s.min_p] for s in samplings]
        temperature, top_p, min_p = torch.tensor(real, dtype=torch.float64, device=device).unbind(1)
        # No vocabulary is that large, and a tensor of int64 does not hold every int of Python.
        top_k = torch.tensor([min(s.top_k, 2**62) for s in samplings], device=device)
        return cls(temperature, top_k, top_p, min_p)


def greedy(logits: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
    """The most likely token of each row: what `choose` gives at temperature 0, without a sort."""
    return argmax(logits)


def most_kept(samplings: Sequence[Sampling]) -> int:
    """The most tokens that any row keeps, if each keeps few by its `top_k`; otherwise 0."""
    kept = [s.top_k for s in samplings if s.temperature > 0]
    return max(kept) if kept and min(kept) > 0 and max(kept) <= FEW else 0


def choose(logits: Float[Tensor, "b v"], u: Float[Tensor, " b"], filters: Filters, most: int = 0) -> Int[Tensor, " b"]:
    """The token of each row at the point u in [0, 1) of the distribution that the filters leave, likeliest first.

    On any device, without making it wait. Rows do not meet. `most`, which `most_kept` gives, spares sorting all tokens.
    """
    temperature = filters.temperature.unsqueeze(1)
    values, order = _likeliest(logits, most)
    p = torch.softmax(values.double() / torch.where(temperature > 0, temperature, 1.0), -1)
    rank = torch.arange(p.shape[1], device=p.device).expand_as(p)
    top_k = filters.top_k.unsqueeze(1)
    p = p.masked_fill((top_k > 0) & (rank >= top_k), 0.0)
    p = p / p.sum(-1, keepdim=True)
    kept = (p.cumsum(-1) - p < filters.top_p.unsqueeze(1)) & (p >= filters.min_p.unsqueeze(1) * p[:, :1]) & (p > 0)
    kept = kept | (rank == 0)
    reached = (p * kept).cumsum(-1)
    found = torch.searchsorted(reached, u.unsqueeze(1) * reached[:, -1:], right=True)
    # The last kept token takes what rounding leaves of the sum.
    chosen = torch.minimum(found, (rank * kept).amax(-1, keepdim=True))
    return torch.where(filters.temperature > 0, order.gather(1, chosen).squeeze(1), greedy(logits))


def _likeliest(logits: Float[Tensor, "b v"], most: int) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """The logits in falling order and where they are, equal ones by place: all, or the first `most`."""
    size = logits.shape[1]
    if not 0 < most < size:
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    # One whole number for value and place, so that no two are equal: `topk` gives equal ones in any order.
    bits = (logits.float() + 0.0).view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    places = torch.arange(size - 1, -1, -1, device=logits.device)
    keys = torch.topk(rising * 2**32 + places, most).values
    order = size - 1 - keys % 2**32
    return logits.gather(1, order), order


_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_Words = NDArray[np.uint64]


def uniforms(seeds: Sequence[int], positions: Sequence[int], count: int) -> NDArray[np.float64]:
    """The number in [0, 1) that decides each of `count` tokens of each row, the first at the row's position.

    It follows from seed and position alone: there is no generator whose place would have to be saved with a session.
    Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), many counters at once; it equals
    `numpy.random.Generator(numpy.random.Philox(key=seed, counter=position)).random()`.
    """
    # numpy counts up before it draws.
    first = np.array([[position + 1] for position in positions], dtype=np.uint64)
    c0 = first + np.arange(count, dtype=np.uint64)
    c1, c2, c3 = (np.zeros_like(c0) for _ in range(3))
    key = np.array([[seed] for seed in seeds], dtype=np.uint64)
    for i in range(_ROUNDS):
        k0 = key + np.uint64(i * _KEY_STEPS[0] % 2**64)
        k1 = np.uint64(i * _KEY_STEPS[1] % 2**64)
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return (c0 >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _product(x: _Words, factor: int) -> tuple[_Words, _Words]:
    """The upper and the lower 64 bits of a product of 128."""
    half, mask = np.uint64(32), np.uint64(2**32 - 1)
    a, b = np.uint64(factor >> 32), np.uint64(factor % 2**32)
    upper, lower = x >> half, x & mask
    middle = (lower * b >> half) + (upper * b & mask) + (lower * a & mask)
    high = upper * a + (upper * b >> half) + (lower * a >> half) + (middle >> half)
    return high, x * np.uint64(factor)
