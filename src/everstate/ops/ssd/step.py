"""One SSD token without a copy of the pool: decay, add and read the state where it lies."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu, softplus

from everstate.core.dtypes import state_dtype
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.norm import rms_norm
from everstate.ops.norm.normed import Normed
from everstate.ops.ssd.pending import Entry, Pending, step_or_wait_


def ssd_step_(
    x: Float[Tensor, "b h p"],
    a: Float[Tensor, "b h"],
    s: Float[Tensor, "b h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "slots h p n"],
    slots: Slots = None,
    *,
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
) -> Float[Tensor, "b h p"]:
    """See `everstate.ops.ssd_step_`."""
    dtype, heads = state_dtype(x.dtype), x.shape[1]
    keys, queries = (m.to(dtype).repeat_interleave(heads // m.shape[1], 1) for m in (B, C))
    u = x.to(dtype)
    held = gather(state, slots)
    h = held.to(dtype)
    h.mul_(torch.exp(a.to(dtype))[..., None, None]).add_(
        (u * s.to(dtype).unsqueeze(-1)).unsqueeze(-1) * keys[:, :, None]
    )
    if slots is not None or h is not held:
        scatter_(state, slots, h)
    # A row times a matrix: the other way round takes several times as long on a CPU.
    y = torch.matmul(queries.unsqueeze(2), h.transpose(2, 3)).squeeze(2)
    return (y if D is None else y + D.to(dtype).view(heads, -1) * u).to(x.dtype)


def mamba2_step_(
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A_log: Float[Tensor, " h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "slots h p n"],
    slots: Slots = None,
    *,
    dt_bias: Float[Tensor, " h"],
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b h p"] | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    delta_t: Float[Tensor, " b"] | None = None,
    norm: Float[Tensor, " e"] | None = None,
    eps: float = 1e-5,
    norm_groups: int = 1,
    pending: Pending | None = None,
) -> Float[Tensor, "b h p"] | Normed:
    """See `everstate.ops.mamba2_step_`."""
    dtype = state_dtype(x.dtype)
    dt = softplus(dt.to(dtype) + dt_bias)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    if delta_t is not None:
        dt = dt * delta_t.unsqueeze(-1)
    y = step_or_wait_(ssd_step_, Entry(x, dt * -torch.exp(A_log), dt, B, C), state, slots, pending, D)
    y = y if z is None else (y.to(dtype) * silu(z.to(dtype))).to(x.dtype)
    return y if norm is None else Normed(rms_norm(y.flatten(-2), norm, eps=eps, groups=norm_groups))
