"""The fused loss: torch's own cross entropy, in value and gradient, without its memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from everstate.ops import linear_cross_entropy
from everstate.ops.cross_entropy import IGNORE
from tests.largest import Largest


def draw(tokens: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::5] = IGNORE
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("chunk_size", [1, 16, 37, 1000, None])
def test_value_and_gradients_are_those_of_torch(chunk_size: int | None) -> None:
    x, weight, targets = draw(37, 50, 8)
    expected = cross_entropy(linear(x, weight), targets, ignore_index=IGNORE, reduction="none")
    loss = linear_cross_entropy(x, weight, targets, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected)
    assert (loss[::5] == 0).all()
    share = torch.rand(37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((loss * share).sum(), (x, weight))
    torch.testing.assert_close(got, torch.autograd.grad((expected * share).sum(), (x, weight)))


def test_a_batch_of_ignored_tokens_has_no_loss_and_no_gradient() -> None:
    x, weight, targets = draw(6, 9, 4)
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE)).sum()
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.abs().max() == weight.grad.abs().max() == 0


def test_no_tensor_ever_holds_the_logits_of_more_than_a_chunk() -> None:
    tokens, vocabulary, width, chunk = 512, 300, 4, 16
    x, weight, targets = draw(tokens, vocabulary, width)
    with Largest() as largest:
        linear_cross_entropy(x, weight, targets, chunk_size=chunk).sum().backward()
    assert largest.elements == chunk * vocabulary


def test_what_waits_for_the_backward_pass_is_no_larger_than_the_inputs() -> None:
    x, weight, targets = draw(512, 300, 4)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x, weight, targets)
    assert saved
    assert max(saved) == x.numel()


def test_a_loss_of_bfloat16_is_float32_and_so_is_the_sum_of_its_gradients() -> None:
    """A bfloat16 sum of equal terms stops growing at 256 of them, and here are 1024."""
    x, weight = torch.ones(1024, 2, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.zeros(1024, dtype=torch.int64), chunk_size=1)
    assert loss.dtype is torch.float32
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    assert gradient.dtype is torch.bfloat16
    assert gradient[:, 0].tolist() == [-768.0, 256.0, 256.0, 256.0]
