"""What the laws cannot say of the linear scan: closed forms, and numbers at the edge of their range."""

from __future__ import annotations

import pytest
import torch

from everstate.core.packing import Packing
from everstate.ops import OPS, linear_scan, use

BACKENDS = [backend for backend in OPS["linear_scan"].backends() if backend != "triton"]
"""Those that take float64 on a CPU; the kernels have `test_linear_scan_triton.py`."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_decay_gives_a_geometric_series(backend: str) -> None:
    a, ones = torch.full((1, 50, 1), 0.9, dtype=torch.float64), torch.ones(1, 50, 1, dtype=torch.float64)
    with use(backend):
        h, last = linear_scan(a, ones, torch.full((1, 1), 2.0, dtype=torch.float64))
    t = torch.arange(1, 51, dtype=torch.float64)
    expected = (1 - 0.9**t) / 0.1 + 2 * 0.9**t
    assert torch.allclose(h[0, :, 0], expected, rtol=1e-13)
    assert last.item() == h[0, -1, 0].item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 2000])
def test_decays_whose_product_underflows_are_exact(backend: str, width: int) -> None:
    a = torch.full((1, 40, width), 1e-30, requires_grad=True)
    b = torch.ones(1, 40, width, requires_grad=True)
    with use(backend):
        h, _ = linear_scan(a, b, torch.ones(1, width))
    assert torch.equal(h, torch.ones_like(h))
    h.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, torch.ones_like(a))
    assert torch.equal(b.grad, torch.ones_like(b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 600])
def test_a_sequence_that_diverges_spoils_no_other(backend: str, width: int) -> None:
    a = torch.full((1, 30, width), 0.5, dtype=torch.float64)
    b = torch.ones(1, 30, width, dtype=torch.float64)
    b[:, 12] = torch.nan
    with use(backend):
        h, last = linear_scan(
            a, b, torch.zeros(3, width, dtype=torch.float64), packing=Packing.of_lengths([10, 10, 10])
        )
    assert h[:, 12:20].isnan().all()
    assert torch.isfinite(h[:, :12]).all()
    assert torch.isfinite(h[:, 20:]).all()
    assert last.isnan().any(1).tolist() == [False, True, False]


def test_an_expanded_decay_collects_its_gradient() -> None:
    a = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    b = torch.ones(2, 9, 4, dtype=torch.float64)
    h, _ = linear_scan(a.expand(2, 9, 4), b, torch.zeros(2, 4, dtype=torch.float64))
    h.sum().backward()
    assert a.grad is not None
    assert a.grad.shape == (4,)
    again = a.detach().clone().requires_grad_()
    with use("reference"):
        h, _ = linear_scan(again.expand(2, 9, 4), b, torch.zeros(2, 4, dtype=torch.float64))
    h.sum().backward()
    assert torch.allclose(a.grad, again.grad)  # type: ignore[arg-type]
