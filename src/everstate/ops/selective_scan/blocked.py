"""The selective scan in blocks of time: wide operations over a block, one fused multiply-add per token in between.

Everything is laid out `(l, b, n, d)`, so that the channels are the innermost dimension of every product. A block is as
long as fits in the cache. The backward pass keeps only the state that enters each block and runs the block again.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu, softplus

from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing

# Numbers in one (l, b, n, d) tensor of a block: 2 MB in float32, about what the cache of a core holds.
BLOCK_NUMBERS = 2**19


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    state: Float[Tensor, "seqs d n"],
    *,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    dt_bias: Float[Tensor, " d"] | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d n"]]:
    """See `everstate.ops.selective_scan`."""
    dtype = state_dtype(x.dtype)
    steps = dt.to(dtype) if dt_bias is None else softplus(dt.to(dtype) + dt_bias.to(dtype))
    timed = [x.to(dtype), steps, B.to(dtype), C.to(dtype)]
    if packing is not None:
        # Zeros change nothing: dt = 0 keeps the state and adds nothing to it.
        timed = [packing.pad(t) for t in timed]
    u, steps, keys, queries = (t.transpose(0, 1) for t in timed)
    y, h = _Scan.apply(u, steps, A.to(dtype).T, keys, queries, state.to(dtype).transpose(1, 2))
    y = y.transpose(0, 1)
    if packing is not None:
        y = packing.unpad(y)
    if D is not None:
        y = y.addcmul_(D.to(dtype), x.to(dtype))
    if z is not None:
        y = silu(z.to(dtype)).mul_(y)
    return y.to(x.dtype), h.transpose(1, 2)


class _Scan(torch.autograd.Function):
    """The scan without D, with the transposed A, on tensors that have time first."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "l b d"],
        dt: Float[Tensor, "l b d"],
        A: Float[Tensor, "n d"],
        B: Float[Tensor, "l b n"],
        C: Float[Tensor, "l b n"],
        state: Float[Tensor, "b n d"],
    ) -> tuple[Float[Tensor, "l b d"], Float[Tensor, "b n d"]]:
        A, h = A.contiguous(), state.contiguous()
        y, entering = torch.empty_like(x), []
        for now in _blocks(x, A):
            entering.append(h)
            _, states = _states(x[now], dt[now], A, B[now], h)
            y[now] = torch.matmul(C[now].unsqueeze(2), states).squeeze(2)
            h = states[-1].clone()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, dt, A, B, C, torch.stack(entering))
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Float[Tensor, "l b d"], dh: Float[Tensor, "b n d"]) -> tuple[Tensor, ...]:
        x, dt, A, B, C, entering = ctx.saved_tensors
        dx, ddt, dA, dB, dC = (torch.zeros_like(t) for t in (x, dt, A, B, C))
        for now, h in reversed(list(zip(_blocks(x, A), entering, strict=True))):
            decay, states = _states(x[now], dt[now], A, B[now], h)
            dC[now] = torch.matmul(states, dy[now].unsqueeze(3)).squeeze(3)
            dstates = _reversed_states(decay, C[now].unsqueeze(3) * dy[now].unsqueeze(2), dh)
            dh = decay[0] * dstates[0]
            dB[now] = torch.matmul(dstates, (dt[now] * x[now]).unsqueeze(3)).squeeze(3)
            du = torch.matmul(B[now].unsqueeze(2), dstates).squeeze(2)
            dx[now] = dt[now] * du
            dlog = decay.mul_(dstates)
            dlog[0] *= h
            dlog[1:] *= states[:-1]
            ddt[now] = x[now] * du + (dlog * A).sum(2)
            dA += dlog.mul_(dt[now].unsqueeze(2)).sum((0, 1))
        return dx, ddt, dA, dB, dC, dh


def _blocks(x: Float[Tensor, "l b d"], A: Float[Tensor, "n d"]) -> list[slice]:
    """Stretches of time whose `(l, b, n, d)` tensors have about BLOCK_NUMBERS numbers each."""
    length = max(BLOCK_NUMBERS // max(x.shape[1] * A.numel(), 1), 1)
    return [slice(start, start + length) for start in range(0, x.shape[0], length)]


def _states(
    x: Float[Tensor, "l b d"],
    dt: Float[Tensor, "l b d"],
    A: Float[Tensor, "n d"],
    B: Float[Tensor, "l b n"],
    h: Float[Tensor, "b n d"],
) -> tuple[Float[Tensor, "l b n d"], Float[Tensor, "l b n d"]]:
    """The decay `exp(dt A)` before each token and the state after it."""
    decay = (dt.unsqueeze(2) * A).exp_()
    states = (dt * x).unsqueeze(2) * B.unsqueeze(3)
    for factor, now in zip(decay.unbind(), states.unbind(), strict=True):
        h = torch.addcmul(now, factor, h, out=now)
    return decay, states


def _reversed_states(
    decay: Float[Tensor, "l b n d"], from_y: Float[Tensor, "l b n d"], dh: Float[Tensor, "b n d"]
) -> Float[Tensor, "l b n d"]:
    """The gradient of the state after each token: what its own output sends, and what the next state sends back."""
    now = from_y[-1].add_(dh)
    for factor, before in zip(reversed(decay[1:].unbind()), reversed(from_y[:-1].unbind()), strict=True):
        now = torch.addcmul(before, factor, now, out=before)
    return from_y
