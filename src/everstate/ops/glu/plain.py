"""The gated activation in the dtype of its input, in which PyTorch has each part."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from everstate.ops.activations import Activation, activate


def glu(h: Float[Tensor, "*b f2"], activation: Activation = "silu") -> Float[Tensor, "*b f"]:
    """See `everstate.ops.glu`."""
    return activate(h, activation, True)


def gated(y: Float[Tensor, "*b f"], z: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """See `everstate.ops.gated`."""
    return (y * silu(z)).to(y.dtype)
