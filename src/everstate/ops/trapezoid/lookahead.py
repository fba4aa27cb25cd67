"""The trapezoid as SSD with a look-ahead.

Token t enters the state twice: with weight `lam[t] dt[t]` now, with `(1 - lam[t+1]) dt[t+1]` together with the next
token. For every later output the two are one input, of scale

    s[t] = lam[t] dt[t] + (1 - lam[t+1]) dt[t+1]

and only a token's own output sees the first alone: that is the given diagonal of `ssd_scan`. The last token of a
sequence has no look-ahead, so the final state is exactly that of the recurrence; the next segment adds what is owed to
the state before its first decay.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing
from everstate.ops.rotary import rotate
from everstate.ops.rotary.halves import deinterleave, interleave
from everstate.ops.ssd import ssd_scan
from everstate.ops.trapezoid import TrapezoidInputs, TrapezoidState, by_head, by_rank, wrap

# Tokens handled in one go on a CPU: every head and rank has its own keys and queries, many times the input in bytes.
CPU_BLOCK = 512


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
    """See `everstate.ops.trapezoid_scan`."""
    dtype, length = state_dtype(x.dtype), x.shape[1]
    state = TrapezoidState(*(t.to(dtype) for t in state))
    if interleaved:
        # Sums over n do not mind its order, and halves turn faster; B and C are small before they meet the heads.
        B, C = deinterleave(B), deinterleave(C)
        B_bias, C_bias = (None if bias is None else deinterleave(bias) for bias in (B_bias, C_bias))
        state = state._replace(ssm=deinterleave(state.ssm), k=deinterleave(state.k))
    segment = partial(
        _segment, packing=packing, B_bias=B_bias, C_bias=C_bias, mimo_x=mimo_x, D=D, chunk_size=chunk_size
    )
    block = CPU_BLOCK if packing is None and x.device.type == "cpu" else length
    ys = []
    for start in range(0, length, block):
        timed = (t[:, start : start + block].to(dtype) for t in (x, dt, A, lam, omega, B, C))
        gate = None if z is None else z[:, start : start + block]
        y, state = segment(TrapezoidInputs(*timed), state, z=gate)
        ys.append(y.to(x.dtype))
    if interleaved:
        state = state._replace(ssm=interleave(state.ssm), k=interleave(state.k))
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0], state


def _segment(
    inputs: TrapezoidInputs,
    state: TrapezoidState,
    *,
    packing: Packing | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    D: Tensor | None,
    z: Float[Tensor, "b l r h p"] | None,
    chunk_size: int,
) -> tuple[Float[Tensor, "b l r h p"], TrapezoidState]:
    """One call of `ssd_scan`, with the ranks of a token as entries that follow each other.

    The inputs are in the dtype of the state.
    """
    x, dt, A, lam, omega, B, C = inputs
    rank, heads = B.shape[2], x.shape[2]
    angle = _angles(dt, omega, state.angle, packing)
    cos, sin = torch.cos(angle).unsqueeze(2), torch.sin(angle).unsqueeze(2)
    k, q = (rotate(by_head(m, heads, bias), cos, sin) for m, bias in ((B, B_bias), (C, C_bias)))
    gamma, owed = lam * dt, (1 - lam) * dt
    s = gamma + _look_ahead(owed, packing)
    entered = torch.einsum("bh,brhp,brhn->bhpn", _first(owed, packing), by_rank(state.x, rank, mimo_x), state.k)
    diagonal = gamma[:, :, None, :, None] * torch.einsum("blihn,bljhn->blihj", q, k)
    # The first rank brings the decay of its token, the others enter at the same time.
    a = torch.stack([A * dt, *[torch.zeros_like(A)] * (rank - 1)], 2)
    y, ssm = ssd_scan(
        by_rank(x, rank, mimo_x).flatten(1, 2), a.flatten(1, 2), s.repeat_interleave(rank, 1), k.flatten(1, 2),
        q.flatten(1, 2), state.ssm + entered, diagonal=diagonal.flatten(1, 2), D=D,
        z=None if z is None else z.flatten(1, 2), chunk_size=chunk_size,
        packing=None if packing is None else Packing([rank * end for end in packing.cu_seqlens]),
    )  # fmt: skip
    after = TrapezoidState(ssm, _last(k, packing), _last(x, packing), _last(angle, packing))
    return y.unflatten(1, (-1, rank)), after


def _angles(
    dt: Float[Tensor, "b l h"], omega: Float[Tensor, "b l s"], start: Float[Tensor, "seqs h s"], packing: Packing | None
) -> Float[Tensor, "b l h s"]:
    """How far each head has turned at each token. Summed in float64: a float32 sum of many whole turns loses digits."""
    turns = dt.unsqueeze(-1) * omega.unsqueeze(2)
    rows = turns if packing is None else packing.pad(turns)
    angle = wrap(rows.cumsum(1, dtype=torch.float64) + start.unsqueeze(1)).to(dt.dtype)
    return angle if packing is None else packing.unpad(angle)


def _look_ahead(owed: Float[Tensor, "b l h"], packing: Packing | None) -> Float[Tensor, "b l h"]:
    """What the next token of the same sequence adds of each token; nothing after the last."""
    ahead = pad(owed[:, 1:], [0, 0, 0, 1])
    return ahead if packing is None else ahead.index_fill(1, packing.ends(owed.device), 0.0)


def _first(t: Shaped[Tensor, "b l ..."], packing: Packing | None) -> Shaped[Tensor, "seqs ..."]:
    """At the first token of each sequence."""
    return t[:, 0] if packing is None else t[0, packing.starts(t.device)]


def _last(t: Shaped[Tensor, "b l ..."], packing: Packing | None) -> Shaped[Tensor, "seqs ..."]:
    """At the last token of each sequence, in memory of its own: a state must not keep the whole segment alive."""
    return t[:, -1].clone() if packing is None else t[0, packing.ends(t.device)]
