"""All that a Mamba-2 layer does between its two projections."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.ops.conv1d import causal_conv1d
from everstate.ops.glu import gated
from everstate.ops.linear import linear
from everstate.ops.mamba2.ends import Mamba2Layer, Mamba2State, decay, inputs, leave, parts
from everstate.ops.mamba2.limits import accepts_scan
from everstate.ops.norm import gated_rms_norm
from everstate.ops.ssd import ssd_scan


@op
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
    """Run `ssd_scan` on what `in_proj` gives, `[z | x | B | C | dt]`, and gate what it returns:

        [x | B | C] = silu(conv([x | B | C]))    dt = delta_t clamp(softplus(dt + dt_bias), dt_limit)
        y = ssd_scan(x, -exp(A_log) dt, dt, B, C) + D x    out = norm(y silu(z))

    or `norm(y) silu(z)` with `norm_before_gate`; without `norm`, `y silu(z)`. Each of `ngroups` equal parts of y has a
    norm of its own; e = h p. With `out_proj`, the product of that and `out` is returned, and `out` need not be kept for
    the gradients. `delta_t` is the time that passes before each token.

    Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7.
    """
    if packing is not None:
        timed = {"projected": projected, "delta_t": delta_t}
        return each_sequence(mamba2_scan.reference, packing, timed, state, layer=layer, out_proj=out_proj)
    z, xBC, dt = parts(projected.to(state_dtype(projected.dtype)), layer)
    xBC, conv = causal_conv1d.reference(xBC, layer.conv_weight, layer.conv_bias, state.conv, activation="silu")
    x, B, C = inputs(xBC, layer, state.ssm)
    a, dt = decay(dt, delta_t, layer)
    y, ssm = ssd_scan.reference(x, a, dt, B, C, state.ssm, D=layer.D)
    out = leave(y, z, layer, gated.reference, gated_rms_norm.reference)
    out = out if out_proj is None else linear.reference(out, out_proj)
    return out.to(projected.dtype), Mamba2State(conv, ssm)


mamba2_scan.add("triton", "everstate.ops.mamba2.triton:mamba2_scan", accepts_scan)
mamba2_scan.add("torch", "everstate.ops.mamba2.composed:mamba2_scan", anywhere)
