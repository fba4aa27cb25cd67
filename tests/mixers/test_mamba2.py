"""Mamba-2: a width of its own, and multipliers, which are those of the weights."""

from __future__ import annotations

import torch

from everstate.mixers import build_mixer

TABLE = {"type": "mamba2", "d_state": 8, "headdim": 8, "d_inner": 24, "ngroups": 3, "bias": True}


def test_a_width_that_is_no_multiple_of_the_model() -> None:
    mixer = build_mixer(TABLE, 16, device="meta")
    assert mixer.out_proj.weight.shape == (16, 24)
    assert mixer.nheads == 3


def test_multipliers_are_those_of_the_weights() -> None:
    factors = (0.5, 0.6, 0.7, 0.8, 0.9)
    mixer = build_mixer(
        {**TABLE, "in_multiplier": 1.2, "multipliers": factors, "out_multiplier": 0.4}, 16, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    folded = build_mixer(TABLE, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.in_proj.bias.normal_(generator=generator)
        mixer.out_proj.bias.normal_(generator=generator)
        folded.load_state_dict(mixer.state_dict())
        scale = torch.cat([torch.full((n,), m) for n, m in zip((24, 24, 24, 24, 3), factors, strict=True)]).double()
        folded.in_proj.weight *= 1.2 * scale[:, None]
        folded.in_proj.bias *= scale
        folded.out_proj.weight *= 0.4
        folded.out_proj.bias *= 0.4
    x = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, mixer.init_state(2))[0], folded(x, folded.init_state(2))[0])
