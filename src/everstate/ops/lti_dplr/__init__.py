"""A normal-plus-low-rank time-invariant state space model per channel, S4's recurrence, and its convolution kernel."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from everstate.core.dtypes import complex_dtype, state_dtype
from everstate.core.op import anywhere, op
from everstate.core.packing import Packing, each_sequence
from everstate.core.state import Slots, gather, scatter_
from everstate.ops.lti_conv import Mode


@op
def lti_kernel_dplr(
    A: Complex[Tensor, "d n"],
    P: Complex[Tensor, "d n"],
    B: Complex[Tensor, "d n"],
    C: Complex[Tensor, "d n"],
    dt: Float[Tensor, " d"],
    *,
    length: int,
) -> Float[Tensor, "d l"]:
    """Compute `K[j] = C dA^j dB` for j < length, dA and dB by the bilinear rule from the matrix of `lti_dplr`.

    Source: Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces" (arXiv 2111.00396), 3.
    """
    dA, dB = _bilinear(_dense(A, P), _paired(B), dt)
    C, x, taps = _paired(C), dB, []
    for _ in range(length):
        taps.append((C * x).sum(-1).real)
        x = torch.einsum("dnm,dm->dn", dA, x)
    return torch.stack(taps, -1)


@op
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
    """Run `x = dA x + dB u; y = C x` along time, with the matrix `diag(A) - P P^H` and the bilinear rule.

    All vectors stand for conjugate pairs, of which one half is given: the matrix has 2 n rows, and y is real. With
    `delta_t` token t takes a step of `dt delta_t[t]`. The three modes are equal; with `delta_t` every token has a
    matrix of its own, and all modes run as the recurrence, O(n) per token.

    Source: Gu et al. 2022 (arXiv 2111.00396), section 3 and appendix C.
    """
    if packing is not None:
        fixed = {"A": A, "P": P, "B": B, "C": C, "dt": dt}
        return each_sequence(lti_dplr.reference, packing, {"u": u, "delta_t": delta_t}, state, **fixed)
    inner, pairs = complex_dtype(u.dtype), A.shape[1]
    dense, B, C = _dense(A.to(inner), P.to(inner)), _paired(B.to(inner)), _paired(C.to(inner))
    dt, x, ys = dt.to(state_dtype(u.dtype)), _paired(state.to(inner)), []
    for t in range(u.shape[1]):
        dA, dB = _bilinear(dense, B, dt if delta_t is None else dt * delta_t[:, t, None].to(dt.dtype))
        x = torch.einsum("...dnm,...dm->...dn", dA, x) + dB * u[:, t, :, None]
        ys.append((C * x).sum(-1).real)
    return torch.stack(ys, 1).to(u.dtype), x[..., :pairs]


@op
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
    """One token of `lti_dplr` for the rows `slots` of a pool of states, written in place."""
    gap = None if delta_t is None else delta_t.unsqueeze(1)
    y, after = lti_dplr.reference(u.unsqueeze(1), A, P, B, C, dt, gather(state, slots), delta_t=gap)
    scatter_(state, slots, after)
    return y[:, 0]


def _paired(v: Complex[Tensor, "*b n"]) -> Complex[Tensor, "*b n2"]:
    """Both halves of a vector of conjugate pairs."""
    return torch.cat([v, v.conj()], -1)


def _dense(A: Complex[Tensor, "d n"], P: Complex[Tensor, "d n"]) -> Complex[Tensor, "d n2 n2"]:
    """`diag(A) - P P^H`."""
    P = _paired(P)
    return torch.diag_embed(_paired(A)) - P.unsqueeze(-1) * P.conj().unsqueeze(-2)


def _bilinear(
    A: Complex[Tensor, "d n n"], B: Complex[Tensor, "d n"], dt: Float[Tensor, "*b d"]
) -> tuple[Complex[Tensor, "*b d n n"], Complex[Tensor, "*b d n"]]:
    """`(I - dt/2 A)^-1 (I + dt/2 A)` and `(I - dt/2 A)^-1 dt B`."""
    eye, half = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device), dt[..., None, None] / 2 * A
    right = torch.cat([eye + half, (dt.unsqueeze(-1) * B).unsqueeze(-1)], -1)
    solved = torch.linalg.solve(eye - half, right)
    return solved[..., :-1], solved[..., -1]


lti_kernel_dplr.add("torch", "everstate.ops.lti_dplr.kernel:lti_kernel_dplr", anywhere)
lti_dplr.add("torch", "everstate.ops.lti_dplr.forms:lti_dplr", anywhere)
lti_dplr_step_.add("torch", "everstate.ops.lti_dplr.forms:lti_dplr_step_", anywhere)
