"""The selective scan of Mamba-1: a diagonal recurrence per channel whose step, input and output depend on the token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.nn.functional import silu, softplus

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.linear import linear
from everstate.ops.selective_scan.limits import accepts_mamba1_step, accepts_scan, accepts_step


@op
def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    state: Float[Tensor, "seqs d n"],
    *,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d n"]]:
    """Run `state = exp(dt A) state + dt x B^T; y = state C + D x` along time, each channel by itself.

    `dt` is the step itself; with `dt_bias`, it is `softplus(dt + dt_bias)`. `A` is negative. A gate `z` multiplies
    y by `silu(z)`. The state is float32 (float64 for float64 inputs), y has the dtype of x.

    Source: Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 3.
    """
    if packing is not None:
        timed = {"x": x, "dt": dt, "B": B, "C": C, "z": z}
        return each_sequence(selective_scan.reference, packing, timed, state, A=A, D=D, dt_bias=dt_bias)
    dtype = state_dtype(x.dtype)
    u, steps, keys, queries = (t.to(dtype) for t in (x, dt, B, C))
    if dt_bias is not None:
        steps = softplus(steps + dt_bias.to(dtype))
    h, ys = state.to(dtype), []
    for t in range(x.shape[1]):
        dA = torch.exp(steps[:, t, :, None] * A.to(dtype))
        h = dA * h + (steps[:, t] * u[:, t]).unsqueeze(2) * keys[:, t, None]
        y = torch.einsum("bdn,bn->bd", h, queries[:, t])
        y = y if D is None else y + D.to(dtype) * u[:, t]
        ys.append(y if z is None else y * silu(z[:, t].to(dtype)))
    return torch.stack(ys, 1).to(x.dtype), h


@op
def selective_step_(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b n"],
    C: Float[Tensor, "b n"],
    state: Float[Tensor, "slots d n"],
    slots: Slots = None,
    *,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "b d"]:
    """One token of `selective_scan` for the rows `slots` of a pool of states, written in place."""
    x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))
    gate = None if z is None else z.unsqueeze(1)
    y, after = selective_scan.reference(x, dt, A, B, C, gather(state, slots), D=D, z=gate, dt_bias=dt_bias)
    scatter_(state, slots, after)
    return y[:, 0]


@op
def mamba1_step_(
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b r"],
    A_log: Float[Tensor, "d n"],
    B: Float[Tensor, "b n"],
    C: Float[Tensor, "b n"],
    state: Float[Tensor, "slots d n"],
    slots: Slots = None,
    *,
    dt_bias: Float[Tensor, " d"],
    dt_weight: Float[Tensor, "d r"] | Int8[Tensor, "d r"] | None = None,
    dt_scale: Float[Tensor, " d"] | None = None,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d"] | None = None,
    delta_t: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"]:
    """What a Mamba-1 layer does with one token between its projections: `selective_step_` and what leads to it.

    With `dt_weight` (and `dt_scale`, as for `linear`) the dt that is given is of low rank r, and their product, which
    may be rounded to the dtype of x, is taken for it; else r is d. The step is `delta_t softplus(dt + dt_bias)`, with
    `delta_t` (default 1) the time that passes before this token, and A is `-exp(A_log)`. The rows `slots` of the pool
    are written in place.
    """
    dtype = state_dtype(x.dtype)
    if dt_weight is not None:
        dt = linear.reference(dt.to(dtype), dt_weight, scale=dt_scale)
    dt = softplus(dt.to(dtype) + dt_bias.to(dtype))
    if delta_t is not None:
        dt = dt * delta_t.unsqueeze(-1)
    return selective_step_.reference(x, dt, -torch.exp(A_log.to(dtype)), B, C, state, slots, D=D, z=z)


selective_scan.add("triton", "everstate.ops.selective_scan.triton:selective_scan", accepts_scan)
selective_scan.add("torch", "everstate.ops.selective_scan.blocked:selective_scan", anywhere)
selective_step_.add("triton", "everstate.ops.selective_scan.triton_step:selective_step_", accepts_step)
selective_step_.add("torch", "everstate.ops.selective_scan.step:selective_step_", anywhere)
mamba1_step_.add("triton", "everstate.ops.selective_scan.triton_step:mamba1_step_", accepts_mamba1_step)
mamba1_step_.add("torch", "everstate.ops.selective_scan.step:mamba1_step_", anywhere)
