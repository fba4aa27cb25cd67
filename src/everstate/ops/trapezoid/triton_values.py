"""What a call of the trapezoid is given, and what the parts of its backward pass give each other."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """What the op reads, in the order of its own signature."""

    x: Tensor
    dt: Tensor
    A: Tensor
    lam: Tensor
    omega: Tensor
    B: Tensor
    C: Tensor
    ssm: Tensor
    k: Tensor
    last: Tensor
    angle: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    mimo_x: Tensor | None
    D: Tensor | None


class InputGradients(NamedTuple):
    """By chunk and head, but for x: of the sums of decays, the scales, the own weights, the factors and D."""

    x: Tensor
    decays: Tensor
    scales: Tensor
    owns: Tensor
    mimo_x: Tensor | None
    D: Tensor | None


class KeyGradients(NamedTuple):
    """Of B and C; of the biases; of omega; and of dt, as the angles say, by chunk and head."""

    B: Tensor
    C: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    omega: Tensor
    dt: Tensor


class EnterGradients(NamedTuple):
    """By sequence: of the state, of what the token before owes, its key, its input, and the factors."""

    ssm: Tensor
    owed: Tensor
    k: Tensor
    x: Tensor
    mimo_x: Tensor | None
