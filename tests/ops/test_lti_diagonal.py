"""What the laws cannot say of the diagonal system: closed forms, and what a mode does with irregular sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from everstate.ops import OPS, lti_diagonal, lti_kernel_diagonal, use
from everstate.ops.lti_diagonal.discretize import Rule, discretize

DT = 0.3


def scalar(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.complex128)


@pytest.mark.parametrize("backend", OPS["lti_kernel_diagonal"].backends())
@pytest.mark.parametrize(
    ("rule", "gain", "decay"),
    [
        ("zoh", 1 - math.exp(-DT), math.exp(-DT)),
        ("bilinear", DT / (1 + DT / 2), (1 - DT / 2) / (1 + DT / 2)),
    ],
)
def test_kernel_of_a_leaky_integrator(backend: str, rule: Rule, gain: float, decay: float) -> None:
    """`x' = -x + u` has the kernel `gain decay^j`; half of C, because a pair counts twice."""
    dt = torch.tensor([DT], dtype=torch.float64)
    with use(backend):
        K = lti_kernel_diagonal(scalar(-1), scalar(1), scalar(0.5), dt, length=20, discretization=rule)
    assert torch.allclose(K[0], gain * decay ** torch.arange(20, dtype=torch.float64), rtol=1e-13)


def test_zero_order_hold_is_exact_for_a_constant_input() -> None:
    """One step of 1 equals ten steps of 0.1."""
    A = torch.tensor([[-0.5 + 3j, -0.1 - 1j]], dtype=torch.complex128)
    x, whole = torch.zeros(1, 2, dtype=torch.complex128), torch.ones(1, dtype=torch.float64)
    dA, gain = discretize(A, whole / 10, "zoh")
    for _ in range(10):
        x = dA * x + gain
    assert torch.allclose(x, discretize(A, whole, "zoh")[1], rtol=1e-13)


def test_zero_order_hold_of_a_tiny_step_keeps_its_digits() -> None:
    A = torch.tensor([[-0.5 + 1j]], dtype=torch.complex64)
    _, gain = discretize(A, torch.tensor([1e-6]), "zoh")
    assert abs(gain.item() / 1e-6 - 1) < 1e-5


def test_a_convolution_with_irregular_sampling_is_a_scan() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 70, 2, generator=generator, dtype=torch.float64)
    delta_t = torch.rand(1, 70, generator=generator, dtype=torch.float64) + 0.5
    A = torch.tensor([[-0.5 + 3j], [-0.1 + 1j]], dtype=torch.complex128)
    ones, dt = torch.ones_like(A), torch.tensor([0.1, 0.2], dtype=torch.float64)
    start = torch.zeros(1, 2, 1, dtype=torch.complex128)
    results = [lti_diagonal(u, A, ones, ones, dt, start, delta_t=delta_t, mode=m)[0] for m in ("convolution", "scan")]
    assert torch.equal(*results)
    assert not torch.allclose(results[0], lti_diagonal(u, A, ones, ones, dt, start)[0])
