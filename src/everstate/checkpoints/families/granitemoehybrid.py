"""Granite 4 (`model_type` "granitemoehybrid"): Mamba-2 or attention, and after each an MLP that all tokens share, with
experts beside it or without.
"""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes, under
from everstate.checkpoints.families.dialect import (
    ATTENTION,
    ATTENTION_NAMES,
    MAMBA2,
    SSM,
    attention_table,
    attention_written,
    first,
    inverse_written,
    layer_kinds,
    mamba2_table,
    mamba2_written,
    rope,
    tied,
    used,
)
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig
from everstate.models.layout import write_layout


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    d_model, eps = settings.integer("hidden_size"), settings.number("rms_norm_eps", default=1e-6)
    settings.only(hidden_act="silu", normalization_function="rmsnorm")
    settings.ignore("init_method")
    positions = settings.choice("position_embedding_type", default="nope", among={"nope": False, "rope": True})
    rotary = rope(settings)
    kinds = layer_kinds(settings, settings.integer("num_hidden_layers"))
    mlp = _channel(settings)
    channel = mlp["type"]
    layers = [name for kind in kinds for name in (kind, channel)]
    mixers = {
        SSM: mamba2_table(settings, d_model, eps) if SSM in kinds else {},
        ATTENTION: attention_table(
            settings, scale=settings.number("attention_multiplier", default=1.0), **(rotary if positions else {})
        ),
    }
    settings.ignore_all("mamba_")
    settings.ignore("time_step_limit")
    return ModelConfig(
        d_model=d_model,
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used({**mixers, channel: mlp}, layers),
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
        embedding_multiplier=settings.number("embedding_multiplier", default=1.0),
        residual_multiplier=settings.number("residual_multiplier", default=1.0),
        logit_multiplier=1 / settings.positive("logits_scaling", default=1.0),
    )


def _channel(settings: Settings) -> dict[str, Any]:
    """The shared MLP, alone or beside experts."""
    d_shared, d_hidden = settings.integer("shared_intermediate_size", default=1024), settings.take("intermediate_size")
    experts, top_k = settings.count("num_local_experts", default=0), settings.take("num_experts_per_tok")
    if not experts:
        return {"type": "mlp", "d_hidden": d_shared}
    return {
        "type": "moe",
        "nexperts": experts,
        "top_k": top_k,
        "d_hidden": d_hidden,
        "d_shared": d_shared,
        "score": "topk_softmax",
    }


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    ssm, attention = first(blocks, "mamba2"), first(blocks, "attention")
    moe, mlp = first(blocks, "moe"), first(blocks, "mlp")
    rotary = attention is not None and attention["rope_theta"] is not None
    return {
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(blocks) // 2,
        "layer_types": ["mamba" if block["type"] == "mamba2" else block["type"] for block in blocks[::2]],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": inverse_written(config.logit_multiplier),
        "position_embedding_type": "rope" if rotary else "nope",
        **_channel_written(moe or mlp or {}),
        **(attention_written(attention) if attention else {"num_attention_heads": 1}),
        **({"attention_multiplier": attention["scale"]} if attention else {}),
        **({"rope_theta": attention["rope_theta"]} if attention and rotary else {}),
        # transformers checks the widths of Mamba layers that are not there.
        **(mamba2_written(ssm, config.d_model) if ssm else {"mamba_n_heads": 1, "mamba_d_head": 2 * config.d_model}),
    }


def _channel_written(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] == "mlp":
        return {
            "num_local_experts": 0,
            "shared_intermediate_size": block["d_hidden"],
            "intermediate_size": block["d_hidden"],
        }
    return {
        "num_local_experts": block["nexperts"],
        "num_experts_per_tok": block["top_k"],
        "intermediate_size": block["d_hidden"],
        "shared_intermediate_size": block["d_shared"],
    }


EXPERTS: Names = {
    "router": "block_sparse_moe.router.layer",
    "in_proj": "block_sparse_moe.input_linear",
    "out_proj": "block_sparse_moe.output_linear",
}
SHARED: Names = {"in_proj": "shared_mlp.input_linear", "out_proj": "shared_mlp.output_linear"}


def names(config: ModelConfig) -> Names:
    table: Names = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for i, name in enumerate(config.blocks):
        ours, layer = f"blocks.{i}", f"model.layers.{i // 2}"
        kind = config.mixer_table(name)["type"]
        first_half = kind in ("mamba2", "attention")
        table[f"{ours}.norm"] = f"{layer}.{'input_layernorm' if first_half else 'post_attention_layernorm'}"
        match kind:
            case "mamba2":
                table |= under(f"{ours}.mixer", f"{layer}.mamba", MAMBA2)
            case "attention":
                table |= under(f"{ours}.mixer", f"{layer}.self_attn", ATTENTION_NAMES)
            case "moe":
                table |= under(f"{ours}.mixer", layer, EXPERTS) | under(f"{ours}.mixer.shared", layer, SHARED)
            case "mlp":
                table |= under(f"{ours}.mixer", layer, SHARED)
    return table


FAMILY = Family("granitemoehybrid", read, write, names)
