"""Gated activation: the nonlinearity of SwiGLU and its kin, and the gate of a layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.ops.activations import ACTIVATIONS, Activation, activate
from everstate.ops.glu.limits import accepts, accepts_gate


@op
def glu(h: Float[Tensor, "*b f2"], activation: Activation = "silu") -> Float[Tensor, "*b f"]:
    """Compute `act(gate) * up` for h = [gate | up], in float32 (float64 for float64 inputs).

    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    gate, up = h.to(state_dtype(h.dtype)).chunk(2, -1)
    return (ACTIVATIONS[activation](gate) * up).to(h.dtype)


glu.add("triton", "everstate.ops.glu.triton:glu", accepts)
glu.add("torch", "everstate.ops.glu.plain:glu", anywhere)


def activated(h: Float[Tensor, "*b n"], activation: Activation, gated: bool) -> Float[Tensor, "*b f"]:
    """`activate` by its fastest implementation: with a gate it is `glu`."""
    return glu(h, activation) if gated else activate(h, activation, False)


@op
def gated(y: Float[Tensor, "*b f"], z: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Compute `y silu(z)` in float32 (float64 for float64 inputs), in the dtype of y.

    Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.4.
    """
    dtype = state_dtype(y.dtype)
    return (y.to(dtype) * ACTIVATIONS["silu"](z.to(dtype))).to(y.dtype)


gated.add("triton", "everstate.ops.glu.triton:gated", accepts_gate)
gated.add("torch", "everstate.ops.glu.plain:gated", anywhere)


# Plain `Tensor`, because torch.compile traces this on the way to kernels and not through checks of shapes.
def gate_heads(y: Tensor, z: Tensor | None) -> Tensor:
    """`gated(y, z)` of the `(b, l, ..., h, p)` that a scan returns, or y itself where there is no gate.

    Heads (and ranks) of a token are joined: one head is too few numbers for a program of the kernel.
    """
    if z is None:
        return y
    # y may still be float32 where z is not; the gate is then computed in float32 too.
    z = z.to(torch.promote_types(y.dtype, z.dtype))
    return gated(y.flatten(2), z.flatten(2)).view(y.shape)
