"""The Triton kernels of `causal_conv1d` at sizes that the laws do not draw: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError, RequestError
from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.ops import causal_conv1d, use
from tests.ops.upstream import upstream_of

Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def short_chunks(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time."""
    from everstate.ops.conv1d import triton as kernels

    if kernel_device.type == "cpu":
        monkeypatch.setattr(kernels, "CHUNK", 16)
        monkeypatch.setattr(kernels, "BACKWARD_CHUNK", 24)


def draw(
    device: torch.device, batch: int, length: int, channels: int, width: int, dtype: torch.dtype = torch.float32
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    return {
        "x": normal(batch, length, channels).to(dtype),
        "weight": normal(channels, width) / width**0.5,
        "bias": normal(channels),
        "state": normal(batch, channels, width - 1),
    }


def outputs_and_gradients(backend: str, inputs: Inputs, *, with_final: bool = True, **settings: Any) -> Inputs:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    with use(backend):
        y, final = causal_conv1d(**{"bias": None, **leaves}, **settings)
    upstream = upstream_of((y, final))
    count = 2 if with_final else 1
    gradients = torch.autograd.grad((y, final)[:count], list(leaves.values()), upstream[:count], materialize_grads=True)
    return {"y": y, "final": final, **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def widened(inputs: Inputs) -> Inputs:
    return {name: value.double() for name, value in inputs.items()}


def errors(got: Inputs, expected: Inputs) -> dict[str, float]:
    """Norms of the differences, relative to those of what is expected."""
    scale = lambda t: t.norm().clamp(min=1e-30)
    return {n: ((got[n].double() - want).norm() / scale(want)).item() for n, want in expected.items() if want.numel()}


@pytest.mark.parametrize("with_final", [True, False])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 16])
def test_widths(width: int, activation: str | None, with_final: bool, kernel_device: torch.device) -> None:
    """Sequences shorter than the window, and such as end within a window of the last chunk."""
    from everstate.ops.conv1d import triton as kernels

    lengths = [1, 2, 5, kernels.CHUNK + 1, kernels.BACKWARD_CHUNK - width + 2, 3]
    packing = Packing.of_lengths(lengths)
    inputs = draw(kernel_device, 1, packing.total, 10, width)
    inputs["state"] = draw(kernel_device, len(lengths), 1, 10, width)["state"]
    if activation is None:
        del inputs["bias"]
    settings: dict[str, Any] = {"activation": activation, "packing": packing, "with_final": with_final}
    got = outputs_and_gradients("triton", inputs, **settings)
    assert max(errors(got, outputs_and_gradients(REFERENCE, widened(inputs), **settings)).values()) < 1e-6


def test_bfloat16_errs_no_more_than_the_torch_form(kernel_device: torch.device) -> None:
    """With more channels than a program has, and more chunks than programs."""
    inputs = draw(kernel_device, 2, 50, 300, 4, torch.bfloat16)
    expected = outputs_and_gradients("torch", widened(inputs), activation="silu")
    theirs = errors(outputs_and_gradients("torch", inputs, activation="silu"), expected)
    allowed = 1.2 if kernel_device.type == "cuda" else 2.2  # the interpreter rounds bfloat16 towards zero
    for name, error in errors(outputs_and_gradients("triton", inputs, activation="silu"), expected).items():
        assert error <= allowed * theirs[name] + 1e-6, name


def test_a_program_takes_several_chunks_in_turn(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from everstate.ops.conv1d import triton as kernels

    inputs = draw(kernel_device, 1, 3 * kernels.BACKWARD_CHUNK, 6, 4)
    many = outputs_and_gradients("triton", inputs)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "processors", lambda device: 2)
    few = outputs_and_gradients("triton", inputs)
    assert torch.equal(many["dx"], few["dx"])
    assert max(errors(few, widened(many)).values()) < 1e-6


@pytest.mark.parametrize("length", [7, 40])
def test_views_of_a_projection_are_read_where_they_lie(length: int, kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 2, length, 24, 4, torch.bfloat16)
    wide = torch.cat([inputs["x"], inputs["x"] + 1.0, inputs["x"]], -1)
    view = {**inputs, "x": wide[..., 24:48], "state": inputs["state"].transpose(1, 2).contiguous().transpose(1, 2)}
    dense = {**inputs, "x": inputs["x"] + 1.0}
    with use("triton"):
        for got, expected in zip(causal_conv1d(**view), causal_conv1d(**dense), strict=True):
            assert torch.equal(got, expected)


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 2, 60, 20, 4, torch.bfloat16)
    first, *others = (outputs_and_gradients("triton", inputs, activation="silu") for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("from_zero", [True, False])
def test_a_compiler_can_trace_it(from_zero: bool, kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 70, 20, 4)
    leaves = {name: value.requires_grad_(not from_zero or name != "state") for name, value in inputs.items()}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    causal_conv1d.load()
    with use("triton"):
        expected = causal_conv1d(**leaves, activation="silu")
        got = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")(**leaves, activation="silu")
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        gradients = (torch.autograd.grad(t.sum(), wanted, allow_unused=True, retain_graph=True) for t in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


def test_a_packing_that_does_not_fit_is_an_error(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 9, 4, 3)
    with use("triton"), pytest.raises(RequestError, match="one row of 10 tokens"):
        causal_conv1d(**inputs, packing=Packing([0, 10]))


def test_more_taps_are_refused(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 20, 4, 17)
    with use("triton"), pytest.raises(BackendError, match="takes up to 16 taps, not 17"):
        causal_conv1d(**inputs)
    assert causal_conv1d(**inputs)[0].isfinite().all()
