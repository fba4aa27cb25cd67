"""Mamba-3 against logits of published-format checkpoints, which lie beside the checkout where there are any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from everstate.mixers import build_mixer
from everstate.ops import rms_norm

CASES = Path(__file__).parents[3] / "shared" / "parity"


@pytest.mark.parametrize(("A_activation", "expected"), [("heavy_tail", "logits"), ("softplus", "logits_softplus_A")])
@pytest.mark.parametrize("case", ["mamba3-siso", "mamba3-mimo"])
def test_logits(case: str, A_activation: str, expected: str) -> None:
    folder = CASES / case
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    settings = json.loads((folder / "config.json").read_text())
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    wanted = load_file(folder / "expected.safetensors")
    table = {key: value for key, value in settings["ssm_cfg"].items() if key != "layer"}
    x = weights["backbone.embedding.weight"][wanted["input_ids"]]
    for i in range(settings["n_layer"]):
        own = {k.removeprefix(f"backbone.layers.{i}."): v for k, v in weights.items() if f".layers.{i}." in k}
        mixer = build_mixer({"type": "mamba3", **table, "A_activation": A_activation}, settings["d_model"])
        mixer.load_state_dict({k.removeprefix("mixer."): v for k, v in own.items() if k.startswith("mixer.")})
        mixer.requires_grad_(False)
        x = x + mixer(rms_norm(x, own["norm.weight"]), mixer.init_state(len(x)))[0]
        x = x + _gated_mlp(rms_norm(x, own["norm2.weight"]), own["mlp.fc1.weight"], own["mlp.fc2.weight"])
    logits = rms_norm(x, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T
    assert (logits - wanted[expected]).abs().max() <= 2e-4


def _gated_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    value, gate = (x @ up.T).chunk(2, -1)
    return value * silu(gate) @ down.T
