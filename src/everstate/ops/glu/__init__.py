"""Gated activation: the nonlinearity of SwiGLU and its kin, and the gate of a layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.ops.activations import ACTIVATIONS, Activation
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


@op
def gated(y: Float[Tensor, "*b f"], z: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """Compute `y silu(z)` in float32 (float64 for float64 inputs), in the dtype of y.

    Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.4.
    """
    dtype = state_dtype(y.dtype)
    return (y.to(dtype) * ACTIVATIONS["silu"](z.to(dtype))).to(y.dtype)


gated.add("triton", "everstate.ops.glu.triton:gated", accepts_gate)
gated.add("torch", "everstate.ops.glu.plain:gated", anywhere)
