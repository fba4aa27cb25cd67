"""Functions that launch kernels as operators of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from everstate.core.kernels import KernelOp, kernel_op


class Watching(TorchDispatchMode):
    """Names all operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(operation.name())
        return operation(*args, **(kwargs or {}))


def scaled(x: Tensor, weight: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    y = x * factor if weight is None else x * weight * factor
    return y, y.sum(-1)


def pieces(x: Tensor, factor: float) -> list[Tensor]:
    return [x * factor, x * 2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])
    ctx.factor = inputs[2]


def _differentiate(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    assert ctx.needs_input_grad[:2] == (True, weight is not None) and y.shape == x.shape
    d = (dy + dsum.unsqueeze(-1)) * ctx.factor
    return d if weight is None else d * weight, None if weight is None else (d * x).flatten(0, -2).sum(0), None


@pytest.fixture(scope="module")
def op() -> KernelOp:
    made = kernel_op("scaled_of_a_test")(scaled)
    made.register_autograd(_differentiate, setup_context=_save)
    return made


@pytest.fixture(scope="module")
def listed() -> KernelOp:
    made = kernel_op("pieces_of_a_test")(pieces)
    made.register_autograd(lambda ctx, grads: (grads[0] * ctx.factor + grads[1] * 2, None), setup_context=_keep)
    return made


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.factor = inputs[1]


def outcome(function: Any, *inputs: Tensor | None) -> list[Tensor]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    made = function(*leaves, 1.5)
    upstream = [torch.ones_like(t).cumsum(0) for t in made]
    return [*made, *torch.autograd.grad(list(made), [t for t in leaves if t is not None], upstream)]


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients(op: KernelOp, weighted: bool) -> None:
    x, weight = torch.randn(3, 4), torch.randn(4) if weighted else None
    torch.testing.assert_close(outcome(op, x, weight), outcome(scaled, x, weight))


def test_gradients_of_lists(listed: KernelOp) -> None:
    x = torch.randn(3, 4)
    torch.testing.assert_close(outcome(listed, x), outcome(pieces, x))


def test_the_dispatcher_is_asked_where_somebody_looks_on(op: KernelOp) -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    y, _ = op(x, weight, 1.5)
    assert "scaled_of_a_test" in type(y.grad_fn).__name__
    for grad in (True, False):
        with Watching() as watching, torch.set_grad_enabled(grad):
            op(x, weight, 1.5)
        assert "everstate::scaled_of_a_test" in watching.seen


def test_nothing_is_kept_without_gradients(op: KernelOp) -> None:
    with torch.no_grad():
        assert op(torch.randn(3, 4, requires_grad=True), None, 1.5)[0].grad_fn is None
    assert op(torch.randn(3, 4), None, 1.5)[0].grad_fn is None
