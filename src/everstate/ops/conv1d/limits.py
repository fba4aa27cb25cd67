"""What the Triton kernels of the short convolution cannot take. Read without Triton, which need not be there."""

from __future__ import annotations

from torch import Tensor

from everstate.core.kernels import refusal
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.ops.limits import refusal_of_strides, step_refusal

WIDEST = 16
"""Taps that a program holds for each channel."""


def accepts_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    packing: Packing | None = None,
) -> str | None:
    """Why the kernels of `causal_conv1d` do not serve these arguments, or None."""
    if x.numel() == 0:
        return "was given no tokens"
    return refusal(x, weight, bias, state) or refusal_of_taps(weight)


def accepts_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Slots = None,
    *,
    activation: str | None = None,
) -> str | None:
    """Why the kernel of `causal_conv1d_step_` does not serve these arguments, or None."""
    return step_refusal(state, x, weight, bias) or refusal_of_strides(weight, bias) or refusal_of_taps(weight)


def refusal_of_taps(weight: Tensor) -> str | None:
    """Why the kernels do not serve a weight `(d, k)`, or None."""
    return f"takes up to {WIDEST} taps, not {weight.shape[1]}" if weight.shape[1] > WIDEST else None
