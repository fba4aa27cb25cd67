"""Configs with the keys that published ones have (`configs.json`, some cut to fewer layers), and one setting in all its
spellings.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from everstate.checkpoints.families import FAMILIES
from everstate.checkpoints.families.describe import described, differences
from everstate.checkpoints.families.settings import Settings
from everstate.checkpoints.published import family_of, read_config
from everstate.core.errors import CheckpointError
from everstate.models import ModelConfig

CONFIGS = json.loads((Path(__file__).parent / "configs.json").read_text())


def read(name: str, **changes: Any) -> ModelConfig:
    """A config, with other values; None takes a key out."""
    table = {key: value for key, value in {**CONFIGS[name], **changes}.items() if value is not None}
    return read_config(family_of(table, Path("config.json")), table, {}, "config.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_published_keys_are_understood(name: str) -> None:
    assert read(name).d_model >= 768


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("codestral-hf", [
            {"time_step_limit": limit} for limit in ([0.0, 1e30], [0.0, {"__float__": "Infinity"}], None)
        ]),
        ("bamba-9b", [
            {"attn_rotary_emb": None},
            {"attn_rotary_emb": None, "partial_rotary_factor": 0.5},
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"attn_layer_indices": None, "layers_block_type": [
                "full_attention" if i in (9, 18, 27) else "linear_attention" for i in range(32)
            ]},
            {"mamba_d_head": "auto"},
        ]),
        ("nemotron-h-8b", [
            {"hybrid_override_pattern": None, "layers_block_type": [
                "mamba", "mlp", "linear_attention", "mlp", "mamba", "attention", "mlp"
            ]},
            {"layer_norm_epsilon": None},
            {"attention_head_dim": None, "head_dim": 128},
            {"time_step_limit": [0.001, 0.1], "time_step_min": 0.5},
        ]),
        ("granite-4.0-h-tiny", [
            {"layer_types": ["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 4},
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
            {"layer_types": None, "attn_layer_indices": [5]},
        ]),
        ("jamba-v0.1", [
            {"mamba_dt_rank": "auto"},
            {"attn_layer_period": None, "attn_layer_offset": None, "layers_block_type": [
                "attention" if i % 8 == 4 else "mamba" for i in range(32)
            ]},
        ]),
        ("lfm2-1.2b", [{"full_attn_idxs": None, "layer_types": ["conv", "conv", "full_attention", "conv"]}]),
        ("qwen3-next", [
            {"full_attention_interval": None, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
            {"rope_theta": None, "partial_rotary_factor": None, "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25
            }},
        ]),
        ("olmo-hybrid", [{"fla_hybrid_attention_indices": None}, {"rope_parameters": None}]),
        ("mamba-130m-hf", [
            {"intermediate_size": None}, {"d_inner": None}, {"hidden_size": None}, {"time_step_rank": "auto"}
        ]),
    ],
)  # fmt: skip
def test_one_setting_in_all_its_spellings(name: str, spellings: list[dict[str, Any]]) -> None:
    for spelling in spellings:
        assert differences(read(name), read(name, **spelling)) == [], spelling


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba-130m-hf", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented"),
        ("mamba-130m-hf", {"intermediate_size": 1000}, "are one setting with two values"),
        ("mamba-130m-hf", {"state_size": "many"}, "state_size = 'many' is no positive whole number"),
        ("mamba-130m-hf", {"time_step_rank": 2.5}, "dt_rank"),
        ("codestral-hf", {"num_heads": 100}, "is not expand"),
        ("codestral-hf", {"rms_norm": False}, "rms_norm = False is not implemented"),
        ("jamba-v0.1", {"rope_scaling": {"type": "yarn"}}, "rope_scaling = .* does not know"),
        ("bamba-9b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of type 'yarn'"),
        ("bamba-9b", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is given as"),
        ("bamba-9b", {"attn_layer_indices": None, "layer_types": ["mamba"]}, "layer_types has 1 layers and not 32"),
        ("granite-4.0-h-tiny", {"layer_types": ["mamba"] * 9 + ["rwkv"]}, "layer_types has 'rwkv'"),
        ("granite-4.0-h-tiny", {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi' is not"),
        ("granite-4.0-h-tiny", {"normalization_function": "layernorm"}, "normalization_function = 'layernorm'"),
        ("nemotron-h-8b", {"hybrid_override_pattern": "M-X"}, "names 'X'"),
        ("nemotron-h-8b", {"num_hidden_layers": 8}, "num_hidden_layers is not the 7 layers"),
        ("nemotron-h-8b", {"mlp_hidden_act": "tanh"}, "mlp_hidden_act = 'tanh' is not implemented"),
        ("falcon-h1", {"projectors_bias": True}, "projectors_bias and mamba_proj_bias differ"),
        ("qwen3-next", {"layer_types": ["linear_attention"] * 3}, "layer_types has 3 layers and not 4"),
        ("kimi-linear", {"mla_use_nope": False}, "mla_use_nope = False is not implemented"),
        ("kimi-linear", {"linear_attn_config": {"kda_layers": [1], "full_attn_layers": [2]}}, "not name each layer"),
        ("mamba2-130m", {"ssm_cfg": {"layer": "Mamba9"}}, "layer = 'Mamba9' is not implemented"),
        ("mamba2-130m", {"ssm_cfg": {"layer": "Mamba2", "spin": 2}}, "config.json: ssm_cfg: spin = 2 is a setting"),
        ("mamba2-130m", {"d_model": None}, "model_type None is not implemented"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(name, **changes)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


def test_bounds_of_dt_reach_the_layers() -> None:
    config = read("codestral-hf", time_step_limit=[0.01, 0.2])
    assert described(config)[0]["dt_limit"] == (0.01, 0.2)
    assert described(read("codestral-hf"))[0]["dt_limit"] == (0.0, math.inf)


NONSENSE = ("x", -1, 0, 1.5, [1, [2]], ["x"], {"a": 1}, True, 1e400)
LAWS = sorted((Path(__file__).parents[1] / "laws" / "families").glob("*.json"))


@pytest.mark.parametrize("file", LAWS, ids=lambda path: path.stem)
def test_nonsense_in_any_key_is_an_error_in_one_line_if_it_is_one(file: Path) -> None:
    table = next(iter(json.loads(file.read_text()).values()))
    shapes = {name: tuple(shape) for name, shape in table.pop("shapes", {}).items()}
    for key in [*table, "rope_theta", "rope_parameters", "rope_scaling", "layer_types", "time_step_limit"]:
        for value in NONSENSE:
            try:
                read_config(FAMILIES[file.stem], {**table, key: value}, shapes, "config.json")
            except CheckpointError as error:
                assert "\n" not in str(error), (key, value)


def test_a_null_inside_takes_the_positions_away() -> None:
    inside = {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}
    for config in (read("olmo-hybrid"), read("olmo-hybrid", rope_theta=500000.0, **inside)):
        assert described(config)[6]["rope_theta"] is None
    config = read("olmo-hybrid", rope_theta=500000.0, rope_parameters=None)
    assert described(config)[6]["rope_theta"] == 500000.0


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(CheckpointError, match="model_type 'mamba9' is not implemented; did you mean 'mamba'"):
        family_of({"model_type": "mamba9"}, Path("config.json"))
    with pytest.raises(CheckpointError, match="model_type 'zamba2' is left out"):
        family_of({"model_type": "zamba2"}, Path("config.json"))


def test_a_switch_that_is_off_and_an_empty_key_say_nothing() -> None:
    settings = Settings({"use_wings": False, "wings": None, "feathers": []})
    settings.closed()
    for value in (2, 0, 0.0, "", True):
        with pytest.raises(CheckpointError, match="wings = .* is a setting that Everstate does not know"):
            Settings({"wings": value}).closed()
