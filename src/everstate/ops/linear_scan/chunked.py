"""The scan in as few vectorised operations as its width allows, with the reversed scan as its gradient.

Where one time step is wide, one fused multiply-add per step keeps the machine busy. Where it is narrow, time is folded
into c x k: c steps that run in all k chunks at once, then k steps that pass the state from chunk to chunk. Nothing is
ever divided by a product of decays, so no decay is too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from everstate.core.packing import Packing
from everstate.ops.linear_scan import scan_dtypes

# Bytes of one time step from which a CPU is faster straight along time (measured: 4 KB with one thread).
WIDE = 4096


def linear_scan(
    a: Inexact[Tensor, "b l *rest"],
    b: Inexact[Tensor, "b l *rest"],
    state: Inexact[Tensor, "seqs ..."],
    *,
    packing: Packing | None = None,
) -> tuple[Inexact[Tensor, "b l *rest"], Inexact[Tensor, "seqs ..."]]:
    """See `everstate.ops.linear_scan`."""
    outer, inner = scan_dtypes(a, b)
    b, state = b.to(inner), state.to(inner)
    if inner.is_complex and not a.is_complex():
        # A real decay scales the two parts of a complex state alike.
        a = a.to(torch.view_as_real(b).dtype).unsqueeze(-1).expand(*a.shape, 2)
        h, after = _Scan.apply(a, torch.view_as_real(b), torch.view_as_real(state), packing)
        return torch.view_as_complex(h).to(outer), torch.view_as_complex(after)
    h, after = _Scan.apply(a.to(inner), b, state, packing)
    return h.to(outer), after


class _Scan(torch.autograd.Function):
    """The scan of every sequence of a batch or a packed row, all inputs in one dtype."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, state: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        h, after = b.new_empty(b.shape), state.new_empty(state.shape)
        for rows, cut in _sequences(packing):
            _run(a[:, cut], b[:, cut], state[rows], h[:, cut])
            after[rows] = h[:, cut][:, -1]
        ctx.save_for_backward(a, state, h)
        ctx.packing = packing
        return h, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dafter: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Run `db[t] = conj(a[t+1]) db[t+1] + dh[t]` from the last token to the first; `da[t] = db[t] conj(h[t-1])`."""
        a, state, h = ctx.saved_tensors
        db, dstate = torch.empty_like(h), torch.empty_like(state)
        da = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for rows, cut in _sequences(ctx.packing):
            decay, grad, before = a[:, cut].conj(), db[:, cut], h[:, cut].conj()
            torch.add(dh[:, cut][:, -1], dafter[rows], out=grad[:, -1])
            _run(decay[:, 1:], dh[:, cut][:, :-1], grad[:, -1], grad[:, :-1], backwards=True)
            torch.mul(decay[:, 0], grad[:, 0], out=dstate[rows])
            if da is not None:
                torch.mul(grad[:, 0], state[rows].conj(), out=da[:, cut][:, 0])
                torch.mul(grad[:, 1:], before[:, :-1], out=da[:, cut][:, 1:])
        return da, db, dstate, None


def _sequences(packing: Packing | None) -> list[tuple[slice, slice]]:
    """Which rows of the state belong to which stretch of time."""
    if packing is None:
        return [(slice(None), slice(None))]
    return [(slice(i, i + 1), cut) for i, cut in enumerate(packing.slices())]


def _run(a: Tensor, b: Tensor, state: Tensor, out: Tensor, *, backwards: bool = False) -> None:
    """Write every h of one stretch of time to `out`, from its first step to its last or the other way."""
    if b[:, :1].numel() * b.element_size() < WIDE:
        a, b = (a.flip(1), b.flip(1)) if backwards else (a, b)
        h = _folded(a, b, state)
        out.copy_(h.flip(1) if backwards else h)
        return
    steps: Iterable[tuple[Tensor, Tensor, Tensor]] = zip(a.unbind(1), b.unbind(1), out.unbind(1), strict=True)
    for a_t, b_t, h_t in reversed(list(steps)) if backwards else steps:
        state = torch.addcmul(b_t, a_t, state, out=h_t)


def _folded(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """The scan with time folded into c steps by k chunks, c and k about the root of the length."""
    length = b.shape[1]
    steps = max(math.isqrt(length), 1)
    a, b = _fold(a, steps), _fold(b, steps)
    h, decay = torch.empty_like(b), torch.empty_like(a)
    h[0], decay[0] = b[0], a[0]
    for i in range(1, steps):
        torch.addcmul(b[i], a[i], h[i - 1], out=h[i])
        torch.mul(a[i], decay[i - 1], out=decay[i])
    entering = torch.empty_like(h[0])
    for k in range(entering.shape[1]):
        entering[:, k] = state
        state = torch.addcmul(h[-1, :, k], decay[-1, :, k], state)
    return h.addcmul_(decay, entering).movedim(0, 2).flatten(1, 2)[:, :length]


def _fold(x: Tensor, steps: int) -> Tensor:
    """From `(b, l, *rest)` to `(c, b, k, *rest)`, zeros at the end, so that each of the c steps is contiguous."""
    filled = pad(x, [0, 0] * (x.ndim - 2) + [0, -x.shape[1] % steps])
    folded: Tensor = filled.unflatten(1, (-1, steps))
    return folded.movedim(2, 0).contiguous()
