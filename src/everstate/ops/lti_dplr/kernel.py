"""The kernel through its generating function at the roots of unity, and an inverse Fourier transform.

Cut off at length L, `sum_j K[j] z^j = C (I - dA^L) (I - dA z)^-1 dB`, and with the bilinear rule written out

    (I - dA z)^-1 dB = [ (1 - z) I - (1 + z) dt/2 (A - P P^H) ]^-1 dt B,

a form in which z = -1 is a point like any other. With `R = 1 / ((1 - z) - c A)` and `c = (1 + z) dt/2` the Woodbury
identity leaves four sums over n: `C R B - c (C R P) (P^H R B) / (1 + c P^H R P)`.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from everstate.ops.lti_conv.blocks import halves, real
from everstate.ops.lti_dplr.transition import dense, factors, squares, transition

# Frequencies handled in one go; the rest of a long kernel's are computed again in the backward pass, not stored.
FREQUENCIES = 1024


def lti_kernel_dplr(
    A: Complex[Tensor, "d n"],
    P: Complex[Tensor, "d n"],
    B: Complex[Tensor, "d n"],
    C: Complex[Tensor, "d n"],
    dt: Float[Tensor, " d"],
    *,
    length: int,
) -> Float[Tensor, "d l"]:
    """See `everstate.ops.lti_kernel_dplr`."""
    cut_off = _cut_off(C, squares(dense(transition(A, P, B, dt)).mT, length), length)
    numerators = torch.stack([cut_off * B, cut_off * P, P.conj() * B, P.conj() * P], 1)
    angle = torch.arange(length // 2 + 1, dtype=dt.dtype, device=dt.device) * (-2 * math.pi / length)
    parts = torch.polar(torch.ones_like(angle), angle).split(FREQUENCIES)
    if len(parts) == 1:
        spectrum = _spectrum(parts[0], A, numerators, dt)
    else:
        each = [checkpoint(_spectrum, z, A, numerators, dt, use_reentrant=False) for z in parts]
        spectrum = torch.cat(each, -1)
    return torch.fft.irfft(spectrum, length)


def _cut_off(C: Complex[Tensor, "d n"], powers: list[Tensor], length: int) -> Complex[Tensor, "d n"]:
    """`C (I - dA^length)`, from the squares of dA in real coordinates."""
    row = reduce(torch.matmul, factors(powers, length), real(C.conj()).unsqueeze(1))
    return C - halves(row).squeeze(1).conj()


def _spectrum(
    z: Complex[Tensor, " f"], A: Complex[Tensor, "d n"], numerators: Complex[Tensor, "d 4 n"], dt: Float[Tensor, " d"]
) -> Complex[Tensor, "d f"]:
    """The generating function at the points z.

    A pair `v / (g - c A)` and its conjugate add up to `2 (g Re(v) - c Re(v A*)) / ((g - c A) (g - c A*))`, so that
    the sums over n are products of real matrices with one complex one.
    """
    g, c = (1 - z), (1 + z) * dt.unsqueeze(-1) / 2
    scaled = A.unsqueeze(-1) * c.unsqueeze(1)
    conjugate = A.conj().unsqueeze(-1) * c.unsqueeze(1)
    poles = 1 / ((g - scaled) * (g - conjugate))
    weights = 2 * torch.cat([numerators.real, (numerators * A.conj().unsqueeze(1)).real], 1)
    sums = torch.einsum("dkn,dnfx->dkfx", weights, torch.view_as_real(poles)).contiguous()
    one, other = torch.view_as_complex(sums).chunk(2, 1)
    CB, CP, PB, PP = (g * one - c.unsqueeze(1) * other).unbind(1)
    return dt.unsqueeze(-1) * (CB - c * CP * PB / (1 + c * PP))
