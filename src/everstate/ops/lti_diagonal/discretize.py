"""From continuous time to steps of dt, for a diagonal A (MATH: section 0)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Complex, Float
from torch import Tensor

Rule = Literal["zoh", "bilinear"]


def discretize(
    A: Complex[Tensor, "*g n"], dt: Float[Tensor, "*b"], rule: Rule
) -> tuple[Complex[Tensor, "*b n"], Complex[Tensor, "*b n"]]:
    """`(dA, gain)` with `dB = gain * B`, for steps dt of any shape that ends in that of A without n.

    zoh: `exp(dt A)` and `(exp(dt A) - 1) / A`; bilinear: `(1 + dt/2 A) / (1 - dt/2 A)` and `dt / (1 - dt/2 A)`.
    """
    z = A * dt.unsqueeze(-1)
    if rule == "zoh":
        return torch.exp(z), torch.expm1(z) / A
    below = 1 - z / 2
    return (1 + z / 2) / below, dt.unsqueeze(-1) / below
