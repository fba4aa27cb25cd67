"""The nonlinearities of channel mixers, by the names that configs use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

Activation = Literal["silu", "relu2", "gelu", "gelu_tanh"]
"""`relu2` is `relu(x)^2`, `gelu` the exact one, `gelu_tanh` its approximation."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "relu2": lambda x: relu(x).square(),
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


def activate(h: Float[Tensor, "*b f2"], activation: Activation, gated: bool) -> Float[Tensor, "*b f"]:
    """`act(h)`, or with `gated` `act(gate) * up` for h = [gate | up]. Source: Shazeer 2020 (arXiv 2002.05202)."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(h)
    gate, up = h.chunk(2, -1)
    return act(gate) * up
