"""Falcon-H1 (`model_type` "falcon_h1"): attention and Mamba-2 side by side, an MLP after both, and multipliers."""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes, under
from everstate.checkpoints.families.dialect import (
    ATTENTION_NAMES,
    MAMBA2,
    SWIGLU,
    attention_table,
    attention_written,
    mamba2_table,
    mamba2_written,
    rope,
    tied,
)
from everstate.checkpoints.families.settings import Settings
from everstate.core.errors import CheckpointError
from everstate.models import ModelConfig

ONES = (1.0, 1.0, 1.0, 1.0, 1.0)


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    d_model, eps = settings.integer("hidden_size"), settings.number("rms_norm_eps", default=1e-5)
    settings.only(hidden_act="silu", mamba_use_mlp=True, attn_layer_indices=None)
    settings.ignore("mlp_expansion_factor", "z_loss_coefficient")
    mixer = {"type": "parallel", "mixers": {"ssm": _mamba(settings, d_model, eps), "attn": _attention(settings)}}
    gate, down = settings.numbers("mlp_multipliers", default=(1.0, 1.0))
    mlp = {
        "type": "mlp",
        "d_hidden": settings.integer("intermediate_size"),
        "bias": settings.flag("mlp_bias", default=False),
        "gate_multiplier": gate,
        "out_multiplier": down,
    }
    return ModelConfig(
        d_model=d_model,
        vocab_size=settings.integer("vocab_size"),
        layout=f"{settings.integer('num_hidden_layers')} * (mixer mlp)",
        mixers={"mixer": mixer, "mlp": mlp},
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
        embedding_multiplier=settings.number("embedding_multiplier", default=1.0),
        logit_multiplier=settings.number("lm_head_multiplier", default=1.0),
    )


def _mamba(settings: Settings, d_model: int, eps: float) -> dict[str, Any]:
    table = mamba2_table(settings, d_model, eps)
    if settings.flag("projectors_bias", default=table["bias"]) != table["bias"]:
        raise settings.error(
            "projectors_bias and mamba_proj_bias differ, which is not implemented; Everstate has both or none"
        )
    return {
        **table,
        "norm": settings.flag("mamba_rms_norm", default=False),
        "norm_before_gate": settings.flag("mamba_norm_before_gate", default=False),
        "in_multiplier": settings.number("ssm_in_multiplier", default=1.0),
        "multipliers": settings.numbers("ssm_multipliers", default=ONES),
        "out_multiplier": settings.number("ssm_out_multiplier", default=1.0),
    }


def _attention(settings: Settings) -> dict[str, Any]:
    return attention_table(
        settings,
        **rope(settings),
        in_multiplier=settings.number("attention_in_multiplier", default=1.0),
        key_multiplier=settings.number("key_multiplier", default=1.0),
        out_multiplier=settings.number("attention_out_multiplier", default=1.0),
    )


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    if len(blocks) < 2 or [block["type"] for block in blocks[:2]] != ["parallel", "mlp"]:
        raise CheckpointError(f"layout {config.layout!r} is none of falcon_h1; write it as 'everstate'")
    ssm, attention, mlp = blocks[0]["mixers"]["ssm"], blocks[0]["mixers"]["attn"], blocks[1]
    return {
        "model_type": "falcon_h1",
        "architectures": ["FalconH1ForCausalLM"],
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(blocks) // 2,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "embedding_multiplier": config.embedding_multiplier,
        "lm_head_multiplier": config.logit_multiplier,
        "intermediate_size": mlp["d_hidden"],
        "mlp_bias": mlp["bias"],
        "mlp_multipliers": [mlp["gate_multiplier"], mlp["out_multiplier"]],
        **_attention_written(attention),
        **mamba2_written(ssm, config.d_model),
        "mamba_d_ssm": ssm["d_inner"],
        "projectors_bias": ssm["bias"],
        "mamba_rms_norm": ssm["norm"],
        "mamba_norm_before_gate": ssm["norm_before_gate"],
        "ssm_in_multiplier": ssm["in_multiplier"],
        "ssm_multipliers": list(ssm["multipliers"] or ONES),
        "ssm_out_multiplier": ssm["out_multiplier"],
    }


def _attention_written(attention: dict[str, Any]) -> dict[str, Any]:
    return {
        **attention_written(attention),
        "head_dim": attention["head_dim"],
        "rope_theta": attention["rope_theta"],
        "attention_in_multiplier": attention["in_multiplier"],
        "key_multiplier": attention["key_multiplier"],
        "attention_out_multiplier": attention["out_multiplier"],
    }


def names(config: ModelConfig) -> Names:
    table: Names = {"embedding": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"}
    for i in range(0, len(config.blocks), 2):
        layer = f"model.layers.{i // 2}"
        table[f"blocks.{i}.norm"] = f"{layer}.input_layernorm"
        table[f"blocks.{i + 1}.norm"] = f"{layer}.pre_ff_layernorm"
        table |= under(f"blocks.{i}.mixer.mixers.ssm", f"{layer}.mamba", MAMBA2)
        table |= under(f"blocks.{i}.mixer.mixers.attn", f"{layer}.self_attn", ATTENTION_NAMES)
        table |= under(f"blocks.{i + 1}.mixer", f"{layer}.feed_forward", SWIGLU)
    return table


FAMILY = Family("falcon_h1", read, write, names)
