"""Qwen3.5 and its kin, dense and with experts: as Qwen3-Next, with projections that are published one by one.

`qwen3_5` and `qwen3_5_moe` are published with a vision model, which is skipped; the text model's settings then lie in a
table of their own, and its tensors under `model.language_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes
from everstate.checkpoints.families.dialect import tied
from everstate.checkpoints.families.qwen3_next import COMMON, model_config, model_names, written
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig

VISION = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
SKIPPED = (r"mtp\..*", r"model\.visual\..*")
"""Further tokens, and pictures."""
ARCHITECTURES = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}


def read_text(settings: Settings, shapes: Shapes) -> ModelConfig:
    """The config of the text model alone."""
    experts = settings.count("num_experts", default=0)
    settings.ignore("mtp_num_hidden_layers")
    channels = ["moe" if experts else "mlp"] * settings.integer("num_hidden_layers")
    return model_config(settings, shapes, channels, experts)


def read_nested(settings: Settings, shapes: Shapes) -> ModelConfig:
    """The config of the text model in that of the whole."""
    settings.ignore(*VISION)
    text = settings.nested("text_config")
    config = read_text(text, {})
    text.closed()
    tie = tied(settings, shapes, "lm_head.weight", default=config.tie_embeddings)
    return config.model_copy(update={"tie_embeddings": tie})


def write(model_type: str, config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    """The published config of one of the four kinds."""
    table = written(config, blocks)
    text = {"model_type": f"{model_type.removesuffix('_text')}_text", **table}
    whole = text if model_type.endswith("_text") else {"text_config": text}
    return {
        **whole,
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "tie_word_embeddings": config.tie_embeddings,
    }


def delta_names(settings: Mapping[str, Any]) -> Names:
    """The names of a delta layer whose projections are published one by one."""
    own = {
        "in_proj": "in_proj_qkv",
        "gate_proj.up": "in_proj_z",
        "beta_proj": "in_proj_b",
        "decay_proj.up": "in_proj_a",
    }
    return {**own, **COMMON}


def _names(prefix: str, config: ModelConfig) -> Names:
    return model_names(config, prefix, delta_names)


def _family(model_type: str) -> Family:
    """One of the four kinds; either way to name the tensors is understood."""
    nested = not model_type.endswith("_text")
    prefix = "model.language_model" if nested else "model"
    other = r"^model\.(?!language_model\.|visual\.)" if nested else r"^model\.language_model\."
    return Family(
        model_type,
        read_nested if nested else read_text,
        partial(write, model_type),
        partial(_names, prefix),
        skipped=SKIPPED,
        aliases=((other, f"{prefix}."),),
    )


QWEN3_5, QWEN3_5_TEXT = _family("qwen3_5"), _family("qwen3_5_text")
QWEN3_5_MOE, QWEN3_5_MOE_TEXT = _family("qwen3_5_moe"), _family("qwen3_5_moe_text")
