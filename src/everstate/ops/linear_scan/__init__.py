"""The first-order linear recurrence, elementwise: what every diagonal state space model runs along time."""

from __future__ import annotations

import torch
from jaxtyping import Inexact
from torch import Tensor

from everstate.core.dtypes import complex_dtype, state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.linear_scan.limits import accepts_scan


@op
def linear_scan(
    a: Inexact[Tensor, "b l *rest"],
    b: Inexact[Tensor, "b l *rest"],
    state: Inexact[Tensor, "seqs ..."],
    *,
    packing: Packing | None = None,
) -> tuple[Inexact[Tensor, "b l *rest"], Inexact[Tensor, "seqs ..."]]:
    """Run `h[t] = a[t] h[t-1] + b[t]` along time and return every h and the last.

    `a` and `b` are real or complex, each on its own, and may be expanded views; h has the wider dtype of the two. The
    state is held in float32 or complex64 (float64 or complex128 for double inputs).

    Source: Smith et al. 2023, "Simplified state space layers" (arXiv 2208.04933), section 3.3.
    """
    if packing is not None:
        return each_sequence(linear_scan.reference, packing, {"a": a, "b": b}, state)
    outer, inner = scan_dtypes(a, b)
    h, hs = state.to(inner), []
    for t in range(b.shape[1]):
        h = a[:, t].to(inner) * h + b[:, t].to(inner)
        hs.append(h)
    return torch.stack(hs, 1).to(outer), h


@op
def linear_step_(
    a: Inexact[Tensor, "b ..."],
    b: Inexact[Tensor, "b ..."],
    state: Inexact[Tensor, "slots ..."],
    slots: Slots = None,
) -> Inexact[Tensor, "b ..."]:
    """One token of `linear_scan` for the rows `slots` of a pool of states, written in place; h is a copy of its own."""
    outer, inner = scan_dtypes(a, b)
    h = torch.addcmul(b.to(inner), a.to(inner), gather(state, slots).to(inner))
    scatter_(state, slots, h)
    return h.to(outer)


def scan_dtypes(a: Tensor, b: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the outputs, and that of the state and of the computation."""
    outer = torch.promote_types(a.dtype, b.dtype)
    return outer, complex_dtype(outer) if outer.is_complex else state_dtype(outer)


linear_scan.add("triton", "everstate.ops.linear_scan.triton:linear_scan", accepts_scan)
linear_scan.add("torch", "everstate.ops.linear_scan.chunked:linear_scan", anywhere)
linear_scan.add("associative", "everstate.ops.linear_scan.associative:linear_scan", anywhere)
