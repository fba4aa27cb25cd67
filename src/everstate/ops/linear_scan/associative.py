"""The scan as a tree: neighbours are combined, the half as long sequence is scanned, and the gaps are filled.

Two steps in a row are one step, `(a2, b2) after (a1, b1) = (a2 a1, a2 b1 + b2)`, and this composition is associative.
Depth grows with the logarithm of the length and work with the length. Plain differentiable operations throughout.

Source: Blelloch 1990, "Prefix sums and their applications".
"""

from __future__ import annotations

import torch
from jaxtyping import Inexact
from torch import Tensor

from everstate.core.packing import Packing, each_sequence
from everstate.ops.linear_scan import scan_dtypes


def linear_scan(
    a: Inexact[Tensor, "b l *rest"],
    b: Inexact[Tensor, "b l *rest"],
    state: Inexact[Tensor, "seqs ..."],
    *,
    packing: Packing | None = None,
) -> tuple[Inexact[Tensor, "b l *rest"], Inexact[Tensor, "seqs ..."]]:
    """See `everstate.ops.linear_scan`."""
    if packing is not None:
        return each_sequence(linear_scan, packing, {"a": a, "b": b}, state)
    outer, inner = scan_dtypes(a, b)
    # A real decay stays real: its products cost half as much as complex ones.
    decay = a.to(inner) if a.is_complex() else a.to(inner.to_real())
    h = _scan(decay, b.to(inner), state.to(inner))
    return h.to(outer), h[:, -1]


def _scan(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    length = b.shape[1]
    if length == 1:
        return torch.addcmul(b, a, state.unsqueeze(1))
    pairs = length // 2
    first, second = slice(0, 2 * pairs, 2), slice(1, None, 2)
    at_second = _scan(a[:, second] * a[:, first], torch.addcmul(b[:, second], a[:, second], b[:, first]), state)
    before_first = torch.cat([state.unsqueeze(1), at_second], 1)[:, : length - pairs]
    at_first = torch.addcmul(b[:, ::2], a[:, ::2], before_first)
    both = torch.stack([at_first[:, :pairs], at_second], 2).flatten(1, 2)
    return torch.cat([both, at_first[:, pairs:]], 1)
