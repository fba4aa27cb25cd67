"""The normal-plus-low-rank system as recurrence, convolution and scan; everything in O(n) per token but the tables."""

from __future__ import annotations

import math
from functools import reduce

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from everstate.core.dtypes import complex_dtype, state_dtype
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.lti_conv import Mode
from everstate.ops.lti_conv.blocks import BLOCK, Tables, halves, real, run_blocks
from everstate.ops.lti_dplr import lti_kernel_dplr
from everstate.ops.lti_dplr.transition import Transition, dense, factors, krylov, recur, squares, transition


def lti_dplr(
    u: Float[Tensor, "b l d"],
    A: Complex[Tensor, "d n"],
    P: Complex[Tensor, "d n"],
    B: Complex[Tensor, "d n"],
    C: Complex[Tensor, "d n"],
    dt: Float[Tensor, " d"],
    state: Complex[Tensor, "seqs d n"],
    *,
    delta_t: Float[Tensor, "b l"] | None = None,
    mode: Mode = "convolution",
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "seqs d n"]]:
    """See `everstate.ops.lti_dplr`."""
    if packing is not None:
        fixed = {"A": A, "P": P, "B": B, "C": C, "dt": dt, "mode": mode}
        return each_sequence(lti_dplr, packing, {"u": u, "delta_t": delta_t}, state, **fixed)
    dtype, inner = state_dtype(u.dtype), complex_dtype(u.dtype)
    A, P, B, C, x = (m.to(inner) for m in (A, P, B, C, state))
    v, dt = u.to(dtype), dt.to(dtype)
    if delta_t is not None:
        y, x = _irregular(v, A, P, B, C, dt, delta_t.to(dtype), x)
    elif mode == "recurrence":
        y, x = recur(transition(A, P, B, dt), C, v, x)
    elif mode == "scan":
        y, x = _scan(v, transition(A, P, B, dt), C, x)
    else:
        kernel = lti_kernel_dplr(A, P, B, C, dt, length=min(BLOCK, u.shape[1]))
        y, x = _convolution(v, transition(A, P, B, dt), C, kernel, x)
    return y.to(u.dtype), x


def _irregular(
    u: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, delta_t: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """A step of its own for each token; discretised where it is used, because all of them would be a state each."""
    ys = []
    for now, gap in zip(u.split(1, 1), delta_t.unbind(1), strict=True):
        y, x = recur(transition(A, P, B, dt * gap.unsqueeze(-1)), C, now, x)
        ys.append(y)
    return torch.cat(ys, 1), x


def _convolution(u: Tensor, step: Transition, C: Tensor, kernel: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    block = kernel.shape[1]
    powers = squares(dense(step), block)
    transposed = [power.mT for power in powers]
    seen = real(2 * C.conj()).unsqueeze(1) @ transposed[0]
    tables = Tables(
        kernel=kernel,
        write=krylov(real(step.dB), powers, block),
        observe=krylov(seen.squeeze(1), transposed, block),
    )

    def advance(written: Tensor, state: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        return _pass_states(written, state, powers, steps)

    y, after = run_blocks(u, real(x), tables, advance)
    return y, halves(after)


def _pass_states(
    written: Float[Tensor, "b c d m s"], state: Float[Tensor, "b d m s"], powers: list[Tensor], steps: int
) -> tuple[Float[Tensor, "b c d m s"], Float[Tensor, "b d m s"]]:
    """The state that enters each block of so many steps, and the one that leaves the last."""
    decay, entering = reduce(torch.matmul, factors(powers, steps)), []
    for added in written.unbind(1):
        entering.append(state)
        state = state @ decay + added
    return torch.stack(entering, 1), state


def _scan(u: Tensor, step: Transition, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """First the state that enters each chunk, from what the chunks write; then the recurrence in all chunks at once."""
    length = u.shape[1]
    chunk = math.isqrt(length)
    whole = length - length % chunk
    chunks = u[:, :whole].unflatten(1, (-1, chunk))
    powers = squares(dense(step), chunk)
    write = krylov(real(step.dB), powers, chunk)
    written = torch.einsum("bcqd,dqs->bcds", chunks.flip(2), write).unsqueeze(3)
    entering, _ = _pass_states(written, real(x).unsqueeze(2), powers, chunk)
    y, after = recur(step, C, chunks, halves(entering.squeeze(3)))
    y, x = y.flatten(1, 2), after[:, -1]
    if whole == length:
        return y, x
    rest, x = recur(step, C, u[:, whole:], x)
    return torch.cat([y, rest], 1), x


def lti_dplr_step_(
    u: Float[Tensor, "b d"],
    A: Complex[Tensor, "d n"],
    P: Complex[Tensor, "d n"],
    B: Complex[Tensor, "d n"],
    C: Complex[Tensor, "d n"],
    dt: Float[Tensor, " d"],
    state: Complex[Tensor, "slots d n"],
    slots: Slots = None,
    *,
    delta_t: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, "b d"]:
    """See `everstate.ops.lti_dplr_step_`."""
    gap = None if delta_t is None else delta_t.unsqueeze(1)
    y, after = lti_dplr(u.unsqueeze(1), A, P, B, C, dt, gather(state, slots), delta_t=gap, mode="recurrence")
    scatter_(state, slots, after)
    return y[:, 0]
