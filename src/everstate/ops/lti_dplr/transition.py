"""The discretised matrix of a normal-plus-low-rank system, in O(n): diagonal plus rank one.

With `w = dt/2` and `E = 1 / (1 - w A)` the Woodbury identity gives `(I - w (A - P P^H))^-1 = E - g k`, where
`k = P^H E` and `g = E P w / (1 + w P^H E P)`. Because `I + w A = 2 I - (I - w A)`, the bilinear matrix is
`dA = 2 (E - g k) - I`. A vector holds one half of its conjugate pairs, so that an inner product `k x` over all of
them is `2 Re(k x)` over the half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from everstate.ops.lti_conv.blocks import halves, real


class Transition(NamedTuple):
    """`dA x = diagonal x - column Re(row x)`, and `dB`."""

    diagonal: Complex[Tensor, "*b n"]
    column: Complex[Tensor, "*b n"]
    row: Complex[Tensor, "*b n"]
    dB: Complex[Tensor, "*b n"]


def transition(
    A: Complex[Tensor, "d n"],
    P: Complex[Tensor, "d n"],
    B: Complex[Tensor, "d n"],
    dt: Float[Tensor, "*b d"],
) -> Transition:
    """One step of dt by the bilinear rule."""
    w = dt.unsqueeze(-1) / 2
    E = 1 / (1 - w * A)
    k = P.conj() * E
    g = E * P * (w / (1 + w * 2 * (k * P).sum(-1, keepdim=True).real))
    dB = 2 * w * (E * B - g * 2 * (k * B).sum(-1, keepdim=True).real)
    return Transition(diagonal=2 * E - 1, column=4 * g, row=k, dB=dB)


def apply(step: Transition, x: Complex[Tensor, "*b d n"]) -> Complex[Tensor, "*b d n"]:
    """`dA x`."""
    return step.diagonal * x - step.column * (step.row * x).sum(-1, keepdim=True).real


def recur(
    step: Transition,
    C: Complex[Tensor, "d n"],
    u: Float[Tensor, "*b l d"],
    x: Complex[Tensor, "*b d n"],
) -> tuple[Float[Tensor, "*b l d"], Complex[Tensor, "*b d n"]]:
    """Token after token `x = dA x + dB u; y = 2 Re(C x)`."""
    ys = []
    for now in u.unbind(-2):
        x = apply(step, x) + step.dB * now.unsqueeze(-1)
        ys.append(2 * (C * x).sum(-1).real)
    return torch.stack(ys, -2), x


def dense(step: Transition) -> Float[Tensor, "d s s"]:
    """dA in real coordinates, transposed: it moves a row vector, `real(apply(step, x)) = real(x) @ dense(step)`."""
    channels, pairs = step.diagonal.shape
    eye = torch.eye(2 * pairs, dtype=step.diagonal.real.dtype, device=step.diagonal.device)
    each = Transition(*(part.unsqueeze(-2) for part in step))
    return real(apply(each, halves(eye).expand(channels, -1, -1)))


def squares(T: Float[Tensor, "d s s"], count: int) -> list[Float[Tensor, "d s s"]]:
    """`T, T^2, T^4, ...`: those that the powers up to `count` are made of."""
    powers = [T]
    while 2 ** len(powers) <= count:
        powers.append(powers[-1] @ powers[-1])
    return powers


def factors(powers: list[Float[Tensor, "d s s"]], exponent: int) -> list[Float[Tensor, "d s s"]]:
    """Those of the squares of T whose product is `T^exponent`."""
    return [power for bit, power in enumerate(powers) if exponent >> bit & 1]


def krylov(row: Float[Tensor, "d s"], powers: list[Float[Tensor, "d s s"]], count: int) -> Float[Tensor, "d count s"]:
    """`row, row T, ..., row T^(count - 1)`, by doubling."""
    table = row.unsqueeze(1)
    for power in powers:
        if table.shape[1] < count:
            table = torch.cat([table, table @ power], 1)
    return table[:, :count]
