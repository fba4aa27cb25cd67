"""All that a Mamba-3 layer does between its two projections."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.glu import gated
from everstate.ops.linear import linear
from everstate.ops.mamba3.ends import Mamba3Layer, enter, leave
from everstate.ops.mamba3.limits import accepts_scan, accepts_step
from everstate.ops.norm import gated_rms_norm, rms_norm
from everstate.ops.trapezoid import TrapezoidState, trapezoid_scan


@op
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
    """Run `trapezoid_scan` on what `in_proj` gives, `[z | x | B | C | dt | A | lam | omega]`, and gate what it returns:

        dt = delta_t softplus(dt + dt_bias)   A = min(-f(A), -A_floor)   lam = sigmoid(lam)   omega = pi tanh(omega)
        B = rms_norm(B) B_norm    C = rms_norm(C) C_norm    y = trapezoid_scan(x, dt, A, lam, omega, B, C)
        out = sum_r mimo_o[r] silu(z mimo_z[r]) norm(y[r])

    f is softplus, or 1 + a for a >= 0 and 1 / (1 - a) below (`heavy_tail`); `norm` is that of each head of y where the
    layer has one. B and C lie as (r, g, n); e = h p. With `out_proj`, the product of that and `out` is returned, and
    `out` need not be kept for the gradients. `delta_t` is the time that passes before each token.

    Source: Lahoti et al. 2026, "Mamba-3" (arXiv 2603.15569).
    """
    if packing is not None:
        timed = {"projected": projected, "delta_t": delta_t}
        return each_sequence(mamba3_scan.reference, packing, timed, state, layer=layer, out_proj=out_proj)
    z, inputs = enter(projected.to(state_dtype(projected.dtype)), delta_t, layer, state, rms_norm.reference)
    y, after = trapezoid_scan.reference(
        *inputs, state, B_bias=layer.B_bias, C_bias=layer.C_bias, mimo_x=layer.mimo_x, D=layer.D,
        interleaved=layer.interleaved,
    )  # fmt: skip
    out = leave(y, z, layer, gated.reference, gated_rms_norm.reference)
    out = out if out_proj is None else linear.reference(out, out_proj)
    return out.to(projected.dtype), after


@op
def mamba3_step_(
    projected: Float[Tensor, "b w"],
    state: TrapezoidState,
    slots: Slots = None,
    delta_t: Float[Tensor, " b"] | None = None,
    *,
    layer: Mamba3Layer,
) -> Float[Tensor, "b e"]:
    """One token of `mamba3_scan` for the rows `slots` of a pool of states, written in place."""
    elapsed = None if delta_t is None else delta_t.unsqueeze(1)
    y, after = mamba3_scan.reference(projected.unsqueeze(1), gather(state, slots), elapsed, layer=layer)
    scatter_(state, slots, after)
    return y[:, 0]


mamba3_scan.add("triton", "everstate.ops.mamba3.triton:mamba3_scan", accepts_scan)
mamba3_scan.add("torch", "everstate.ops.mamba3.composed:mamba3_scan", anywhere)
mamba3_step_.add("triton", "everstate.ops.mamba3.triton_step:mamba3_step_", accepts_step)
mamba3_step_.add("torch", "everstate.ops.mamba3.composed:mamba3_step_", anywhere)
