"""The Triton kernels of `linear_scan` at sizes that the laws do not draw: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.ops import linear_scan, use
from tests.ops.upstream import upstream_of


def draw(device: torch.device, kind: str, batch: int, length: int, *rest: int, sequences: int = 0) -> dict[str, Tensor]:
    """kind: the dtypes of a and of b, such as "real complex"."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    radius, angle = (torch.rand(batch, length, *rest, generator=generator) for _ in range(2))
    state, b = normal(sequences or batch, *rest), normal(*radius.shape)
    a_kind, b_kind = kind.split()
    drawn = {
        "a": torch.polar(radius, 6 * angle) if a_kind == "complex" else radius,
        "b": torch.complex(b, normal(*b.shape)) if b_kind == "complex" else b,
        "state": torch.complex(state, normal(*state.shape)) if "complex" in kind else state,
    }
    return {name: value.to(device) for name, value in drawn.items()}


def outputs_and_gradients(backend: str, inputs: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    with use(backend):
        h, final = linear_scan(**leaves, **settings)
    upstream = upstream_of((h, final))
    gradients = torch.autograd.grad((h, final), list(leaves.values()), upstream)
    return {"h": h, "final": final, **dict(zip(leaves, gradients, strict=True))}


def errors(backend: str, inputs: dict[str, Tensor], **settings: Any) -> dict[str, float]:
    """Norm of the difference to the reference in double precision, relative to the norm of that."""
    wide = {name: v.to(torch.complex128 if v.is_complex() else torch.float64) for name, v in inputs.items()}
    expected = outputs_and_gradients(REFERENCE, wide, **settings)
    got = outputs_and_gradients(backend, inputs, **settings)
    return {name: ((got[name] - exact).norm() / exact.norm()).item() for name, exact in expected.items()}


@pytest.mark.parametrize("kind", ["real real", "complex complex", "real complex", "complex real"])
@pytest.mark.parametrize("lengths", [[150], [1, 16, 81, 2]])
def test_segments_of_long_sequences(
    kind: str, lengths: list[int], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of many processors and few channels to fill it: every sequence is cut."""
    from everstate.ops.linear_scan import triton as kernels

    monkeypatch.setattr(kernels, "processors", lambda device: 100)
    monkeypatch.setattr(kernels, "LEAST", 16)
    packing = Packing.of_lengths(lengths)
    inputs = draw(kernel_device, kind, 1, packing.total, 3, 2, sequences=len(lengths))
    assert max(errors("triton", inputs, packing=packing).values()) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter cuts bfloat16 off, where a GPU rounds")
def test_bfloat16_is_as_exact_as_the_torch_form(kernel_device: torch.device) -> None:
    inputs = {name: v.bfloat16() for name, v in draw(kernel_device, "real real", 2, 50, 40).items()}
    inputs["state"] = inputs["state"].float()
    torch_form = errors("torch", inputs)
    for name, error in errors("triton", inputs).items():
        assert error <= 1.2 * torch_form[name] + 1e-6, name


@pytest.mark.parametrize("kind", ["real real", "complex complex"])
def test_views_that_repeat_are_read_where_they_lie(
    kind: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = draw(kernel_device, kind, 2, 20, 3, 5)
    monkeypatch.setattr(Tensor, "contiguous", lambda t: t if t.is_contiguous() else pytest.fail("copied"))
    for view in (inputs["a"][:1, :1], inputs["a"][:, :, :1], inputs["a"][:, :1, :, :1], inputs["a"][:1, :, :, :1]):
        repeated = view.expand(2, 20, 3, 5)
        with torch.no_grad():
            with use("triton"):
                got = linear_scan(**{**inputs, "a": repeated})
            with use(REFERENCE):
                expected = linear_scan(**{**inputs, "a": repeated})
        for one, other in zip(got, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_a_decay_without_gradient_costs_none(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, "real real", 1, 5, 3)
    inputs["b"].requires_grad_()
    with use("triton"):
        h, _ = linear_scan(**inputs)
    (db,) = torch.autograd.grad(h.sum(), inputs["b"])
    with use(REFERENCE):
        (expected,) = torch.autograd.grad(linear_scan(**inputs)[0].sum(), inputs["b"])
    assert torch.allclose(db, expected)


def test_a_conjugated_view(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, "complex complex", 1, 5, 3)
    with use("triton"):
        got, _ = linear_scan(inputs["a"].conj(), inputs["b"].conj(), inputs["state"].conj())
        expected, _ = linear_scan(**inputs)
    assert torch.allclose(got, expected.conj())


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, "complex complex", 2, 40, 3)
    first, second = (outputs_and_gradients("triton", inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_can_trace_it(kernel_device: torch.device) -> None:
    leaves = {name: value.requires_grad_() for name, value in draw(kernel_device, "real real", 1, 9, 5).items()}
    linear_scan.load()
    with use("triton"):
        expected = linear_scan(**leaves)
        got = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")(**leaves)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_double_precision_is_refused(kernel_device: torch.device) -> None:
    inputs = {name: v.to(torch.complex128) for name, v in draw(kernel_device, "complex complex", 1, 3, 2).items()}
    with use("triton"), pytest.raises(BackendError, match="float16 and complex64, not complex128"):
        linear_scan(**inputs)
