"""The attention layer: defaults, capacity, positions, and settings that cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from everstate.core.errors import ConfigError, RequestError
from everstate.core.packing import Packing
from everstate.mixers import Mixer, build_mixer
from everstate.ops import Rope, attention


def build(d_model: int = 16, **settings: Any) -> Mixer:
    return build_mixer({"type": "attention", **settings}, d_model, dtype=torch.float64)


@pytest.mark.parametrize(
    ("d_model", "settings", "heads"),
    [
        (16, {}, (1, 1, 16)),
        (100, {}, (1, 1, 100)),
        (200, {}, (2, 2, 100)),
        (768, {}, (12, 12, 64)),
        (768, {"head_dim": 128}, (6, 6, 128)),
        (768, {"nheads": 4, "nheads_kv": 2}, (4, 2, 192)),
        (768, {"nheads": 8, "head_dim": 128}, (8, 8, 128)),
    ],
)
def test_default_heads_fit_any_width(d_model: int, settings: dict[str, Any], heads: tuple[int, int, int]) -> None:
    mixer = build_mixer({"type": "attention", **settings}, d_model, device="meta")
    assert (mixer.nheads, mixer.nheads_kv, mixer.head_dim) == heads
    assert mixer.q_proj.weight.shape == (heads[0] * heads[2], d_model)
    assert mixer.v_proj.weight.shape == (heads[1] * heads[2], d_model)


@pytest.mark.parametrize(
    ("settings", "context", "capacity"),
    [
        ({}, None, 4096),
        ({"context": 32}, None, 32),
        ({"context": 32}, 100, 100),
        ({}, 0, 0),
        ({"window": 8}, None, 8),
        ({"window": 8}, 100, 8),
        ({"window": 8}, 5, 5),
        ({"window": 8}, 0, 0),
    ],
)
def test_capacity(settings: dict[str, Any], context: int | None, capacity: int) -> None:
    state = build(**settings).init_state(2, context=context)
    assert state.k.shape == state.v.shape == (2, capacity, 1, 16)
    assert state.pos.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nheads": 3}, "nheads = 3 does not divide d_model = 16"),
        ({"head_dim": 5}, "head_dim = 5 does not divide d_model = 16"),
        ({"nheads": 4, "nheads_kv": 3}, "nheads_kv = 3 does not divide nheads = 4"),
        ({"rope_theta": 1e4, "rotary_fraction": 0.2}, "is 3 numbers, and pairs are rotated"),
        ({"rotary_fraction": 1.5}, "rotary_fraction"),
        ({"window": 0}, "window"),
        ({"windows": 4}, "did you mean 'window'"),
    ],
)
def test_what_cannot_be_built(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**settings)


def test_a_full_state_is_an_error_in_both_modes() -> None:
    mixer, x = build(), torch.ones(1, 5, 16, dtype=torch.float64)
    _, state = mixer(x, mixer.init_state(1, context=5))
    for read in (lambda: mixer(x, state), lambda: mixer.step_(x[:, 0], state)):
        with pytest.raises(RequestError, match=r"holds 5, .* make the state with init_state\(batch, context=N\)"):
            read()


@pytest.mark.parametrize("settings", [{"rope_theta": 100.0}, {"rope_theta": 100.0, "window": 4}, {"window": 4}])
def test_without_a_state_the_answer_is_the_same(settings: dict[str, Any]) -> None:
    """The fast way to train: one segment, nothing remembered."""
    mixer = build(**settings)
    x = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    remembering, _ = mixer(x, mixer.init_state(2, context=11))
    y, state = mixer(x, mixer.init_state(2, context=0))
    torch.testing.assert_close(y, remembering)
    assert state.pos.tolist() == [11, 11]


def test_rotary_positions_count_from_the_start_of_each_packed_sequence() -> None:
    mixer = build(rope_theta=100.0)
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twice, state = mixer(torch.cat([x, x], 1), mixer.init_state(2, context=6), Packing.of_lengths([6, 6]))
    torch.testing.assert_close(twice[:, 6:], twice[:, :6])
    torch.testing.assert_close(state.k[1], state.k[0])


def test_positions_matter_only_with_rotary_positions() -> None:
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    for theta, matters in ((None, False), (100.0, True)):
        mixer = build(**({"rope_theta": theta} if theta else {}))
        first, second = (mixer(u, mixer.init_state(1, context=0))[0][:, 2:] for u in (x, swapped))
        assert torch.allclose(first, second) is not matters


def test_flops_count_what_is_seen() -> None:
    full, window = (build(nheads=2, **more) for more in ({}, {"window": 8}))
    assert full.flops_per_token(100) == 2 * 4 * 16 * 16 + 4 * 16 * 100
    assert window.flops_per_token(100) == 2 * 4 * 16 * 16 + 4 * 16 * 8


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def read(mixer: Mixer) -> torch.Tensor:
    y: torch.Tensor = mixer(X, mixer.init_state(2))[0]
    return y


def test_multipliers_are_those_of_the_weights() -> None:
    table = {"nheads": 2, "bias": True}
    mixer = build(**table, in_multiplier=1.1, key_multiplier=0.5, out_multiplier=0.9)
    folded = build(**table)
    with torch.no_grad():
        for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj):
            linear.bias.normal_(generator=torch.Generator().manual_seed(1))
        folded.load_state_dict(mixer.state_dict())
        for linear in (folded.q_proj, folded.k_proj, folded.v_proj):
            linear.weight *= 1.1
        for tensor in (folded.k_proj.weight, folded.k_proj.bias):
            tensor *= 0.5
        for tensor in (folded.out_proj.weight, folded.out_proj.bias):
            tensor *= 0.9
    torch.testing.assert_close(read(mixer), read(folded))


def test_the_output_gate_scales_what_was_attended_to() -> None:
    mixer = build(nheads=2, output_gate=True)
    plain = build(nheads=2)
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if "gate" not in k})
    plain.out_proj = torch.nn.Identity()
    torch.testing.assert_close(read(mixer), mixer.out_proj(read(plain) * mixer.gate_proj(X).sigmoid()))


def test_a_norm_of_all_heads_is_one_norm_and_its_weight_may_be_added_to_one() -> None:
    mixer = build(nheads=2, nheads_kv=1, qk_norm="full", qk_norm_kind="rms1p")
    assert mixer.q_norm.weight.shape == (16,) and mixer.k_norm.weight.shape == (8,)
    with torch.no_grad():
        mixer.q_norm.weight.normal_(generator=torch.Generator().manual_seed(1))
    q = mixer.q_proj(X)
    q = q * (q.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + mixer.q_norm.weight)
    got, _, _ = mixer._heads(mixer.q_proj(X), mixer.k_proj(X), mixer.v_proj(X))
    torch.testing.assert_close(got.flatten(-2), q)


def test_the_convolution_runs_over_queries_keys_and_values_before_the_heads() -> None:
    mixer = build(nheads=2, d_conv=3, rope_theta=100.0)
    plain = build(nheads=2, rope_theta=100.0)
    q, k, v = (linear(X) for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    padded = torch.nn.functional.pad(torch.cat([q, k, v], -1).mT, (2, 0))
    convolved = torch.nn.functional.conv1d(padded, mixer.conv_weight.unsqueeze(1), mixer.conv_bias, groups=48).mT
    heads = (t.unflatten(-1, (2, 8)) for t in convolved.split(16, -1))
    wanted = mixer.out_proj(attention(*heads, plain.init_state(2), rope=Rope(100.0))[0].flatten(-2))
    torch.testing.assert_close(read(mixer), wanted)
