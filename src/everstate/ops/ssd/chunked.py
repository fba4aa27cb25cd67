"""SSD as matrix products over chunks: quadratic inside a chunk, a recurrence of states between chunks.

With `cs` the cumulative sum of `a` inside a chunk (MATH: chunk form),

    y = [ (C_i . B_j) exp(cs_i - cs_j) s_j  for j <= i ] x  +  exp(cs_i) C_i h_in
    h_out = exp(cs_last) h_in + sum_j exp(cs_last - cs_j) s_j x_j B_j^T

A given diagonal replaces the triangle `j <= i` by "groups before that of i", so that no later entry touches y_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing
from everstate.ops.glu import gate_heads

# Tokens handled in one go on a CPU: the intermediate tensors of a longer stretch fall out of the cache.
CPU_BLOCK = 512


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
    """See `everstate.ops.ssd_scan`."""
    dtype, rank = state_dtype(x.dtype), 0 if diagonal is None else diagonal.shape[-1]
    inputs = [t.to(dtype) for t in (x, a, s, B, C, diagonal) if t is not None]
    if packing is not None:
        # Zeros change nothing: a = 0 keeps the state and s = 0 adds nothing to it.
        inputs = [packing.pad(t) for t in inputs]
    chunk = min(max(chunk_size // max(rank, 1), 1) * max(rank, 1), inputs[0].shape[1])
    block = max(CPU_BLOCK // chunk, 1) * chunk if x.device.type == "cpu" else inputs[0].shape[1]
    h, ys = state.to(dtype), []
    for parts in zip(*(t.split(block, 1) for t in inputs), strict=True):
        y, h = _block(parts[:5], h, rank, chunk)
        ys.append(_add_own_(y, parts[0], None if diagonal is None else parts[5], D))
    y = torch.cat(ys, 1) if len(ys) > 1 else ys[0]
    return gate_heads(y if packing is None else packing.unpad(y), z).to(x.dtype), h


def _block(
    inputs: Sequence[Tensor], state: Float[Tensor, "b h p n"], rank: int, chunk: int
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """x, a, s, B, C of one block of time, all of its chunks at once; heads as groups g times m heads each."""
    length, groups = inputs[0].shape[1], inputs[3].shape[2]
    x, a, s, B, C = (_chunks(t, chunk) for t in inputs)
    x = (x * s.unsqueeze(-1)).unflatten(3, (groups, -1))
    cs = _cumulative_decay(a, max(rank, 1)).unflatten(3, (groups, -1))
    last = cs[:, :, -1:]
    added = torch.einsum("bcjgmp,bcjgn->bcgmpn", x * torch.exp(last - cs).unsqueeze(-1), B)
    entering, state = _pass_states(added, torch.exp(last[:, :, 0]), state)
    y = torch.einsum("bcign,bcgmpn->bcigmp", C, entering).mul_(torch.exp(cs).unsqueeze(-1))
    weights = torch.einsum("bcign,bcjgn->bcgij", C, B).unsqueeze(3) * _decays(cs, rank)
    y.add_(torch.einsum("bcgmij,bcjgmp->bcigmp", weights, x))
    return y.flatten(3, 4).flatten(1, 2)[:, :length], state


def _chunks(t: Float[Tensor, "b l *s"], chunk: int) -> Float[Tensor, "b c q *s"]:
    """Cut time into chunks, the last one filled up with zeros."""
    missing = -t.shape[1] % chunk
    # To pad by nothing would still be a copy.
    return (pad(t, [0, 0] * (t.ndim - 2) + [0, missing]) if missing else t).unflatten(1, (-1, chunk))


def _cumulative_decay(a: Float[Tensor, "b c q h"], group: int) -> Float[Tensor, "b c q h"]:
    """Cumulative log decay of each entry since the start of its chunk; the entries of one group share theirs."""
    if group == 1:
        return a.cumsum(2)
    return a.unflatten(2, (-1, group)).sum(3).cumsum(2).repeat_interleave(group, 2)


def _decays(cs: Float[Tensor, "b c q g m"], rank: int) -> Float[Tensor, "b c g m q q"]:
    """`exp(cs_i - cs_j)` for the entries j that entry i receives, and zero elsewhere, where exp would overflow.

    These are the entries up to i itself, or with a given diagonal those of the groups before that of i.
    """
    at = torch.arange(cs.shape[2], device=cs.device)
    received = at[:, None] >= at if rank == 0 else at[:, None] // rank > at // rank
    barrier = torch.zeros_like(received, dtype=cs.dtype).masked_fill_(~received, -torch.inf)
    by_head = cs.permute(0, 1, 3, 4, 2).contiguous()  # so that the differences lie as the product needs them
    return (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).add_(barrier).exp_()


def _pass_states(
    added: Float[Tensor, "b c g m p n"], decay: Float[Tensor, "b c g m"], state: Float[Tensor, "b h p n"]
) -> tuple[Float[Tensor, "b c g m p n"], Float[Tensor, "b h p n"]]:
    """The state that enters each chunk, and the one that leaves the last."""
    h = state.unflatten(1, (added.shape[2], -1))
    entering = []
    for new, factor in zip(added.unbind(1), decay.unbind(1), strict=True):
        entering.append(h)
        h = torch.addcmul(new, factor[..., None, None], h)
    return torch.stack(entering, 1), h.flatten(1, 2)


def _add_own_(
    y: Float[Tensor, "b l h p"],
    x: Float[Tensor, "b l h p"],
    diagonal: Float[Tensor, "b l h r"] | None,
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None,
) -> Float[Tensor, "b l h p"]:
    """Add what an entry receives from its own group through the given diagonal, and from itself through D."""
    if diagonal is not None:
        mixing, entries = (t.unflatten(1, (-1, diagonal.shape[-1])) for t in (diagonal, x))
        y = y + torch.einsum("btihj,btjhp->btihp", mixing, entries).flatten(1, 2)
    return y if D is None else y.addcmul_(D.to(y.dtype).view(D.shape[0], -1), x)
