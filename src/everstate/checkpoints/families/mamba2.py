"""Mamba-2 as transformers publishes it (`model_type` "mamba2"), Codestral-Mamba among it."""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes
from everstate.checkpoints.families.dialect import (
    MAMBA2,
    backbone_names,
    dt_limit,
    expand_written,
    limit_written,
    tied,
    without_none,
)
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    d_model, headdim = settings.integer("hidden_size"), settings.integer("head_dim", default=64)
    nheads = settings.integer("num_heads", default=128)
    expand = settings.number("expand", default=2.0)
    if nheads * headdim != int(expand * d_model):
        raise settings.error(f"num_heads {nheads} * head_dim {headdim} is not expand {expand} * hidden_size {d_model}")
    eps = settings.number("layer_norm_epsilon", default=1e-5)
    settings.only(hidden_act="silu", rms_norm=True)
    ssm = {
        "type": "mamba2",
        "d_inner": nheads * headdim,
        "headdim": headdim,
        "d_state": settings.integer("state_size", default=128),
        "ngroups": settings.integer("n_groups", default=8),
        "d_conv": settings.integer("conv_kernel", default=4),
        "dt_limit": dt_limit(settings),
        "bias": settings.flag("use_bias", default=False),
        "conv_bias": settings.flag("use_conv_bias", default=True),
        "norm_eps": eps,
    }
    # Codestral says norm_before_gate = true and neither its authors' code nor transformers does it.
    settings.ignore("time_step_rank", "norm_before_gate")
    settings.only(intermediate_size=nheads * headdim)
    return ModelConfig(
        d_model=d_model,
        vocab_size=settings.integer("vocab_size"),
        layout=f"{settings.integer('num_hidden_layers')} * ssm",
        mixers={"ssm": ssm},
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
    )


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    ssm = blocks[0]
    return without_none(
        {
            "model_type": "mamba2",
            "architectures": ["Mamba2ForCausalLM"],
            "hidden_size": config.d_model,
            "vocab_size": config.vocab_size,
            "num_hidden_layers": len(blocks),
            "num_heads": ssm["d_inner"] // ssm["headdim"],
            "head_dim": ssm["headdim"],
            "expand": expand_written(ssm["d_inner"], config.d_model),
            "state_size": ssm["d_state"],
            "n_groups": ssm["ngroups"],
            "conv_kernel": ssm["d_conv"],
            "time_step_limit": limit_written(ssm["dt_limit"]),
            "use_bias": ssm["bias"],
            "use_conv_bias": ssm["conv_bias"],
            "hidden_act": "silu",
            "layer_norm_epsilon": config.norm_eps,
            "rms_norm": True,
            "residual_in_fp32": True,
            "tie_word_embeddings": config.tie_embeddings,
        }
    )


def names(config: ModelConfig) -> Names:
    return backbone_names(config, {"mamba2": MAMBA2})


FAMILY = Family("mamba2", read, write, names)
