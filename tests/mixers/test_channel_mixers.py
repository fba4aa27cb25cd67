"""MLP, experts and mixers side by side: formulas written out, defaults, and settings that cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu

from everstate.core.errors import ConfigError
from everstate.mixers import build_mixer

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def build(kind: str, d_model: int = 16, **settings: Any) -> Any:
    return build_mixer({"type": kind, **settings}, d_model, dtype=torch.float64)


def test_swiglu() -> None:
    mixer = build("mlp")
    gate, up = linear(X, mixer.in_proj.weight).chunk(2, -1)
    torch.testing.assert_close(mixer(X, mixer.init_state(2))[0], linear(silu(gate) * up, mixer.out_proj.weight))


@pytest.mark.parametrize(
    ("d_model", "settings", "width"),
    [(16, {}, 48), (768, {}, 2048), (1024, {}, 2736), (16, {"gated": False}, 64), (16, {"d_hidden": 7}, 7)],
)
def test_default_width(d_model: int, settings: dict[str, Any], width: int) -> None:
    mixer = build_mixer({"type": "mlp", **settings}, d_model, device="meta")
    assert mixer.out_proj.weight.shape == (d_model, width)


def test_experts_are_routed_and_the_shared_one_sees_every_token() -> None:
    mixer = build("moe", nexperts=3, top_k=3, score="sigmoid", normalise=False, routed_scale=2.0, d_shared=8)
    y, _ = mixer(X, mixer.init_state(2))
    expected = mixer.shared.read(X)
    shares = linear(X, mixer.router.weight).sigmoid() * 2.0
    for i in range(3):
        gate, up = linear(X, mixer.in_proj.weight[i]).chunk(2, -1)
        expected = expected + shares[..., i : i + 1] * linear(silu(gate) * up, mixer.out_proj.weight[i])
    torch.testing.assert_close(y, expected)


def test_the_correction_bias_chooses_the_expert_and_is_saved() -> None:
    mixer = build("moe", nexperts=3, top_k=1, score="sigmoid", normalise=False, correction_bias=True)
    assert "router_bias" in mixer.state_dict()
    assert "router_bias" not in dict(mixer.named_parameters())
    mixer.router_bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    y, _ = mixer(X, mixer.init_state(2))
    gate, up = linear(X, mixer.in_proj.weight[1]).chunk(2, -1)
    share = linear(X, mixer.router.weight[1:2]).sigmoid()
    torch.testing.assert_close(y, share * linear(silu(gate) * up, mixer.out_proj.weight[1]))


def test_flops_of_experts_are_those_of_the_active_ones() -> None:
    mixer = build("moe", nexperts=8, top_k=2, d_hidden=10, d_shared=6)
    assert mixer.flops_per_token(0) == mixer.flops_per_token(10**6) == 2 * (8 * 16 + 2 * 3 * 10 * 16 + 3 * 6 * 16)


def test_side_by_side_is_the_sum() -> None:
    table = {"ssm": {"type": "mamba2", "d_state": 8, "headdim": 8}, "attn": {"type": "attention", "window": 3}}
    mixer = build("parallel", mixers=table)
    y, state = mixer(X, mixer.init_state(2))
    parts = [mixer.mixers[name](X, mixer.mixers[name].init_state(2)) for name in table]
    torch.testing.assert_close(y, parts[0][0] + parts[1][0])
    torch.testing.assert_close(state, tuple(after for _, after in parts))
    assert [name for name, _ in mixer.named_children()] == ["mixers"]
    assert mixer.flops_per_token(9) == sum(mixer.mixers[name].flops_per_token(9) for name in table)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("mlp", {"activation": "relu"}, "activation"),
        ("moe", {"nexperts": 2, "top_k": 3}, "top_k 3 is more than nexperts 2"),
        ("moe", {"top_k": 1}, "the router could not learn"),
        ("moe", {"top_k": 1, "score": "topk_softmax", "normalise": False}, "the router could not learn"),
        ("parallel", {"mixers": {}}, "no mixers"),
        ("parallel", {}, "'mixers' is missing"),
        ("parallel", {"mixers": {"a.b": {"type": "mlp"}}}, "cannot be called 'a.b'"),
        ("parallel", {"mixers": {"keys": {"type": "mlp"}}}, "cannot be called 'keys'"),
        ("parallel", {"mixers": {"a": {"type": "mpl"}}}, "did you mean 'mlp'"),
        ("parallel", {"mixers": {"a": {"type": "mlp", "hidden": 3}}}, "unknown key 'hidden'"),
    ],
)
def test_what_cannot_be_built(kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(kind, **settings)


def test_multipliers_of_an_mlp_are_those_of_its_weights() -> None:
    mixer = build("mlp", gate_multiplier=0.6, out_multiplier=0.4)
    folded = build("mlp")
    folded.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        folded.in_proj.weight[: folded.in_proj.weight.shape[0] // 2] *= 0.6
        folded.out_proj.weight *= 0.4
    torch.testing.assert_close(mixer.read(X), folded.read(X))
    with pytest.raises(ConfigError, match="gate_multiplier was given and gated is false"):
        build("mlp", gated=False, gate_multiplier=0.5)


def test_latent_experts_work_between_two_projections_and_the_shared_one_beside_them() -> None:
    mixer = build("moe", nexperts=4, top_k=2, d_hidden=6, d_latent=10, d_shared=8, shared_gate=True)
    plain = build("moe", d_model=10, nexperts=4, top_k=2, d_hidden=6)
    plain.in_proj.load_state_dict(mixer.in_proj.state_dict())
    plain.out_proj.load_state_dict(mixer.out_proj.state_dict())
    low = mixer.latent_in(X)
    with torch.no_grad():  # a router that gives the latent tokens the logits of the whole ones
        solved = torch.linalg.lstsq(low.flatten(0, 1), linear(X, mixer.router.weight).flatten(0, 1)).solution
        plain.router.weight.copy_(solved.T)
    torch.testing.assert_close(linear(low, plain.router.weight), linear(X, mixer.router.weight))
    expected = mixer.latent_out(plain.read(low)) + mixer.shared.read(X) * mixer.shared_gate(X).sigmoid()
    torch.testing.assert_close(mixer.read(X), expected)
    with pytest.raises(ConfigError, match="there is no shared expert"):
        build("moe", shared_gate=True)


def test_the_router_stays_in_float32() -> None:
    mixer = build_mixer({"type": "moe", "nexperts": 4, "top_k": 2}, 16, dtype=torch.bfloat16)
    assert mixer.router.weight.dtype is torch.float32
    assert mixer.in_proj.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nexperts": 8, "ngroups": 3}, "ngroups = 3 does not divide nexperts = 8"),
        ({"nexperts": 8, "ngroups": 2, "topk_groups": 3}, "topk_groups 3 is more than ngroups 2"),
        ({"nexperts": 8, "ngroups": 4, "topk_groups": 1, "top_k": 3}, "of which 2 can be chosen from"),
    ],
)
def test_groups_that_cannot_be_chosen_from(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("moe", **settings)
