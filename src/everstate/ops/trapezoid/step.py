"""One token of the trapezoid: one decay, one product that adds both ends of the step, one read, in place."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.rotary import rotate
from everstate.ops.trapezoid import TrapezoidState, by_head, by_rank, wrap


def trapezoid_step_(
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A: Float[Tensor, "b h"],
    lam: Float[Tensor, "b h"],
    omega: Float[Tensor, "b s"],
    B: Float[Tensor, "b r g n"],
    C: Float[Tensor, "b r g n"],
    state: TrapezoidState,
    slots: Slots = None,
    *,
    B_bias: Float[Tensor, "h r n"] | None = None,
    C_bias: Float[Tensor, "h r n"] | None = None,
    mimo_x: Float[Tensor, "h r p"] | None = None,
    D: Float[Tensor, " h"] | None = None,
    interleaved: bool = True,
) -> Float[Tensor, "b r h p"]:
    """See `everstate.ops.trapezoid_step_`."""
    dtype, heads, rank = state_dtype(x.dtype), x.shape[1], B.shape[1]
    now, dt, A, lam, omega, B, C = (t.to(dtype) for t in (x, dt, A, lam, omega, B, C))
    h, k_before, x_before, angle = (t.to(dtype) for t in gather(state, slots))
    angle = wrap(angle + dt.unsqueeze(2) * omega.unsqueeze(1))
    cos, sin = torch.cos(angle).unsqueeze(1), torch.sin(angle).unsqueeze(1)
    both = torch.stack([by_head(B, heads, B_bias), by_head(C, heads, C_bias)])
    k, q = rotate(both, cos, sin, interleaved=interleaved)
    alpha, gamma = torch.exp(A * dt), lam * dt
    beta = (dt - gamma) * alpha
    u_before, u = (by_rank(t, rank, mimo_x) for t in (x_before, now))
    entering = torch.cat([u_before * beta[:, None, :, None], u * gamma[:, None, :, None]], 1).permute(0, 2, 3, 1)
    keys = torch.cat([k_before, k], 1).transpose(1, 2)
    h = h.contiguous()
    h.mul_(alpha[..., None, None]).flatten(0, 1).baddbmm_(entering.flatten(0, 1), keys.flatten(0, 1))
    # The state on the right and transposed: its rows are read as they lie, several times faster than state @ q.
    y = torch.matmul(q.transpose(1, 2), h.transpose(2, 3)).transpose(1, 2)
    y = y if D is None else y + D.to(dtype).unsqueeze(1) * u
    scatter_(state, slots, TrapezoidState(h, k, now, angle))  # where h is the pool itself, this copies nothing
    return y.to(x.dtype)
