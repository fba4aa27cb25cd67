"""Attention, MLP and experts against checkpoints in published formats, which lie beside the checkout if at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from everstate.mixers import build_mixer
from everstate.ops import rms_norm

CASES = Path(__file__).parents[3] / "shared" / "parity"
Weights = dict[str, Tensor]


def read(case: str) -> tuple[Weights, Weights]:
    folder = CASES / case
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")


def run(table: dict[str, Any], weights: Weights, x: Tensor) -> Tensor:
    mixer = build_mixer(table, x.shape[-1]).requires_grad_(False)
    mixer.load_state_dict(weights)
    y: Tensor = mixer(x, mixer.init_state(len(x)))[0]
    return y


def projections(weights: Weights, prefix: str) -> Weights:
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
    return {f"{ours}.weight": weights[f"{prefix}{theirs}.weight"] for ours, theirs in names.items()}


def gated(weights: Weights, prefix: str) -> Weights:
    gate, up, down = (weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return {"in_proj.weight": torch.cat([gate, up]), "out_proj.weight": down}


def test_granite_rotates_scales_and_has_swiglu() -> None:
    weights, wanted = read("granite-attn-rope-tied")
    table = {"type": "attention", "nheads": 4, "nheads_kv": 2, "rope_theta": 1e4, "scale": 0.125}
    for i in (0, 1):
        own = f"model.layers.{i}."
        x = wanted[f"hidden.{i}"]
        u = rms_norm(x, weights[f"{own}input_layernorm.weight"])
        x = x + 0.7 * run(table, projections(weights, f"{own}self_attn."), u)
        mlp = {f"{ours}_proj.weight": weights[f"{own}shared_mlp.{ours}put_linear.weight"] for ours in ("in", "out")}
        u = rms_norm(x, weights[f"{own}post_attention_layernorm.weight"])
        x = x + 0.7 * run({"type": "mlp", "d_hidden": 48}, mlp, u)
        torch.testing.assert_close(x, wanted[f"hidden.{i + 1}"], rtol=0, atol=1e-5)


def test_bamba_rotates_half_of_each_head() -> None:
    weights, wanted = read("bamba-attn-untied")
    own, x = "model.layers.2.", wanted["hidden.2"]
    table = {"type": "attention", "nheads": 2, "nheads_kv": 1, "rope_theta": 1e4, "rotary_fraction": 0.5}
    u = rms_norm(x, weights[f"{own}input_layernorm.weight"])
    x = x + run(table, projections(weights, f"{own}self_attn."), u)
    u = rms_norm(x, weights[f"{own}pre_ff_layernorm.weight"])
    x = x + run({"type": "mlp", "d_hidden": 48}, gated(weights, f"{own}feed_forward."), u)
    torch.testing.assert_close(x, wanted["hidden.3"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 4])
def test_nemotron_routes_by_sigmoid_with_a_correction_bias(layer: int) -> None:
    weights, wanted = read("nemotron_h-moe")
    own, x = f"backbone.layers.{layer}.", wanted[f"hidden.{layer}"]
    stack = lambda name: torch.stack([weights[f"{own}mixer.experts.{j}.{name}_proj.weight"] for j in range(8)])
    table = {
        "type": "moe", "nexperts": 8, "top_k": 3, "d_hidden": 24, "activation": "relu2", "gated": False,
        "score": "sigmoid", "routed_scale": 2.5, "correction_bias": True, "d_shared": 40,
    }  # fmt: skip
    mine = {
        "router.weight": weights[f"{own}mixer.gate.weight"],
        "router_bias": weights[f"{own}mixer.gate.e_score_correction_bias"],
        "in_proj.weight": stack("up"),
        "out_proj.weight": stack("down"),
        "shared.in_proj.weight": weights[f"{own}mixer.shared_experts.up_proj.weight"],
        "shared.out_proj.weight": weights[f"{own}mixer.shared_experts.down_proj.weight"],
    }
    y = run(table, mine, rms_norm(x, weights[f"{own}norm.weight"]))
    torch.testing.assert_close(x + y, wanted[f"hidden.{layer + 1}"], rtol=0, atol=1e-5)
