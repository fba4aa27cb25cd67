"""The Triton kernels of `selective_scan` at sizes that the laws do not draw: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.ops import selective_scan, selective_step_, use

# The first product of matrices in a thread of autograd finds no context of cuBLAS, and PyTorch says so.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
HAS_GPU = torch.cuda.is_available()
LENGTH = 330 if HAS_GPU else 70
"""More than a chunk of tokens, and not a multiple of a tile."""


def draw(
    device: torch.device, batch: int, length: int, channels: int, d_state: int,
    dtype: torch.dtype = torch.float32, sequences: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    drawn = {
        "x": normal(batch, length, channels).to(dtype),
        "dt": (normal(batch, length, channels) - 2).to(dtype),
        "A": -15 * torch.rand(channels, d_state, generator=generator) - 1,
        "B": normal(batch, length, d_state).to(dtype),
        "C": normal(batch, length, d_state).to(dtype),
        "state": normal(sequences or batch, channels, d_state),
        "D": normal(channels),
        "z": normal(batch, length, channels).to(dtype),
        "dt_bias": normal(channels),
    }
    return {name: value.to(device) for name, value in drawn.items()}


def outputs_and_gradients(backend: str, inputs: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    with use(backend):
        y, final = selective_scan(**leaves, **settings)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in (y, final)]
    gradients = torch.autograd.grad((y, final), list(leaves.values()), upstream)
    return {"y": y, "final": final, **dict(zip(leaves, gradients, strict=True))}


def errors(backend: str, inputs: dict[str, Tensor], **settings: Any) -> dict[str, float]:
    """Norm of the difference to the float64 reference, relative to the norm of that."""
    expected = outputs_and_gradients(REFERENCE, {name: v.double() for name, v in inputs.items()}, **settings)
    got = outputs_and_gradients(backend, inputs, **settings)
    return {name: ((got[name].double() - exact).norm() / exact.norm()).item() for name, exact in expected.items()}


def agree(inputs: dict[str, Tensor], **settings: Any) -> None:
    """In float32; powers of two have 22 bits on a GPU."""
    for name, error in errors("triton", inputs, **settings).items():
        assert error <= 2e-5, name


@pytest.mark.parametrize(
    ("channels", "d_state", "without"),
    [(64, 16, ()), (33, 16, ("z",)), (5, 3, ("dt_bias",)), (40, 1, ("D",)), (3, 17, ("z", "D", "dt_bias"))],
)
def test_sizes_of_real_layers(
    channels: int, d_state: int, without: tuple[str, ...], kernel_device: torch.device
) -> None:
    inputs = draw(kernel_device, 1, LENGTH if d_state == 16 else 19, channels, d_state)
    given = {name: value for name, value in inputs.items() if name not in without}
    if "dt_bias" in without:
        given["dt"] = torch.nn.functional.softplus(given["dt"])
    agree(given)


@pytest.mark.skipif(not HAS_GPU, reason="Triton's interpreter cuts bfloat16 off, where a GPU rounds")
def test_bfloat16_is_as_exact_as_the_torch_form(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, LENGTH, 40, 16, torch.bfloat16)
    torch_form = errors("torch", inputs)
    for name, error in errors("triton", inputs).items():
        assert error <= 1.2 * torch_form[name] + 1e-5, name


def test_steps_may_be_wider_than_inputs(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 21, 7, 16, torch.bfloat16)
    inputs["dt"] = inputs["dt"].float()
    gradients = outputs_and_gradients("triton", inputs)
    assert {gradients[name].dtype for name in ("dt", "A", "state")} == {torch.float32}
    assert {gradients[name].dtype for name in ("y", "x", "B", "C", "z")} == {torch.bfloat16}
    assert max(errors("triton", inputs).values()) < 1e-2


@pytest.mark.parametrize(
    ("lengths", "processors"),
    [([LENGTH], 1), ([LENGTH], 2), ([LENGTH], 100), ([1, 64, 65, 2], 9), ([1, 64, 65, 2], 100)],
)
def test_segments_of_long_sequences(
    lengths: list[int], processors: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of many processors and few channels to fill it: sequences are cut; forward, not before it is half empty."""
    from everstate.ops.selective_scan import triton as kernels

    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "AHEAD", 4)
    packing = Packing.of_lengths(lengths)
    inputs = draw(kernel_device, 1, packing.total, 6, 4, sequences=len(lengths))
    agree(inputs, packing=packing)


