"""The Triton kernels of the experts at sizes that the laws do not draw: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.ops import Normed, experts, use
from everstate.ops.experts import limits
from everstate.ops.linear import limits as linear_limits
from tests.ops.reference import exact, undivided
from tests.ops.upstream import upstream_of


def draw(
    device: torch.device, tokens: int, d_model: int, d_hidden: int, count: int, top_k: int,
    dtype: torch.dtype = torch.float32, gated: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    drawn = {
        "x": normal(tokens, d_model).to(dtype),
        "weights": torch.rand(tokens, top_k, generator=generator),
        "indices": torch.stack([torch.randperm(count, generator=generator)[:top_k] for _ in range(tokens)]),
        "w_in": (normal(count, (1 + gated) * d_hidden, d_model) * d_model**-0.5).to(dtype),
        "w_out": (normal(count, d_model, d_hidden) * d_hidden**-0.5).to(dtype),
    }
    return {name: value.to(device) for name, value in drawn.items()}


def widen(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def outputs_and_gradients(backend: str, inputs: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    with use(backend):
        y = experts(**leaves, **settings)
    (upstream,) = upstream_of([y])
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    return {"y": y, **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), upstream), strict=True))}


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize(
    ("tokens", "d_model", "d_hidden", "count", "top_k", "settings"),
    [
        (70, 96, 80, 4, 2, {}),
        (40, 64, 72, 16, 3, {"activation": "gelu"}),
        (9, 136, 48, 40, 6, {"activation": "gelu_tanh"}),
        (150, 32, 40, 2, 1, {"activation": "relu2", "gated": False}),
    ],
)
def test_sizes_and_activations(
    tokens: int, d_model: int, d_hidden: int, count: int, top_k: int, settings: dict[str, Any],
    dtype: torch.dtype, tolerance: float, kernel_device: torch.device,
) -> None:  # fmt: skip
    if kernel_device.type == "cpu":
        count = min(count, 12)  # the interpreter takes its time for each expert
    inputs = draw(kernel_device, tokens, d_model, d_hidden, count, top_k, dtype, settings.get("gated", True))
    expected = outputs_and_gradients(REFERENCE, widen(inputs), **settings)
    for name, got in outputs_and_gradients("triton", inputs, **settings).items():
        assert got.dtype == inputs["x" if name == "y" else name].dtype
        assert error(got, expected[name]) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17])
def test_few_tokens(tokens: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    """Up to 32 rows each reads its expert by itself; here 2 to 34, of which some share an expert."""
    inputs = draw(kernel_device, tokens, 96, 40, 5, 2, dtype)
    with torch.no_grad(), use("triton"):
        assert error(experts(**inputs), exact(experts, **inputs)) < (1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("tokens", "parts"), [(1, 2), (5, 96), (17, 3), (40, 60)])
def test_rows_that_a_norm_has_left_undivided(
    tokens: int, parts: int, backend: str, dtype: torch.dtype, tolerance: float, kernel_device: torch.device
) -> None:
    """Each by itself, sorted, and more sums of squares than a program holds (of 64 rows, which 40 tokens have here)."""
    inputs: dict[str, Any] = draw(kernel_device, tokens, 96, 40, 5, 2, dtype)
    x = undivided(inputs["x"], parts, eps=0.1)
    for held in (linear_limits.SQUARES, 1024):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), use(backend):
            patch.setattr(linear_limits, "SQUARES", held)
            got = experts(**{**inputs, "x": x})
        assert error(got, exact(experts, **{**inputs, "x": x})) <= tolerance


def test_undivided_rows_of_more_dimensions(kernel_device: torch.device) -> None:
    inputs: dict[str, Any] = draw(kernel_device, 6, 64, 24, 4, 2)
    x = undivided(inputs["x"], 5)
    folded = {name: inputs[name].unflatten(0, (2, 3)) for name in ("weights", "indices")}
    split = Normed(x.x.unflatten(0, (2, 3)), x.squares.unflatten(0, (2, 3)), x.eps)
    with use("triton"), torch.no_grad():
        got = experts(**{**inputs, **folded, "x": split})
    assert error(got.flatten(0, 1), exact(experts, **{**inputs, "x": x})) <= 1e-5


def test_gradients_of_rows_that_a_norm_has_left_undivided(kernel_device: torch.device) -> None:
    """Those of the squares too, for which the rows are divided first."""
    inputs: dict[str, Any] = draw(kernel_device, 20, 32, 24, 4, 2)
    gradients = []
    for backend, dtype in (("triton", torch.float32), (REFERENCE, torch.float64)):
        x = inputs["x"].to(dtype).requires_grad_()
        arguments = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        with use(backend):
            y = experts(**{**arguments, "x": undivided(x, 3)})
        gradients += torch.autograd.grad(y, x, upstream_of([y]))
    assert error(*gradients) <= 1e-5


def test_low_precision_loses_no_more_than_the_form_of_pytorch(kernel_device: torch.device) -> None:
    if kernel_device.type == "cpu":
        pytest.skip("the interpreter cuts numbers off to bfloat16 instead of rounding them")
    inputs = draw(kernel_device, 1200, 512, 256, 6, 2, torch.bfloat16)
    exact = outputs_and_gradients(REFERENCE, widen(inputs))
    ours, theirs = outputs_and_gradients("triton", inputs), outputs_and_gradients("torch", inputs)
    for name, expected in exact.items():
        assert error(ours[name], expected) <= 1.2 * error(theirs[name], expected), name


def test_many_rows_are_sorted_as_few_are(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    kernels = import_module("everstate.ops.experts.triton")
    indices = torch.randint(7, (60, 3), generator=torch.Generator().manual_seed(2)).to(kernel_device)
    indices[indices == 4] = 5  # an expert that nobody goes to
    order, starts = kernels._sort(indices, 7)
    assert torch.equal(order.long(), indices.flatten().argsort(stable=True))
    assert starts.tolist() == [0, *indices.flatten().bincount(minlength=7).cumsum(0).tolist()]
    monkeypatch.setattr(kernels, "RANKED", 10)
    assert all(torch.equal(a, b) for a, b in zip(kernels._sort(indices, 7), (order, starts), strict=True))


def test_an_expert_without_tokens_has_no_gradient(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 40, 32, 32, 3, 1)
    inputs["indices"].fill_(1)
    got = outputs_and_gradients("triton", inputs)
    for name in ("w_in", "w_out"):
        assert not got[name][[0, 2]].any() and got[name][1].any()


def test_no_tokens_at_all(kernel_device: torch.device) -> None:
    inputs = {name: t[:0] if name in ("x", "weights", "indices") else t
              for name, t in draw(kernel_device, 2, 32, 32, 3, 1).items()}  # fmt: skip
    got = outputs_and_gradients("triton", inputs)
    assert got["y"].shape == (0, 32) and not got["w_in"].any()


def test_a_row_does_not_see_the_others(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 90, 64, 48, 4, 2, torch.bfloat16)
    others = {**inputs, "x": inputs["x"].clone(), "indices": inputs["indices"].clone()}
    others["x"][50:] *= -2.0
    others["indices"][50:] = others["indices"][50:].flip(0).roll(7, 0)
    with use("triton"), torch.no_grad():
        assert torch.equal(experts(**inputs)[:50], experts(**others)[:50])


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 100, 64, 48, 4, 2, torch.bfloat16)
    first, *others = (outputs_and_gradients("triton", inputs) for _ in range(3 if kernel_device.type == "cuda" else 2))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_weights_wider_than_the_tokens_are_rounded_as_elsewhere(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 40, 32, 32, 3, 2)
    inputs["x"] = inputs["x"].bfloat16()
    got = outputs_and_gradients("triton", inputs)
    assert got["y"].dtype == torch.bfloat16 and got["w_in"].dtype == torch.float32
    assert error(got["y"], outputs_and_gradients("torch", inputs)["y"].double()) < 1e-2


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_can_trace_it(kernel_device: torch.device) -> None:
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in draw(kernel_device, 40, 32, 32, 3, 2).items()}
    experts.load()
    with use("triton"):
        expected = experts(**leaves)
        got = torch.compile(experts, fullgraph=True, backend="aot_eager")(**leaves)
    assert torch.equal(got, expected)
    wanted = [t for t in leaves.values() if t.requires_grad]
    gradients = (torch.autograd.grad(y.sum(), wanted) for y in (got, expected))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_does_not_fit_is_refused(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 2, 2, 4097, 1)
    with use("triton"), pytest.raises(BackendError, match="up to 4096 experts, not 4097"):
        experts(**inputs)


def test_a_gpu_with_little_shared_memory_is_refused(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "shared_memory", lambda device: 65_536)
    with use("triton"), pytest.raises(BackendError, match="needs a GPU with 98,304 bytes .* this one has 65,536"):
        experts(**draw(kernel_device, 2, 8, 8, 3, 1))


def test_a_cpu_is_refused() -> None:
    with use("triton"), pytest.raises(BackendError, match="runs on a GPU, the input is on cpu"):
        experts(**draw(torch.device("cpu"), 2, 8, 8, 3, 1))
