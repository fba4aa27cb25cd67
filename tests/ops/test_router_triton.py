"""The Triton kernel of `topk_router`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.kernels import overlapping
from everstate.ops import Normed, topk_router, use
from tests.ops.reference import exact, undivided

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 2},
    "softmax, normalised": {"top_k": 3, "normalise": True, "scale": 2.5},
    "softmax of the best": {"top_k": 4, "score": "topk_softmax"},
    "sigmoid": {"top_k": 1, "score": "sigmoid"},
    "sigmoid, bias": {"top_k": 4, "score": "sigmoid", "bias": True, "normalise": True, "eps": 0.5},
    "groups": {"top_k": 3, "score": "sigmoid", "bias": True, "ngroups": 4, "topk_groups": 2},
    "all groups": {"top_k": 3, "ngroups": 4, "topk_groups": 4},
}


def draw(device: torch.device, tokens: int, width: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    return normal(tokens, width).to(device, dtype), (normal(count, width) * width**-0.5).to(device)


def with_bias(settings: dict[str, Any], count: int, device: torch.device) -> dict[str, Any]:
    bias = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(device)
    return {**settings, "bias": bias} if settings.get("bias") else settings


@pytest.mark.parametrize(("tokens", "width", "count"), [(1, 96, 8), (3, 70, 20), (2, 2100, 12)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_agrees_with_the_definition(
    settings: dict[str, Any], tokens: int, width: int, count: int, kernel_device: torch.device
) -> None:
    x, weight = draw(kernel_device, tokens, width, count, torch.bfloat16)
    settings = with_bias(settings, count, kernel_device)
    with torch.no_grad():
        with use("triton"):
            weights, indices = topk_router(x, weight, **settings)
        expected, chosen = exact(topk_router, x, weight, **settings)
    assert weights.dtype is torch.float32 and indices.dtype is torch.int64
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "parts"), [(1, 3), (3, 1), (5, 35)])
def test_rows_that_a_norm_has_left_undivided(tokens: int, parts: int, kernel_device: torch.device) -> None:
    x, weight = draw(kernel_device, tokens, 70, 20, torch.bfloat16)
    x = undivided(x, parts, eps=0.1)
    with torch.no_grad(), use("triton"):
        weights, indices = topk_router(x, weight, top_k=3)
    expected, chosen = exact(topk_router, x, weight, top_k=3)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_that_lie_otherwise_in_memory(kernel_device: torch.device) -> None:
    x, weight = draw(kernel_device, 3, 70, 20, torch.float32)
    with torch.no_grad(), use("triton"):
        got = topk_router(x.T.contiguous().T, weight, top_k=3)
        expected = topk_router(x, weight, top_k=3)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        with pytest.raises(BackendError, match="in one piece of memory"):
            topk_router(Normed(x, torch.ones(3, 6).to(x)[:, ::2], 1e-5), weight, top_k=3)


def test_many_tokens_choose_as_each_alone(kernel_device: torch.device) -> None:
    x, weight = draw(kernel_device, 6, 64, 16, torch.float32)
    with torch.no_grad(), use("triton"):
        together = topk_router(x.view(2, 3, 64), weight, top_k=4)
        alone = [topk_router(row, weight, top_k=4) for row in x]
    for which, both in enumerate(together):
        assert both.shape == (2, 3, 4)
        assert torch.equal(both.flatten(0, 1), torch.stack([each[which] for each in alone]))


def test_a_second_call_finds_its_counters_as_they_were(kernel_device: torch.device) -> None:
    x, weight = draw(kernel_device, 2, 64, 16, torch.float32)
    with torch.no_grad(), use("triton"), overlapping() as kept:
        first = topk_router(x, weight, top_k=2)
        assert all(not counter.any() for counter in kept.values())
        for one, other in zip(first, topk_router(x, weight, top_k=2), strict=True):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_a_token_of_no_numbers_chooses_experts_that_there_are(kernel_device: torch.device) -> None:
    x, weight = draw(kernel_device, 1, 64, 5, torch.float32)
    with torch.no_grad(), use("triton"):
        weights, indices = topk_router(x * torch.nan, weight, top_k=3, normalise=True)
    assert weights.isnan().all()
    assert sorted(indices[0].tolist()) == indices[0].unique().tolist()
    assert ((indices >= 0) & (indices < 5)).all()


def test_no_expert_is_chosen_twice(kernel_device: torch.device) -> None:
    x, weight = draw(kernel_device, 1, 64, 6, torch.float32)
    bias = torch.tensor([-torch.inf] * 5 + [0.0], device=kernel_device)
    with torch.no_grad(), use("triton"):
        _, indices = topk_router(x, weight, top_k=3, score="sigmoid", bias=bias)
    assert indices[0, 0] == 5
    assert len(indices.unique()) == 3


@pytest.mark.parametrize(
    ("tokens", "count", "top_k", "sentence"),
    [(65, 8, 2, "takes 1 to 64 tokens, not 65"), (1, 40, 33, "32 of them for a token")],
)
def test_what_it_does_not_take(tokens: int, count: int, top_k: int, sentence: str, kernel_device: torch.device) -> None:
    x, weight = draw(kernel_device, tokens, 16, count, torch.float32)
    with torch.no_grad(), use("triton"), pytest.raises(BackendError, match=sentence):
        topk_router(x, weight, top_k=top_k)


def test_gradients_come_from_pytorch(kernel_device: torch.device) -> None:
    x, weight = draw(kernel_device, 2, 16, 8, torch.float32)
    with use("triton"), pytest.raises(BackendError, match="has no gradient"):
        topk_router(x, weight.requires_grad_(), top_k=2)
    weights, _ = topk_router(x, weight, top_k=2)
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), [weight])
    assert gradient.abs().sum() > 0
