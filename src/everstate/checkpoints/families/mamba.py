"""Mamba-1 as transformers publishes it (`model_type` "mamba"): state-spaces/mamba-130m-hf and its kin."""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes
from everstate.checkpoints.families.dialect import MAMBA1, backbone_names, expand_written, tied
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    return mamba1_model(settings, tied(settings, shapes, "lm_head.weight", default=True), {})


def mamba1_model(settings: Settings, tie: bool, norms: dict[str, Any]) -> ModelConfig:
    """The keys that Mamba and Falcon-Mamba share; `norms` are the settings of those on dt, B and C."""
    d_model = settings.integer("hidden_size", "d_model")
    expand = settings.number("expand", default=2.0)
    ssm = {
        "type": "mamba1",
        "d_inner": settings.integer("intermediate_size", "d_inner", default=int(expand * d_model)),
        "d_state": settings.integer("state_size", default=16),
        "d_conv": settings.integer("conv_kernel", default=4),
        "dt_rank": settings.take("time_step_rank", default="auto"),
        "bias": settings.flag("use_bias", default=False),
        "conv_bias": settings.flag("use_conv_bias", default=True),
        **norms,
    }
    settings.only(hidden_act="silu", rms_norm=True, ssm_cfg={})
    return ModelConfig(
        d_model=d_model,
        vocab_size=settings.integer("vocab_size"),
        layout=f"{settings.integer('num_hidden_layers', 'n_layer')} * ssm",
        mixers={"ssm": ssm},
        norm_eps=settings.number("layer_norm_epsilon", default=1e-5),
        tie_embeddings=tie,
    )


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    ssm = blocks[0]
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(blocks),
        "intermediate_size": ssm["d_inner"],
        "expand": expand_written(ssm["d_inner"], config.d_model),
        "state_size": ssm["d_state"],
        "conv_kernel": ssm["d_conv"],
        "time_step_rank": ssm["dt_rank"],
        "use_bias": ssm["bias"],
        "use_conv_bias": ssm["conv_bias"],
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


def names(config: ModelConfig) -> Names:
    return backbone_names(config, {"mamba1": MAMBA1})


FAMILY = Family("mamba", read, write, names, tokenizers=((50280, "EleutherAI/gpt-neox-20b"),))
