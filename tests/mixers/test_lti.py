"""The three modes of a time-invariant layer are one layer: outputs, states, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import ConfigError
from everstate.core.state import map_state, tensors
from everstate.mixers import build_mixer

LAYERS: list[dict[str, Any]] = [
    {"type": "s4", "d_state": 64},
    {"type": "s4d", "init": "lin"},
    {"type": "s4d", "init": "inv", "discretization": "bilinear"},
    {"type": "s4d", "init": "legs"},
    {"type": "h3", "d_state": 16, "headdim": 2},
]


def everything(table: dict[str, Any], length: int) -> list[Tensor]:
    """Outputs, final state, and gradients of inputs, initial state and parameters; that state is not zero."""
    generator = torch.Generator().manual_seed(1)
    normal = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    mixer = build_mixer(table, 4, dtype=torch.float64)
    x = normal((2, length, 4)).requires_grad_()
    state = map_state(lambda t: normal(t.shape).mul(0.1).requires_grad_(), mixer.init_state(2))
    y, after = mixer(x, state)
    total = y.square().sum() + sum(t.square().sum() for t in tensors(after))
    return [y, *tensors(after), *torch.autograd.grad(total, [x, *tensors(state), *mixer.parameters()])]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("table", LAYERS, ids=lambda t: "-".join(map(str, t.values())))
def test_three_modes_are_one(table: dict[str, Any], length: int) -> None:
    expected = everything({**table, "mode": "recurrence"}, length)
    for mode in ("convolution", "scan"):
        for got, wanted in zip(everything({**table, "mode": mode}, length), expected, strict=True):
            assert (got - wanted).abs().max() <= 1e-10 * max(wanted.abs().max().item(), 1.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"type": "s4", "d_state": 5}, "s4: d_state = 5 is odd"),
        ({"type": "s4d", "init": "hippo"}, "'lin', 'inv' or 'legs'"),
        ({"type": "s4d", "mode": "fft"}, "'recurrence', 'convolution' or 'scan'"),
        ({"type": "h3", "headdim": 3}, "headdim = 3 does not divide d_model = 4"),
        ({"type": "s5", "d_state": 6, "blocks": 4}, "blocks = 4 does not divide d_state = 6"),
        ({"type": "s5", "d_state": 6, "blocks": 2}, "d_state / blocks = 3 is odd"),
        ({"type": "bidirectional", "mixer": {"type": "s5", "d_stat": 4}}, "did you mean 'd_state'"),
    ],
)
def test_what_cannot_be_built_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_mixer(table, 4)
