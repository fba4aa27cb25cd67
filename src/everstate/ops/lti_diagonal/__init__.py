"""A diagonal time-invariant state space model per channel, S4D's recurrence, and the kernel of its convolution."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from everstate.core.dtypes import complex_dtype, state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.lti_conv import Mode
from everstate.ops.lti_diagonal.discretize import Rule, discretize


@op
def lti_kernel_diagonal(
    A: Complex[Tensor, "g n"],
    B: Complex[Tensor, "g n"],
    C: Complex[Tensor, "g n"],
    dt: Float[Tensor, " g"],
    *,
    length: int,
    discretization: Rule = "zoh",
) -> Float[Tensor, "g l"]:
    """Compute `K[j] = 2 Re(sum_n C_n dB_n dA_n^j)` for j < length: a product with a Vandermonde matrix.

    Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space models"
    (arXiv 2206.11893), section 3.
    """
    dA, gain = discretize(A, dt, discretization)
    term, taps = C * gain * B, []
    for _ in range(length):
        taps.append(2 * term.sum(-1).real)
        term = term * dA
    return torch.stack(taps, -1)


@op
def lti_diagonal(
    u: Float[Tensor, "b l d"],
    A: Complex[Tensor, "g n"],
    B: Complex[Tensor, "g n"],
    C: Complex[Tensor, "g n"],
    dt: Float[Tensor, " g"],
    state: Complex[Tensor, "seqs d n"],
    *,
    delta_t: Float[Tensor, "b l"] | None = None,
    discretization: Rule = "zoh",
    mode: Mode = "convolution",
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "seqs d n"]]:
    """Run `x = dA x + dB u; y = 2 Re(C x)` along time: n conjugate pairs per channel, discretised by the rule given.

    Channel i uses system i // (d / g). With `delta_t` token t takes a step of `dt delta_t[t]`. The three modes are
    equal; with `delta_t` no kernel serves all tokens, and a convolution runs as a scan.

    Source: Gu et al. 2022 (arXiv 2206.11893).
    """
    if packing is not None:
        fixed = {"A": A, "B": B, "C": C, "dt": dt, "discretization": discretization}
        return each_sequence(lti_diagonal.reference, packing, {"u": u, "delta_t": delta_t}, state, **fixed)
    inner, shared = complex_dtype(u.dtype), u.shape[2] // A.shape[0]
    each = lambda m: m.to(inner).repeat_interleave(shared, -2)
    dt, x, ys = dt.to(state_dtype(u.dtype)), state.to(inner), []
    for t in range(u.shape[1]):
        step = dt if delta_t is None else dt * delta_t[:, t, None].to(dt.dtype)
        dA, gain = discretize(A.to(inner), step, discretization)
        x = each(dA) * x + each(gain * B) * u[:, t, :, None]
        ys.append(2 * (each(C) * x).sum(-1).real)
    return torch.stack(ys, 1).to(u.dtype), x


@op
def lti_diagonal_step_(
    u: Float[Tensor, "b d"],
    A: Complex[Tensor, "g n"],
    B: Complex[Tensor, "g n"],
    C: Complex[Tensor, "g n"],
    dt: Float[Tensor, " g"],
    state: Complex[Tensor, "slots d n"],
    slots: Slots = None,
    *,
    delta_t: Float[Tensor, " b"] | None = None,
    discretization: Rule = "zoh",
) -> Float[Tensor, "b d"]:
    """One token of `lti_diagonal` for the rows `slots` of a pool of states, written in place."""
    gap = None if delta_t is None else delta_t.unsqueeze(1)
    y, after = lti_diagonal.reference(
        u.unsqueeze(1), A, B, C, dt, gather(state, slots), delta_t=gap, discretization=discretization
    )
    scatter_(state, slots, after)
    return y[:, 0]


lti_kernel_diagonal.add("torch", "everstate.ops.lti_diagonal.convolution:lti_kernel_diagonal", anywhere)
lti_diagonal.add("torch", "everstate.ops.lti_diagonal.forms:lti_diagonal", anywhere)
