"""One token of the selective scan without a copy of the pool: decay, add and read the state where it lies."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.nn.functional import silu, softplus

from everstate.core.dtypes import state_dtype
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.linear import linear


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
    """See `everstate.ops.selective_step_`."""
    dtype = state_dtype(x.dtype)
    u, steps, keys, queries = (t.to(dtype) for t in (x, dt, B, C))
    if dt_bias is not None:
        steps = softplus(steps + dt_bias.to(dtype))
    held = gather(state, slots)
    h = held.to(dtype)
    h.mul_(torch.exp(steps.unsqueeze(2) * A.to(dtype))).addcmul_((steps * u).unsqueeze(2), keys.unsqueeze(1))
    if slots is not None or h is not held:
        scatter_(state, slots, h)
    y = torch.matmul(h, queries.unsqueeze(2)).squeeze(2)
    if D is not None:
        y = y + D.to(dtype) * u
    return (y if z is None else y * silu(z.to(dtype))).to(x.dtype)


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
    """See `everstate.ops.mamba1_step_`."""
    dtype = state_dtype(x.dtype)
    if dt_weight is not None:
        dt = linear(dt, dt_weight, scale=dt_scale)
    dt = softplus(dt.to(dtype) + dt_bias.to(dtype))
    if delta_t is not None:
        dt = dt * delta_t.unsqueeze(-1)
    return selective_step_(x, dt, -torch.exp(A_log.to(dtype)), B, C, state, slots, D=D, z=z)
