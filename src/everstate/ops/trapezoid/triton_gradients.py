"""What the parts of the backward pass of the trapezoid give each other."""

from typing import NamedTuple

from torch import Tensor


class _InputGradients(NamedTuple):
    """By chunk and head, but for x: of the sums of decays, the scales, the own weights, the factors and D."""

    x: Tensor
    decays: Tensor
    scales: Tensor
    owns: Tensor
    mimo_x: Tensor | None
    D: Tensor | None


class _KeyGradients(NamedTuple):
    """Of B and C; of the biases; of omega; and of dt, as the angles say, by chunk and head."""

    B: Tensor
    C: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    omega: Tensor
    dt: Tensor


class _EnterGradients(NamedTuple):
    """By sequence: of the state, of what the token before owes, its key, its input, and the factors."""

    ssm: Tensor
    owed: Tensor
    k: Tensor
    x: Tensor
    mimo_x: Tensor | None
