"""HiPPO: the matrices that let a state hold its input's history as coefficients of polynomials.

Source: Gu et al. 2020, "HiPPO" (arXiv 2008.07669); the normal part: Gu et al. 2022 (arXiv 2111.00396), appendix C.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def hippo_legs(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """HiPPO-LegS: `A[i, j] = -sqrt((2i+1)(2j+1))` below the diagonal, `-(i+1)` on it, 0 above; `B[i] = sqrt(2i+1)`."""
    i = torch.arange(n, dtype=torch.float64)
    B = torch.sqrt(2 * i + 1)
    return -torch.tril(B[:, None] * B, -1) - torch.diag(i + 1), B


def hippo_normal(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """HiPPO-N, the normal matrix `A + P P^T`, and `P[i] = sqrt(i + 1/2)`; its eigenvalues have real part -1/2."""
    P = torch.sqrt(torch.arange(n, dtype=torch.float64) + 0.5)
    return hippo_legs(n)[0] + P[:, None] * P, P


def hippo_eigen(n: int) -> tuple[Complex[Tensor, " n2"], Complex[Tensor, "n n2"]]:
    """Eigenvalues with positive imaginary part and unit eigenvectors of HiPPO-N, one of each conjugate pair; n is even.

    An eigenvector has no phase of its own; it gets the one in which B is real and positive.
    """
    normal, _ = hippo_normal(n)
    # HiPPO-N is -1/2 plus a skew-symmetric matrix, and -i times that is Hermitian, with orthogonal eigenvectors.
    skew = normal + torch.eye(n, dtype=torch.float64) / 2
    imag, vectors = torch.linalg.eigh(-1j * skew)
    imag, vectors = imag[n // 2 :], vectors[:, n // 2 :]
    seen = vectors.mH @ hippo_legs(n)[1].to(vectors.dtype)
    return torch.complex(torch.full_like(imag, -0.5), imag), vectors * (seen / seen.abs())


def hippo_dplr(n: int) -> tuple[Complex[Tensor, " n2"], Complex[Tensor, " n2"], Complex[Tensor, " n2"]]:
    """HiPPO-LegS in the eigenbasis of its normal part: A, P, B with the matrix `diag(A) - P P^H`, halves of pairs."""
    A, vectors = hippo_eigen(n)
    P, B = (vectors.mH @ v.to(vectors.dtype) for v in (hippo_normal(n)[1], hippo_legs(n)[1]))
    return A, P, B


def s4d_lin(n: int) -> Complex[Tensor, " n2"]:
    """S4D-Lin: `A[i] = -1/2 + i pi n`. Source: arXiv 2206.11893, section 4.2."""
    i = torch.arange(n // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(i, -0.5), math.pi * i)


def s4d_inv(n: int) -> Complex[Tensor, " n2"]:
    """S4D-Inv: `A[i] = -1/2 + i (N / pi) (N / (2 n + 1) - 1)`. Source: arXiv 2206.11893, section 4.2."""
    i = torch.arange(n // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(i, -0.5), n / math.pi * (n / (2 * i + 1) - 1))
