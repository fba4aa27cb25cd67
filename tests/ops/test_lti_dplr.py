"""What the laws cannot say of the normal-plus-low-rank system: HiPPO-LegS as it is written, and long kernels."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from everstate.mixers.hippo import hippo_dplr, hippo_eigen, hippo_legs
from everstate.ops import lti_kernel_dplr
from everstate.ops.example import EXAMPLES, Draw


def legs_kernel(n: int, C: Tensor, dt: float, length: int) -> Tensor:
    """The kernel of HiPPO-LegS by the dense real matrices of its definition."""
    A, B = hippo_legs(n)
    eye = torch.eye(n, dtype=torch.float64)
    dA = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    x = torch.linalg.solve(eye - dt / 2 * A, dt * B)
    taps = []
    for _ in range(length):
        taps.append(C @ x)
        x = dA @ x
    return torch.stack(taps)


@pytest.mark.parametrize("n", [2, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 33, 200])
def test_the_generating_function_gives_the_kernel_of_hippo_legs(n: int, length: int) -> None:
    C = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, P, B = (v.unsqueeze(0) for v in hippo_dplr(n))
    turned = (C.to(A.dtype) @ hippo_eigen(n)[1]).unsqueeze(0)
    K = lti_kernel_dplr(A, P, B, turned, torch.tensor([0.01], dtype=torch.float64), length=length)
    expected = legs_kernel(n, C, 0.01, length)
    assert (K[0] - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_frequencies_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_and_gradients() -> list[Tensor]:
        system = EXAMPLES["lti_kernel_dplr"]["kernel"](Draw(), 1, 33, 1).fixed
        leaves = [system[name].requires_grad_() for name in ("A", "P", "B", "C", "dt")]
        K = lti_kernel_dplr(**system)
        return [K, *torch.autograd.grad(K.square().sum(), leaves)]

    at_once = kernel_and_gradients()
    monkeypatch.setattr(import_module("everstate.ops.lti_dplr.kernel"), "FREQUENCIES", 5)
    for part, whole in zip(kernel_and_gradients(), at_once, strict=True):
        assert torch.allclose(part, whole, rtol=1e-12, atol=1e-12)
