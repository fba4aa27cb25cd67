"""The recurrence of Mamba-3: trapezoidal rule, rotating keys and queries, one or several ranks (SISO, MIMO)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.rotary import rotate
from everstate.ops.trapezoid.limits import accepts_scan
from everstate.ops.trapezoid.limits_step import accepts_step


class TrapezoidState(NamedTuple):
    """What the next token needs of the past. All zeros means that there was none.

    ssm: the state of each head; k, x: the rotated key and the input of the last token, which enter once more with the
    next one; angle: how far keys and queries have turned, between -pi and pi.
    """

    ssm: Float[Tensor, "b h p n"]
    k: Float[Tensor, "b r h n"]
    x: Float[Tensor, "b h p"]
    angle: Float[Tensor, "b h s"]


class TrapezoidInputs(NamedTuple):
    """The leading arguments of the ops: of all tokens, or of one."""

    x: Float[Tensor, "*b h p"]
    dt: Float[Tensor, "*b h"]
    A: Float[Tensor, "*b h"]
    lam: Float[Tensor, "*b h"]
    omega: Float[Tensor, "*b s"]
    B: Float[Tensor, "*b r g n"]
    C: Float[Tensor, "*b r g n"]


@op
def trapezoid_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, "b l h"],
    lam: Float[Tensor, "b l h"],
    omega: Float[Tensor, "b l s"],
    B: Float[Tensor, "b l r g n"],
    C: Float[Tensor, "b l r g n"],
    state: TrapezoidState,
    *,
    B_bias: Float[Tensor, "h r n"] | None = None,
    C_bias: Float[Tensor, "h r n"] | None = None,
    mimo_x: Float[Tensor, "h r p"] | None = None,
    D: Float[Tensor, " h"] | None = None,
    z: Float[Tensor, "b l r h p"] | None = None,
    interleaved: bool = True,
    packing: Packing | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b l r h p"], TrapezoidState]:
    """Run the trapezoidal rule on a state that is read and written in a turning frame; for each head and rank r

        angle += dt omega      k[r] = Rot(angle) (B[r] + B_bias[r])     q[r] likewise of C      u[r] = x mimo_x[r]
        state = exp(A dt) (state + (1 - lam) dt sum_r u'[r] k'[r]^T) + lam dt sum_r u[r] k[r]^T
        y[r] = (state q[r] + D u[r]) silu(z[r])      z has exactly the shape of y, its one or several ranks too

    (u = x without `mimo_x`, no gate without `z`), where u', k' are those of the token before; `A` < 0 < `dt` and
    0 < `lam` < 1. `omega` turns the first s of the n / 2 pairs of entries, `(2j, 2j + 1)` if `interleaved`, else
    `(j, j + n / 2)`. Head h uses group h // (heads / groups) of B and C. The state is float32 (float64 of float64).

    Source: Lahoti et al. 2026, "Mamba-3" (arXiv 2603.15569); gate: Gu and Dao 2023 (arXiv 2312.00752), section 3.4.
    """
    if packing is not None:
        timed = {"x": x, "dt": dt, "A": A, "lam": lam, "omega": omega, "B": B, "C": C, "z": z}
        fixed = {"B_bias": B_bias, "C_bias": C_bias, "mimo_x": mimo_x, "D": D, "interleaved": interleaved}
        return each_sequence(trapezoid_scan.reference, packing, timed, state, **fixed)
    dtype, heads = state_dtype(x.dtype), x.shape[2]
    skip = 0.0 if D is None else D.to(dtype).unsqueeze(-1)
    keys, queries = by_head(B.to(dtype), heads, B_bias), by_head(C.to(dtype), heads, C_bias)
    gate = 1.0 if z is None else silu(z.to(dtype))
    h, k_before, x_before, angle = (t.to(dtype) for t in state)
    (inputs, u_before), ys = (by_rank(v, B.shape[2], mimo_x) for v in (x.to(dtype), x_before)), []
    for t in range(x.shape[1]):
        u, step = inputs[:, t], dt[:, t].to(dtype)
        angle = wrap(angle + step.unsqueeze(-1) * omega[:, t, None].to(dtype))
        k, q = (_turned(m[:, t], angle, interleaved) for m in (keys, queries))
        h = h + _outer((1 - lam[:, t].to(dtype)) * step, u_before, k_before)
        h = torch.exp(A[:, t].to(dtype) * step)[..., None, None] * h + _outer(lam[:, t].to(dtype) * step, u, k)
        ys.append(torch.einsum("bhpn,brhn->brhp", h, q) + skip * u)
        u_before, k_before = u, k
    return (torch.stack(ys, 1) * gate).to(x.dtype), TrapezoidState(h, k_before, x[:, -1].to(dtype, copy=True), angle)


@op
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
    """One token of `trapezoid_scan` for the rows `slots` of a pool of states, written in place."""
    x, dt, A, lam, omega, B, C = (t.unsqueeze(1) for t in (x, dt, A, lam, omega, B, C))
    y, after = trapezoid_scan.reference(
        x, dt, A, lam, omega, B, C, gather(state, slots),
        B_bias=B_bias, C_bias=C_bias, mimo_x=mimo_x, D=D, interleaved=interleaved,
    )  # fmt: skip
    scatter_(state, slots, after)
    return y[:, 0]


def _turned(m: Float[Tensor, "b r h n"], angle: Float[Tensor, "b h s"], interleaved: bool) -> Float[Tensor, "b r h n"]:
    """Keys or queries of one token in the turning frame."""
    cos, sin = torch.cos(angle).unsqueeze(1), torch.sin(angle).unsqueeze(1)
    return rotate.reference(m, cos, sin, interleaved=interleaved)


def _outer(
    weight: Float[Tensor, "b h"], u: Float[Tensor, "b r h p"], k: Float[Tensor, "b r h n"]
) -> Float[Tensor, "b h p n"]:
    """What inputs and keys add to the state, summed over the ranks."""
    return torch.einsum("bh,brhp,brhn->bhpn", weight, u, k)


def wrap(angle: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The same angle between -pi and pi."""
    return angle - math.tau * torch.round(angle / math.tau)


def by_head(
    vectors: Float[Tensor, "*b r g n"], heads: int, bias: Float[Tensor, "h r n"] | None
) -> Float[Tensor, "*b r h n"]:
    """B or C of each head: that of its group, and the bias of the head."""
    groups = vectors.shape[-2]
    each = vectors.unsqueeze(-2).expand(*vectors.shape[:-1], heads // groups, -1)
    if bias is not None:
        each = each + bias.to(each.dtype).transpose(0, 1).unflatten(1, (groups, -1))
    return each.flatten(-3, -2)


def by_rank(x: Float[Tensor, "*b h p"], rank: int, mimo_x: Float[Tensor, "h r p"] | None) -> Float[Tensor, "*b r h p"]:
    """The input of each rank."""
    if mimo_x is None:
        return x.unsqueeze(-3).expand(*x.shape[:-2], rank, *x.shape[-2:])
    return x.unsqueeze(-3) * mimo_x.to(x.dtype).transpose(0, 1)


trapezoid_scan.add("triton", "everstate.ops.trapezoid.triton:trapezoid_scan", accepts_scan)
trapezoid_scan.add("torch", "everstate.ops.trapezoid.lookahead:trapezoid_scan", anywhere)
trapezoid_step_.add("triton", "everstate.ops.trapezoid.triton_step:trapezoid_step_", accepts_step)
trapezoid_step_.add("torch", "everstate.ops.trapezoid.step:trapezoid_step_", anywhere)
