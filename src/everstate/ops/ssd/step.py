"""One SSD token without a copy of the pool: decay, add and read the state where it lies."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.core.state import Slots, gather, scatter_


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
    h = gather(state, slots)
    h.mul_(torch.exp(a.to(dtype))[..., None, None]).add_(
        (u * s.to(dtype).unsqueeze(-1)).unsqueeze(-1) * keys[:, :, None]
    )
    if slots is not None:
        scatter_(state, slots, h)
    # A row times a matrix: the other way round takes several times as long on a CPU.
    y = torch.matmul(queries.unsqueeze(2), h.transpose(2, 3)).squeeze(2)
    return (y if D is None else y + D.to(dtype).view(heads, -1) * u).to(x.dtype)
