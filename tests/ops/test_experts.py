"""Experts: routing in small cases worked out by hand, and tokens that share an expert."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch import Tensor

from everstate.ops import experts, route, use
from everstate.ops.activations import activate

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64)
TOTAL = exp(1) + exp(3) + exp(2) + exp(0)


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"score": "softmax_topk"}, [exp(3) / TOTAL, exp(2) / TOTAL]),
        ({"score": "softmax_topk", "normalise": True}, [exp(3) / (exp(3) + exp(2)), exp(2) / (exp(3) + exp(2))]),
        ({"score": "topk_softmax"}, [exp(3) / (exp(3) + exp(2)), exp(2) / (exp(3) + exp(2))]),
        ({"score": "sigmoid"}, [sigmoid(3), sigmoid(2)]),
        (
            {"score": "sigmoid", "normalise": True, "scale": 2.5},
            [2.5 * sigmoid(3) / (sigmoid(3) + sigmoid(2)), 2.5 * sigmoid(2) / (sigmoid(3) + sigmoid(2))],
        ),
    ],
)
def test_weights_worked_out_by_hand(settings: dict[str, object], expected: list[float]) -> None:
    weights, indices = route(LOGITS, top_k=2, **settings)
    assert indices.tolist() == [[1, 2]]
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-14)


def test_the_bias_selects_and_has_no_say_in_the_weights() -> None:
    weights, indices = route(LOGITS, top_k=2, score="sigmoid", bias=torch.tensor([0.0, -1.0, 0.0, 1.0]))
    assert indices.tolist() == [[3, 2]]
    assert weights[0].tolist() == pytest.approx([sigmoid(0), sigmoid(2)], rel=1e-14)


def test_scores_that_underflow_give_no_nan() -> None:
    weights, _ = route(torch.full((1, 3), -1e4), top_k=2, score="sigmoid", normalise=True)
    assert weights.tolist() == [[0.0, 0.0]]


def test_routing_of_low_precision_logits_is_done_in_float32() -> None:
    weights, _ = route(LOGITS.to(torch.bfloat16), top_k=2)
    assert weights.dtype is torch.float32


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_two_tokens_and_two_experts_by_hand(backend: str) -> None:
    """Expert 0 doubles, expert 1 squares what is positive of three times its input; no gate."""
    w_in, w_out = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[[1.0]], [[1.0]]])
    x = torch.tensor([[1.0], [-1.0]])
    weights, indices = torch.tensor([[0.5, 0.25], [1.0, 1.0]]), torch.tensor([[1, 0], [1, 1]])
    with use(backend):
        y = experts(x, weights, indices, w_in, w_out, activation="relu2", gated=False)
    assert y.tolist() == [[0.5 * 9.0 + 0.25 * 4.0], [0.0]]


def test_an_expert_that_nobody_chose_has_a_zero_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    w_in = torch.randn(3, 8, 5, generator=generator).requires_grad_()
    w_out = torch.randn(3, 5, 4, generator=generator).requires_grad_()
    y = experts(torch.randn(6, 5, generator=generator), torch.ones(6, 1), torch.full((6, 1), 2), w_in, w_out)
    y.sum().backward()
    used: list[Tensor] = [w_in.grad, w_out.grad]
    assert [bool(g[i].abs().sum() > 0) for g in used for i in range(3)] == [False, False, True] * 2


def test_activations() -> None:
    h = torch.tensor([-1.0, 2.0, 3.0, -0.5], dtype=torch.float64)
    assert activate(h, "relu2", False).tolist() == [0.0, 4.0, 9.0, 0.0]
    expected = [-1.0 * sigmoid(-1.0) * 3.0, 2.0 * sigmoid(2.0) * -0.5]
    assert activate(h, "silu", True).tolist() == pytest.approx(expected, rel=1e-14)
    exact, tanh = activate(h, "gelu", False), activate(h, "gelu_tanh", False)
    assert exact[1].item() == pytest.approx(1.9544997361036416, rel=1e-14)
    assert tanh[1].item() == pytest.approx(1.9545976940877752, rel=1e-14)


def test_experts_outside_the_best_groups_are_not_chosen() -> None:
    """Against a search through all pairs of groups, with scores of both signs."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    bias = torch.randn(12, generator=generator, dtype=torch.float64)
    weights, indices = route(logits, top_k=4, score="sigmoid", bias=bias, ngroups=4, topk_groups=2)
    for token, chosen, given in zip(logits, indices, weights, strict=True):
        chances = (token.sigmoid() + bias).view(4, 3)
        value = lambda group, chances=chances: chances[group].sort().values[-2:].sum()
        kept = sorted(range(4), key=value)[-2:]
        allowed = [3 * group + i for group in kept for i in range(3)]
        wanted = sorted(allowed, key=lambda i, chances=chances: chances.flatten()[i])[-4:]
        assert sorted(chosen.tolist()) == sorted(wanted)
        torch.testing.assert_close(given, token.sigmoid()[chosen])


def test_the_sum_of_the_weights_may_be_held_above_zero() -> None:
    weights, _ = route(LOGITS, top_k=2, score="sigmoid", normalise=True, eps=0.5)
    total = sigmoid(3) + sigmoid(2) + 0.5
    torch.testing.assert_close(weights[0], torch.tensor([sigmoid(3) / total, sigmoid(2) / total], dtype=torch.float64))
