"""A Mamba-2 layer between its projections, made of ops that are served each in its fastest way."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from everstate.core.packing import Packing
from everstate.ops.conv1d import causal_conv1d
from everstate.ops.glu import gated
from everstate.ops.linear import linear
from everstate.ops.mamba2.ends import Mamba2Layer, Mamba2State, decay, inputs, leave, parts
from everstate.ops.norm import gated_rms_norm
from everstate.ops.ssd import ssd_scan


def mamba2_scan(
    projected: Float[Tensor, "b l w"],
    state: Mamba2State,
    delta_t: Float[Tensor, "b l"] | None = None,
    *,
    layer: Mamba2Layer,
    out_proj: Float[Tensor, "d e"] | None = None,
    packing: Packing | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b l d"], Mamba2State]:
    """See `everstate.ops.mamba2_scan`."""
    z, xBC, dt = parts(projected, layer)
    xBC, conv = causal_conv1d(
        xBC, layer.conv_weight, layer.conv_bias, state.conv, activation="silu", packing=packing
    )  # fmt: skip
    x, B, C = inputs(xBC, layer, state.ssm)
    a, dt = decay(dt, delta_t, layer)
    y, ssm = ssd_scan(x, a, dt, B, C, state.ssm, D=layer.D, packing=packing, chunk_size=chunk_size)
    out = leave(y, z, layer, gated, gated_rms_norm)
    return out if out_proj is None else linear(out, out_proj.to(out.dtype)), Mamba2State(conv, ssm)
