"""A Mamba-3 layer between its projections, made of ops that are served each in its fastest way."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.ops.glu import gated
from everstate.ops.linear import linear
from everstate.ops.mamba3.ends import Mamba3Layer, enter, leave
from everstate.ops.norm import gated_rms_norm, rms_norm
from everstate.ops.trapezoid import TrapezoidState, trapezoid_scan, trapezoid_step_


def mamba3_scan(
    projected: Float[Tensor, "b l w"],
    state: TrapezoidState,
    delta_t: Float[Tensor, "b l"] | None = None,
    *,
    layer: Mamba3Layer,
    out_proj: Float[Tensor, "d e"] | None = None,
    packing: Packing | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b l d"], TrapezoidState]:
    """See `everstate.ops.mamba3_scan`."""
    z, inputs = enter(projected, delta_t, layer, state, rms_norm)
    y, state = trapezoid_scan(
        *inputs, state, B_bias=layer.B_bias, C_bias=layer.C_bias, mimo_x=layer.mimo_x, D=layer.D,
        interleaved=layer.interleaved, packing=packing, chunk_size=chunk_size,
    )  # fmt: skip
    out = leave(y, z, layer, gated, gated_rms_norm)
    return out if out_proj is None else linear(out, out_proj.to(out.dtype)), state


def mamba3_step_(
    projected: Float[Tensor, "b w"],
    state: TrapezoidState,
    slots: Slots = None,
    delta_t: Float[Tensor, " b"] | None = None,
    *,
    layer: Mamba3Layer,
) -> Float[Tensor, "b e"]:
    """See `everstate.ops.mamba3_step_`."""
    z, inputs = enter(projected, delta_t, layer, state, rms_norm)
    y = trapezoid_step_(
        *inputs, state, slots, B_bias=layer.B_bias, C_bias=layer.C_bias, mimo_x=layer.mimo_x, D=layer.D,
        interleaved=layer.interleaved,
    )  # fmt: skip
    return leave(y, z, layer, gated, gated_rms_norm)
