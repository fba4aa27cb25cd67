"""Bamba (`model_type` "bamba"): Mamba-2 and some attention that rotates half of each head, with an MLP after each."""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes
from everstate.checkpoints.families.dialect import (
    ATTENTION,
    ATTENTION_NAMES,
    MAMBA2,
    SSM,
    SWIGLU,
    attention_table,
    attention_written,
    first,
    layer_kinds,
    layer_names,
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
    d_model, eps = settings.integer("hidden_size"), settings.number("rms_norm_eps", default=1e-5)
    settings.only(hidden_act="silu")
    settings.ignore("z_loss_coefficient")
    kinds = layer_kinds(settings, settings.integer("num_hidden_layers"))
    layers = [name for kind in kinds for name in (kind, "mlp")]
    # The fraction is in the config only since transformers 5; some configs have the width, and old ones neither.
    width, heads = settings.take("attn_rotary_emb"), settings.peek("num_attention_heads", default=1)
    fraction = 0.5 if width is None else width * heads / d_model
    mixers = {
        SSM: mamba2_table(settings, d_model, eps) if SSM in kinds else {},
        ATTENTION: attention_table(settings, **rope(settings, default_fraction=fraction)),
        "mlp": {
            "type": "mlp",
            "d_hidden": settings.integer("intermediate_size"),
            "bias": settings.flag("mlp_bias", default=False),
        },
    }
    settings.ignore_all("mamba_")
    settings.ignore("time_step_limit")
    return ModelConfig(
        d_model=d_model,
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used(mixers, layers),
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
    )


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    ssm, attention, mlp = first(blocks, "mamba2"), first(blocks, "attention"), first(blocks, "mlp")
    layers = blocks[::2]
    return {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(layers),
        "attn_layer_indices": [i for i, block in enumerate(layers) if block["type"] == "attention"],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **({"intermediate_size": mlp["d_hidden"], "mlp_bias": mlp["bias"]} if mlp else {}),
        **(attention_written(attention) if attention else {"num_attention_heads": 1}),
        **({"rope_theta": attention["rope_theta"]} if attention else {}),
        **({"partial_rotary_factor": attention["rotary_fraction"]} if attention else {}),
        **(mamba2_written(ssm, config.d_model) if ssm else {}),
    }


PLACES: dict[str, tuple[str, Names]] = {
    "mamba2": ("mamba", MAMBA2),
    "attention": ("self_attn", ATTENTION_NAMES),
    "mlp": ("feed_forward", SWIGLU),
}


def names(config: ModelConfig) -> Names:
    return layer_names(config, PLACES)


FAMILY = Family("bamba", read, write, names)
