"""The Triton kernels of `ssd_scan` at sizes that the laws do not draw: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.ops import gated, ssd_scan, use
from everstate.ops.ssd import limits
from tests.ops.upstream import upstream_of

HAS_GPU = torch.cuda.is_available()


def draw(
    device: torch.device, batch: int, length: int, heads: int, headdim: int, groups: int, d_state: int,
    rank: int = 0, dtype: torch.dtype = torch.float32, sequences: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    step = torch.rand(batch, length, heads, generator=generator)
    drawn = {
        "x": normal(batch, length, heads, headdim).to(dtype),
        "a": -step * torch.rand(heads, generator=generator),
        "s": step,
        "B": normal(batch, length, groups, d_state).to(dtype) / d_state**0.25,
        "C": normal(batch, length, groups, d_state).to(dtype) / d_state**0.25,
        "state": normal(sequences or batch, heads, headdim, d_state),
        "D": normal(heads, headdim),
    }
    if rank:
        drawn["diagonal"] = normal(batch, length, heads, rank)
    return {name: value.to(device) for name, value in drawn.items()}


def outputs_and_gradients(backend: str, inputs: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    with use(backend):
        y, final = ssd_scan(**leaves, **settings)
    upstream = upstream_of((y, final))
    gradients = torch.autograd.grad((y, final), list(leaves.values()), upstream)
    return {"y": y, "final": final, **dict(zip(leaves, gradients, strict=True))}


def agree(inputs: dict[str, Tensor], tolerance: float, **settings: Any) -> None:
    """Norm of the difference to the float64 reference, relative to the norm of that."""
    expected = outputs_and_gradients(REFERENCE, {name: value.double() for name, value in inputs.items()}, **settings)
    for name, got in outputs_and_gradients("triton", inputs, **settings).items():
        assert got.dtype == (torch.float32 if name == "final" else inputs["x" if name == "y" else name].dtype)
        assert (got.double() - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("heads", "headdim", "groups", "d_state", "rank"),
    [
        (4, 64, 1, 128, 0), (2, 64, 2, 128, 1), (2, 128, 1, 64, 0),
        (2, 80, 1, 48, 0), (2, 32, 1, 16, 4), (2, 16, 2, 64, 3),
    ],
)  # fmt: skip
def test_sizes_of_real_layers(
    heads: int, headdim: int, groups: int, d_state: int, rank: int,
    dtype: torch.dtype, tolerance: float, kernel_device: torch.device,
) -> None:  # fmt: skip
    agree(draw(kernel_device, 1, 144, heads, headdim, groups, d_state, rank, dtype), tolerance)


def pretend_to_have_many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """And few heads to fill them: every sequence is cut."""
    from everstate.ops import triton_segments
    from everstate.ops.ssd import triton as kernels

    for module in (triton_segments, kernels):
        monkeypatch.setattr(module, "processors", lambda device: 12)


@pytest.mark.parametrize(("headdim", "d_state", "rank"), [(16, 32, 0), (64, 16, 4), (128, 16, 1)])
def test_whole_chunks_are_moved_by_the_copy_engine(
    headdim: int, d_state: int, rank: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everstate.ops.ssd import triton as kernels

    pretend_to_have_many_processors(monkeypatch)
    packing = Packing([0, 64, 256])
    inputs = draw(kernel_device, 1, 256, 4, headdim, 2, d_state, rank, torch.bfloat16, sequences=2)
    agree(inputs, 2e-2, packing=packing)
    names = ("x", "B", "C", "diagonal", "D")
    call = kernels.Call(*(inputs.get(name) for name in names), list(packing.cu_seqlens))
    assert call.full and len(call.plan.segments) > len(packing)
    off = {**inputs, "x": torch.cat([inputs["x"], inputs["x"]], -1)[..., 4 : 4 + headdim]}
    assert not kernels.Call(*(off.get(name) for name in names), list(packing.cu_seqlens)).full
    agree(off, 2e-2, packing=packing)


@pytest.mark.parametrize("lengths", [[700], [1, 64, 300, 65, 2]] if HAS_GPU else [[330], [1, 64, 260, 65, 2]])
def test_segments_of_long_sequences(
    lengths: list[int], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_to_have_many_processors(monkeypatch)
    packing = Packing.of_lengths(lengths)
    inputs = draw(kernel_device, 1, packing.total, 2, 16, 1, 16, sequences=len(lengths))
    agree(inputs, 1e-5, packing=packing)
    agree({name: v for name, v in inputs.items() if name != "D"}, 1e-5, packing=packing)


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 2, 130, 4, 32, 1, 32, dtype=torch.bfloat16)
    first, *others = (outputs_and_gradients("triton", inputs) for _ in range(3 if kernel_device.type == "cuda" else 2))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_views_of_one_projection_are_read_where_they_lie(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 2, 70, 2, 16, 1, 16)
    inputs["z"] = inputs["x"].flip(1)
    wide = torch.cat([inputs[name].flatten(2) for name in ("z", "x", "B", "C")], -1)
    z, x, B, C = wide.split([32, 32, 16, 16], -1)
    z, x = (t.unflatten(-1, (2, 16)) for t in (z, x))
    views = {**inputs, "z": z, "x": x, "B": B.unsqueeze(2), "C": C.unsqueeze(2)}
    with use("triton"):
        for got, expected in zip(ssd_scan(**views), ssd_scan(**inputs), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_gate", [False, True])
def test_a_compiler_can_trace_it(with_gate: bool, kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 70, 2, 16, 1, 16)
    if with_gate:
        inputs["z"] = inputs["x"].flip(1)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    ssd_scan.load()
    gated.load()
    with use("triton"):
        expected = ssd_scan(**leaves)
        got = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")(**leaves)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        gradients = (torch.autograd.grad(t.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True)
                     for t in (one, other))  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"headdim": 256}, r"not 256 x 16"),
        ({"d_state": 512}, r"not 16 x 512"),
        ({"d_state": 256, "dtype": torch.float32}, r"float32"),
        ({"rank": 17}, r"up to 16 entries per group, not 17"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], sentence: str, kernel_device: torch.device) -> None:
    sizes = {"heads": 1, "headdim": 16, "groups": 1, "d_state": 16, "dtype": torch.bfloat16, **changes}
    inputs = draw(kernel_device, 1, 17, **sizes)
    with use("triton"), pytest.raises(BackendError, match=sentence):
        ssd_scan(**inputs)
    assert ssd_scan(**inputs)[0].isfinite().all()


def test_a_gpu_with_too_little_shared_memory_is_refused(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "shared_memory", lambda device: 101_376)
    with use("triton"):
        # A head of 64 x 128 in bfloat16 fits; of 128 x 128 it does not.
        assert ssd_scan(**draw(kernel_device, 1, 3, 1, 64, 1, 128, dtype=torch.bfloat16))[0].isfinite().all()
        with pytest.raises(BackendError, match="needs 131,072 bytes .* this GPU has 101,376"):
            ssd_scan(**draw(kernel_device, 1, 3, 1, 128, 1, 128, dtype=torch.bfloat16))


def test_a_cpu_is_refused() -> None:
    with use("triton"), pytest.raises(BackendError, match="runs on a GPU, the input is on cpu"):
        ssd_scan(**draw(torch.device("cpu"), 1, 3, 1, 16, 1, 16))
