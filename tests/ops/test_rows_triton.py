"""The kernels of residual sums and gated activations in the dtypes of a model that is trained in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everstate.ops import add_rms_norm, gated, glu, use

MORE = 1.2 if torch.cuda.is_available() else 2.2
"""Times the error of PyTorch that is allowed; Triton's interpreter cuts digits off where a GPU rounds."""


def normal(device: torch.device, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device).requires_grad_()


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("width", [1024, 80])
def test_a_residual_stream_of_float32_takes_in_bfloat16(width: int, kernel_device: torch.device) -> None:
    x = normal(kernel_device, 3, 7, width, seed=0)
    y = normal(kernel_device, 3, 7, width, seed=1, dtype=torch.bfloat16)
    weight = normal(kernel_device, width, seed=2, dtype=torch.bfloat16)
    upstream = [normal(kernel_device, 3, 7, width, seed=3), normal(kernel_device, 3, 7, width, seed=4).to(y.dtype)]

    def outcome(backend: str, *inputs: Tensor) -> list[Tensor]:
        with use(backend):
            outputs = add_rms_norm(*inputs)
        given = [u.detach().to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, inputs, given)]

    exact = outcome("torch", *(t.detach().double().requires_grad_() for t in (x, y, weight)))
    plain, got = outcome("torch", x, y, weight), outcome("triton", x, y, weight)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    for one, other, true in zip(got, plain, exact, strict=True):
        assert error(one, true) <= MORE * error(other, true) + 1e-6


@pytest.mark.parametrize("activation", ["silu", "relu2", "gelu", "gelu_tanh"])
def test_a_gated_activation_rounds_once(activation: str, kernel_device: torch.device) -> None:
    wide = normal(kernel_device, 5, 2 * 1100 + 3, seed=0, dtype=torch.bfloat16)
    h, upstream = wide[:, 3:], normal(kernel_device, 5, 1100, seed=1, dtype=torch.bfloat16)

    def outcome(backend: str, inputs: Tensor) -> list[Tensor]:
        with use(backend):
            y = glu(inputs, activation)
        return [y, *torch.autograd.grad(y, inputs, upstream.detach().to(y.dtype))]

    exact = outcome("torch", h.detach().double().requires_grad_())
    for one, other, true in zip(outcome("triton", h), outcome("torch", h), exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert error(one, true) <= MORE * error(other, true)


def test_a_gate_lies_where_it_was_projected(kernel_device: torch.device) -> None:
    """In the rows of a wider tensor, as `in_proj` gives it; y and z may have dtypes of their own."""
    projected = normal(kernel_device, 2, 5, 1100 + 7, seed=0, dtype=torch.bfloat16)
    y, upstream = normal(kernel_device, 2, 5, 1100, seed=1), normal(kernel_device, 2, 5, 1100, seed=2)

    def outcome(backend: str, y: Tensor, projected: Tensor) -> list[Tensor]:
        with use(backend):
            out = gated(y, projected[..., 4:-3])
        return [out, *torch.autograd.grad(out, (y, projected), upstream.detach().to(out.dtype))]

    exact = outcome("torch", *(t.detach().double().requires_grad_() for t in (y, projected)))
    got = outcome("triton", y, projected)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.bfloat16]
    for one, true, allowed in zip(got, exact, (1e-6, 1e-6, 4e-3), strict=True):
        assert error(one, true) <= allowed


def test_an_empty_batch_is_left_to_pytorch(kernel_device: torch.device) -> None:
    h = normal(kernel_device, 2, 8, seed=0)
    assert glu.explain(h[:0], "silu")["triton"] == "was given no rows"
    assert torch.equal(glu(h[:0]), h[:0, :4])
