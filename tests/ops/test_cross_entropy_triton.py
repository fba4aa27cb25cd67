"""The Triton kernel of `linear_cross_entropy`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.ops import linear_cross_entropy, use
from everstate.ops.cross_entropy import IGNORE


def draw(device: torch.device, tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::5] = IGNORE
    inputs = {
        "x": normal(tokens, width).to(dtype),
        "weight": 3.0 * normal(vocabulary, width) / width**0.5,
        "bias": normal(vocabulary),
        "targets": targets,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def outcome(backend: str, inputs: dict[str, Tensor], *, share: Tensor | None, **settings: Any) -> dict[str, Tensor]:
    """The loss and its gradients: of the sum, or with `share` of the losses weighted by it."""
    floats = {name: value.requires_grad_() for name, value in inputs.items() if value.is_floating_point()}
    reduction = "sum" if share is None else "none"
    with use(backend):
        loss = linear_cross_entropy(**inputs, reduction=reduction, **settings)
    upstream = torch.full_like(loss, 0.3) if share is None else share.to(loss)
    grads = torch.autograd.grad(loss, list(floats.values()), upstream)
    return {"loss": loss, **dict(zip(floats, grads, strict=True))}


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.detach().double() if v.is_floating_point() else v for name, v in inputs.items()}


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {n: ((got[n].double() - want).norm() / want.norm()).item() for n, want in expected.items()}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize(("vocabulary", "chunk_size"), [(50, 1), (50, 16), (301, None)])
def test_loss_and_gradients(
    vocabulary: int, chunk_size: int | None, summed: bool, softcap: float | None, kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from everstate.ops.cross_entropy import triton as kernel

    monkeypatch.setattr(kernel, "BLOCK", 64)  # several passes of the loop over the vocabulary
    inputs = draw(kernel_device, 37, vocabulary, 8, torch.float32)
    share = None if summed else torch.rand(37, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    settings = {"share": share, "softcap": softcap, "chunk_size": chunk_size}
    expected = outcome("torch", widened(inputs), **settings)
    got = outcome("triton", inputs, **settings)
    assert {name: value.dtype for name, value in got.items()} == dict.fromkeys(got, torch.float32)
    assert max(errors(got, expected).values()) < 2e-6


@pytest.mark.parametrize("summed", [True, False])
def test_bfloat16_errs_no_more_than_the_torch_form(summed: bool, kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 200, 257, 32, torch.bfloat16)
    share = None if summed else torch.rand(200, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    expected = outcome("torch", widened(inputs), share=share)
    theirs = errors(outcome("torch", inputs, share=share, chunk_size=64), expected)
    allowed = 1.2 if kernel_device.type == "cuda" else 2.2  # the interpreter rounds bfloat16 towards zero
    for name, error in errors(outcome("triton", inputs, share=share, chunk_size=64), expected).items():
        assert error <= allowed * theirs[name] + 1e-4, name


def test_the_gradients_of_a_sum_are_rounded_once(kernel_device: torch.device) -> None:
    kernel = pytest.importorskip("everstate.ops.cross_entropy.triton")
    inputs = draw(kernel_device, 37, 50, 8, torch.bfloat16)
    inputs["weight"] = inputs["weight"].to(torch.bfloat16)
    given = (inputs["x"], inputs["weight"], inputs["bias"], inputs["targets"], None, 16, True)
    made = dict(zip(("x", "weight", "bias"), kernel._summed(*given)[1:], strict=True))
    got = outcome("triton", inputs, share=None, chunk_size=16)
    for name, gradient in made.items():
        assert gradient.dtype is torch.float32 and not torch.equal(gradient, gradient.bfloat16().float()), name
        assert got[name].dtype is inputs[name].dtype
        assert torch.equal(got[name], (gradient * torch.tensor(0.3).to(gradient)).to(got[name].dtype)), name


def test_a_compiler_is_told_the_dtypes_of_gradients(kernel_device: torch.device) -> None:
    kernel = pytest.importorskip("everstate.ops.cross_entropy.triton")
    inputs = draw(kernel_device, 9, 50, 8, torch.bfloat16)
    given = (inputs["x"], inputs["weight"], inputs["bias"], inputs["targets"], None, 16, True)
    torch.library.opcheck(kernel._summed._op, given, test_utils="test_faketensor")


def test_ignored_tokens_have_no_loss_and_no_gradient(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 9, 50, 8, torch.float32)
    inputs["targets"][:] = IGNORE
    assert all(not value.any() for value in outcome("triton", inputs, share=None).values())


def test_far_logits_do_not_overflow(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 9, 50, 8, torch.float32)
    inputs["weight"] *= 1000.0
    assert (
        max(errors(outcome("triton", inputs, share=None), outcome("torch", widened(inputs), share=None)).values())
        < 1e-5
    )


def test_the_sum_of_gradients_is_float32(kernel_device: torch.device) -> None:
    """A bfloat16 sum of equal terms stops growing at 256 of them, and here are 1024."""
    x = torch.ones(1024, 8, dtype=torch.bfloat16, device=kernel_device)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, device=kernel_device).requires_grad_()
    targets = torch.zeros(1024, dtype=torch.int64, device=kernel_device)
    with use("triton"):
        loss = linear_cross_entropy(x, weight, targets, chunk_size=8, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient[:, 0].tolist() == [-768.0, 256.0, 256.0, 256.0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_compiler_can_trace_it(reduction: str, kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 9, 50, 8, torch.float32)
    leaves = [value.requires_grad_() for value in inputs.values() if value.is_floating_point()]
    linear_cross_entropy.load()
    with use("triton"):
        expected = linear_cross_entropy(**inputs, reduction=reduction)
        got = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")(**inputs, reduction=reduction)
    assert torch.equal(got, expected)
    pairs = zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_tokens_are_refused(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 9, 50, 8, torch.float32)
    with use("triton"), pytest.raises(BackendError, match="no tokens"):
        linear_cross_entropy(inputs["x"][:0], inputs["weight"], inputs["targets"][:0])
