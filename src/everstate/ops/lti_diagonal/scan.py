"""The diagonal system as a parallel scan, in blocks of time so that one block of states is held, not the sequence's."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from everstate.ops.linear_scan import linear_scan
from everstate.ops.lti_conv.blocks import BLOCK
from everstate.ops.lti_diagonal.discretize import Rule, discretize


def scan(
    u: Float[Tensor, "b l d"],
    A: Complex[Tensor, "g n"],
    B: Complex[Tensor, "g n"],
    C: Complex[Tensor, "g n"],
    dt: Float[Tensor, " g"],
    state: Complex[Tensor, "b d n"],
    discretization: Rule,
    delta_t: Float[Tensor, "b l"] | None,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "b d n"]]:
    """`lti_diagonal` in mode "scan"; all arguments in the dtypes of the computation."""
    shared, ys = u.shape[2] // A.shape[0], []
    read = torch.view_as_real(2 * C.repeat_interleave(shared, 0).conj().resolve_conj())
    for start in range(0, u.shape[1], BLOCK):
        now = slice(start, start + BLOCK)
        step = dt.view(1, 1, -1) if delta_t is None else dt * delta_t[:, now, None]
        dA, gain = discretize(A, step, discretization)
        written = (gain * B).repeat_interleave(shared, 2) * u[:, now, :, None]
        xs, state = linear_scan(dA.repeat_interleave(shared, 2).expand(written.shape), written, state)
        ys.append(torch.einsum("bldnx,dnx->bld", torch.view_as_real(xs), read))
    return torch.cat(ys, 1), state
