"""Mamba-3: published shapes, initial values, settings that cannot be built."""

from __future__ import annotations

import pytest
import torch

from everstate.core.errors import ConfigError
from everstate.mixers import build_mixer
from everstate.ops.mamba3.ends import heavy_tail


def test_the_shapes_of_the_published_mimo_layer() -> None:
    table = {"type": "mamba3", "d_state": 16, "headdim": 8, "is_mimo": True, "mimo_rank": 4}
    shapes = {name: tuple(p.shape) for name, p in build_mixer(table, 32, device="meta").named_parameters()}
    assert shapes == {
        "in_proj.weight": (284, 32), "dt_bias": (8,), "B_bias": (8, 4, 16), "C_bias": (8, 4, 16),
        "B_norm.weight": (16,), "C_norm.weight": (16,), "D": (8,), "mimo_x": (8, 4, 8), "mimo_z": (8, 4, 8),
        "mimo_o": (8, 4, 8), "out_proj.weight": (32, 64),
    }  # fmt: skip


def test_initial_values() -> None:
    mixer = build_mixer({"type": "mamba3", "is_mimo": True, "mimo_rank": 4, "out_norm": True}, 64)
    values = dict(mixer.named_parameters())
    ones = ("B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "D", "mimo_z", "norm.weight")
    assert all((values[name] == 1).all() for name in ones)
    assert all((values[name] == 0.25).all() for name in ("mimo_x", "mimo_o"))
    dt = torch.nn.functional.softplus(values["dt_bias"])
    assert ((dt > 0.99e-3) & (dt < 0.101)).all()


@pytest.mark.parametrize(("fraction", "pairs"), [(0.5, 2), (1.0, 5)])
def test_an_even_number_of_entries_turns(fraction: float, pairs: int) -> None:
    mixer = build_mixer({"type": "mamba3", "d_state": 10, "rope_fraction": fraction}, 64)
    assert mixer.init_state(1).angle.shape[-1] == pairs


def test_the_heavy_tail_is_smooth_and_positive() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = heavy_tail(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0.25, 0.5, 1.0, 2.0, 3.0]
    assert slope.tolist() == [1 / 16, 1 / 4, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("floor", "forgets"), [(1e-4, False), (1e7, True)])
def test_every_head_forgets_at_least_as_fast_as_the_floor(floor: float, forgets: bool) -> None:
    mixer = build_mixer({"type": "mamba3", "d_state": 4, "headdim": 8, "A_floor": floor}, 8, dtype=torch.float64)
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together, _ = mixer(x, mixer.init_state(1))
    alone, _ = mixer(x.transpose(0, 1), mixer.init_state(9))
    assert torch.allclose(together, alone.transpose(0, 1), rtol=0, atol=1e-12) == forgets


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"headdim": 48}, "headdim = 48 does not divide d_inner = 128"),
        ({"ngroups": 3}, "ngroups = 3 does not divide nheads = 2"),
        ({"rope_fraction": 0.25}, "rope_fraction = 0.25 is not allowed; give 0.5 or 1.0"),
        ({"d_state": 2}, "even d_state of at least 2 / rope_fraction"),
        ({"d_state": 7}, "even d_state"),
        ({"A_activation": "exp"}, "'softplus' or 'heavy_tail'"),
        ({"mimo_rnak": 2}, "did you mean 'mimo_rank'"),
    ],
)
def test_settings_that_cannot_be_built(setting: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_mixer({"type": "mamba3", **setting}, 64)
