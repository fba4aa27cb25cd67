"""State space duality: the recurrence of Mamba-2, and with a look-ahead scale and its own diagonal that of Mamba-3."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu, softplus

from everstate.core.dtypes import state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.norm import rms_norm
from everstate.ops.norm.normed import Normed
from everstate.ops.ssd.limits import accepts_mamba2_step, accepts_scan, accepts_step
from everstate.ops.ssd.pending import Entry, Pending, step_or_wait_


@op
def ssd_scan(
    x: Float[Tensor, "b l h p"],
    a: Float[Tensor, "b l h"],
    s: Float[Tensor, "b l h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    state: Float[Tensor, "seqs h p n"],
    *,
    diagonal: Float[Tensor, "b l h r"] | None = None,
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b l h p"] | None = None,
    packing: Packing | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "seqs h p n"]]:
    """Run `state = exp(a) state + s x B^T; y = state C + D x` along time.

    `a` is the log decay (dt A in Mamba-2, never positive), `s` the scale of the input (dt in Mamba-2). Head h uses
    group h // (heads / groups) of B and C. The state is float32 (float64 for float64 inputs), y has the dtype of x.

    With `diagonal`, entries come in groups of r that enter at once (the ranks of a MIMO model; r = 1 for SISO), l is a
    multiple of r, a group decays by the sum of its `a`, and what an entry receives from its own group is not
    `s B.C` but given: `y[i] = exp(a) state C[i] + sum_j diagonal[i, j] x[j]` over the r entries j of the group of i.

    With a gate `z`, what is returned is `y silu(z)`, D x included in y; the state does not see it.

    Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 6; of the gate, Gu and Dao 2023
    (arXiv 2312.00752), section 3.4.
    """
    if packing is not None:
        timed = {"x": x, "a": a, "s": s, "B": B, "C": C, "diagonal": diagonal, "z": z}
        return each_sequence(ssd_scan.reference, packing, timed, state, D=D)
    dtype, heads, rank = state_dtype(x.dtype), x.shape[2], 1 if diagonal is None else diagonal.shape[-1]
    skip = None if D is None else D.to(dtype).view(heads, -1)
    u, h = x.to(dtype), state.to(dtype)
    keys, queries = (m.to(dtype).repeat_interleave(heads // m.shape[2], 2) for m in (B, C))
    ys = []
    for t in range(0, x.shape[1], rank):
        now = slice(t, t + rank)
        decayed = torch.exp(a[:, now].to(dtype).sum(1))[:, :, None, None] * h
        h = decayed + torch.einsum("brh,brhp,brhn->bhpn", s[:, now].to(dtype), u[:, now], keys[:, now])
        y = torch.einsum("bhpn,brhn->brhp", h if diagonal is None else decayed, queries[:, now])
        if diagonal is not None:
            y = y + torch.einsum("brhq,bqhp->brhp", diagonal[:, now].to(dtype), u[:, now])
        ys.append(y if skip is None else y + skip * u[:, now])
    y = torch.cat(ys, 1)
    return (y if z is None else y * silu(z.to(dtype))).to(x.dtype), h


@op
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
    """One token of `ssd_scan` for the rows `slots` of a pool of states, written in place."""
    x, a, s, B, C = (t.unsqueeze(1) for t in (x, a, s, B, C))
    y, after = ssd_scan.reference(x, a, s, B, C, gather(state, slots), D=D)
    scatter_(state, slots, after)
    return y[:, 0]


@op
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
    """`ssd_step_` of what a Mamba-2 layer projects, and `y silu(z)` where z is given; with `norm`, `rms_norm` of that.

    The step is `clamp(softplus(dt + dt_bias), dt_limit) delta_t` and the log decay `-exp(A_log)` times that.

    With `pending`, a pool as the states are, the token is left there while there is room, and the state is written only
    with the token for which there is none: y is the same, and the state is what `settled` says.
    """
    dtype = state_dtype(x.dtype)
    step = softplus(dt.to(dtype) + dt_bias.to(dtype)).clamp(*dt_limit)
    step = step if delta_t is None else step * delta_t.to(dtype).unsqueeze(-1)
    gate = None if z is None else silu(z.to(dtype))
    entry = Entry(x.to(dtype), -torch.exp(A_log.to(dtype)) * step, step, B, C)
    y = step_or_wait_(ssd_step_.reference, entry, state, slots, pending, D)
    y = y if gate is None else y * gate
    if norm is None:
        return y.to(x.dtype)
    return Normed(rms_norm.reference(y.flatten(-2), norm, eps=eps, groups=norm_groups).to(x.dtype))


ssd_scan.add("triton", "everstate.ops.ssd.triton:ssd_scan", accepts_scan)
ssd_scan.add("torch", "everstate.ops.ssd.chunked:ssd_scan", anywhere)
ssd_step_.add("triton", "everstate.ops.ssd.triton_step:ssd_step_", accepts_step)
ssd_step_.add("torch", "everstate.ops.ssd.step:ssd_step_", anywhere)
mamba2_step_.add("triton", "everstate.ops.ssd.triton_step:mamba2_step_", accepts_mamba2_step)
mamba2_step_.add("torch", "everstate.ops.ssd.step:mamba2_step_", anywhere)