@pytest.mark.parametrize(("sequences", "length", "pieces"), [(1, 65_536, 264), (5, 13_107, 52), (6, 10_922, 22)])
def test_segments_fill_an_h200(sequences: int, length: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of up to a third of it, forward too."""
    kernels = pytest.importorskip("everstate.ops.selective_scan.triton")
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    x = torch.empty(sequences, length, 4096, dtype=torch.bfloat16, device="meta")
    assert kernels._pieces(sequences, x) == pieces


def test_float32_loses_no_digits_where_steps_are_long(kernel_device: torch.device) -> None:
    """States that forget at once: the gradient of A as a difference of sums over many tokens would lose 6e-5."""
    packing = Packing.of_lengths([1, 2, 9, 3, 65])
    inputs = draw(kernel_device, 1, packing.total, 5, 4, sequences=len(packing))
    inputs = {**inputs, "dt": 2 * inputs["dt"] + 5, "A": inputs["A"] / 4}
    assert max(errors("triton", inputs, packing=packing).values()) <= 5e-6


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 2, 21, 70, 16, torch.bfloat16)
    first, *others = (outputs_and_gradients("triton", inputs) for _ in range(3 if kernel_device.type == "cuda" else 2))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_views_of_one_projection_are_read_where_they_lie(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 2, 17, 6, 4)
    x, z, B, C = torch.cat([inputs[name] for name in ("x", "z", "B", "C")], -1).split([6, 6, 4, 4], -1)
    with use("triton"):
        for got, expected in zip(
            selective_scan(**{**inputs, "x": x, "z": z, "B": B, "C": C}), selective_scan(**inputs), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_can_trace_it(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 9, 5, 4)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    selective_scan.load()
    with use("triton"):
        expected = selective_scan(**leaves)
        got = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")(**leaves)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        gradients = (torch.autograd.grad(t.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
                     for t in (one, other))  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_pool_of_either_dtype(dtype: torch.dtype, kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 3, 1, 70, 16, torch.bfloat16, sequences=5)
    fixed = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    token = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C", "z")}
    slots = torch.tensor([4, 0, 3], device=kernel_device)
    pool, exact = inputs["state"].to(dtype), inputs["state"].to(dtype).double()
    before = pool.clone()
    with torch.no_grad(), use("triton"):
        y = selective_step_(**token, **fixed, state=pool, slots=slots)
    with torch.no_grad(), use(REFERENCE):
        widened = {name: value.double() for name, value in (token | fixed).items()}
        expected = selective_step_(**widened, state=exact, slots=slots)
    # Triton's interpreter cuts bfloat16 off, where a GPU rounds.
    assert (y.double() - expected).norm() <= 8e-3 * expected.norm()
    assert (pool.double() - exact).norm() <= (1e-6 if dtype is torch.float32 else 8e-3) * exact.norm()
    assert torch.equal(pool[[1, 2]], before[[1, 2]])


def test_what_does_not_fit_is_refused(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 3, 2, 33)
    with use("triton"), pytest.raises(BackendError, match="states of up to 32 numbers per channel, not 33"):
        selective_scan(**inputs)
    assert selective_scan(**inputs)[0].isfinite().all()


def test_a_cpu_is_refused() -> None:
    with use("triton"), pytest.raises(BackendError, match="runs on a GPU, the input is on cpu"):
        selective_scan(**draw(torch.device("cpu"), 1, 3, 2, 4))
