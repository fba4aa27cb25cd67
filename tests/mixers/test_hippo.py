"""Golden values of the initial matrices (MATH: section 1)."""

from __future__ import annotations

import math

import pytest
import torch

from everstate.mixers.hippo import hippo_dplr, hippo_eigen, hippo_legs, hippo_normal, s4d_inv, s4d_lin


def test_entries_of_hippo_legs() -> None:
    A, B = hippo_legs(4)
    assert A.diagonal().tolist() == [-1, -2, -3, -4]
    assert A[1, 0].item() == pytest.approx(-math.sqrt(3), rel=1e-15)
    assert A[3, 1].item() == pytest.approx(-math.sqrt(21), rel=1e-15)
    assert torch.equal(A.triu(1), torch.zeros(4, 4, dtype=torch.float64))
    assert B.square().tolist() == pytest.approx([1, 3, 5, 7], rel=1e-15)


@pytest.mark.parametrize("n", [2, 16, 64])
def test_eigenvalues_of_the_normal_part_lie_on_one_line(n: int) -> None:
    normal, _ = hippo_normal(n)
    assert torch.allclose(normal @ normal.mT, normal.mT @ normal, rtol=1e-12)
    everything = torch.linalg.eigvals(normal)
    assert torch.allclose(everything.real, torch.full((n,), -0.5, dtype=torch.float64), rtol=1e-9)
    half, vectors = hippo_eigen(n)
    assert torch.allclose(half.imag.sort()[0], everything.imag[everything.imag > 0].sort()[0], rtol=1e-9)
    assert torch.allclose(normal.to(half.dtype) @ vectors, vectors * half, atol=1e-9 * n * n)
    assert torch.allclose(vectors.mH @ vectors, torch.eye(n // 2, dtype=half.dtype), atol=1e-12)


def test_normal_plus_low_rank_is_hippo_legs_in_another_basis() -> None:
    n = 8
    dense, B = hippo_legs(n)
    A, P, turned = (torch.cat([v, v.conj()]) for v in hippo_dplr(n))
    _, half = hippo_eigen(n)
    basis = torch.cat([half, half.conj()], 1)
    again = basis @ (torch.diag(A) - P[:, None] * P.conj()) @ basis.mH
    assert torch.allclose(again, dense.to(again.dtype), atol=1e-12 * n * n)
    assert torch.allclose(basis @ turned, B.to(again.dtype), atol=1e-12)
    assert (turned.real > 0).all()


def test_s4d_lin_and_inv() -> None:
    lin, inv = s4d_lin(8), s4d_inv(8)
    assert lin.tolist() == pytest.approx([-0.5, -0.5 + math.pi * 1j, -0.5 + 2j * math.pi, -0.5 + 3j * math.pi])
    assert inv[0].item() == pytest.approx(-0.5 + 1j * 8 / math.pi * 7)
    assert inv[3].item() == pytest.approx(-0.5 + 1j * 8 / math.pi * (8 / 7 - 1))
