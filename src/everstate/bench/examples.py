"""Arguments of an op as a GPU is measured with them: in lower precision, cut into sequences, and as calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from everstate.bench.peer_ops import Run, is_number
from everstate.core.packing import Packing
from everstate.core.state import map_state, named_tensors
from everstate.ops.example import Example

LOW = ("x", "B", "C", "z", "projected", "q", "k", "v", "w_in", "w_out")
"""Arguments that a model trained in bfloat16 computes in it."""
Call = Callable[[], object]


def in_precision(state: Any, dtype: torch.dtype) -> Any:
    """A pool of states in another precision, all but angles and positions."""
    if isinstance(state, Tensor):
        return state.to(dtype)
    named = state._asdict().items()
    return type(state)(*(part if name in ("angle", "pos") else part.to(dtype) for name, part in named))


def widen(value: Any) -> Any:
    """An argument, or each part of a layer's parameters, in float64 or complex128."""
    if isinstance(value, tuple):  # a NamedTuple
        return type(value)(*(widen(part) for part in value))
    if not isinstance(value, Tensor) or not is_number(value):
        return value
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def lower(example: Example) -> Example:
    """The example with the activations of a model, and weights of its products, in bfloat16."""
    low = lambda given: {name: value.to(torch.bfloat16) if name in LOW else value for name, value in given.items()}
    return example._replace(timed=low(example.timed), fixed=low(example.fixed))


def first(example: Example, tokens: int) -> Example:
    """The first tokens of an example."""
    return example._replace(timed={name: value[:, :tokens] for name, value in example.timed.items()})


def cut(example: Example, batch: int) -> Example:
    """One row of tokens as `batch` rows, or packed ones as so many sequences, all from the same state."""
    repeat = lambda t: t.repeat_interleave(batch, 0)
    state = None if example.state is None else map_state(repeat, example.state)
    if "packing" in example.fixed:
        packing = Packing.of_lengths([example.fixed["packing"].total // batch] * batch)
        return example._replace(state=state, fixed={**example.fixed, "packing": packing})
    timed = {name: value[0].unflatten(0, (batch, -1)) for name, value in example.timed.items()}
    return example._replace(timed=timed, state=state)


def calls(function: Run, example: Example) -> tuple[Call, Call]:
    """Forward without gradients, and forward with backward."""
    leaves = differentiable(example)
    with torch.no_grad():
        upstream = [torch.randn_like(output) for output in function(example)]

    def forward() -> None:
        with torch.no_grad():
            function(example)

    def both() -> None:
        torch.autograd.grad(function(example), leaves, upstream, allow_unused=True)

    return forward, both


def outcome(run: Run, example: Example, *, outputs: int | None = None) -> list[Tensor]:
    """The first `outputs` that the op returns, or all, and what their random gradients say of all arguments.

    The random numbers depend on nothing but the shapes.
    """
    leaves, returned = differentiable(example), run(example)[:outputs]
    generator = torch.Generator(device=returned[0].device).manual_seed(0)
    # In the precision that all can hold: every form begins with the same numbers.
    draw = partial(torch.randn, generator=generator, device=returned[0].device, dtype=torch.bfloat16)
    upstream = [draw(output.shape).to(output.dtype) for output in returned]
    return [*returned, *torch.autograd.grad(returned, leaves, upstream, materialize_grads=True)]


def exactly(example: Example) -> Example:
    """The example in float64."""
    wide = lambda given: {name: widen(value) for name, value in given.items()}
    state = None if example.state is None else map_state(widen, example.state)
    return example._replace(timed=wide(example.timed), fixed=wide(example.fixed), state=state)


def differentiable(example: Example) -> list[Tensor]:
    """All tensors of an example that are not indices, made to want gradients."""
    return [tensor.requires_grad_() for tensor in arguments(example).values()]


def arguments(example: Example) -> dict[str, Tensor]:
    """Those by name."""
    state = {} if example.state is None else dict(named_tensors(example.state, "state"))
    given: dict[str, Any] = {**example.timed, **state, **example.fixed}
    return {name: value for name, value in given.items() if isinstance(value, Tensor) and is_number(value)}
