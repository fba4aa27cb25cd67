"""Jamba (`model_type` "jamba"): Mamba-1 with learned norms on dt, B and C, some attention without positions, and after
each an MLP or experts.
"""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes
from everstate.checkpoints.families.dialect import (
    ATTENTION,
    ATTENTION_NAMES,
    MAMBA1,
    SSM,
    SWIGLU,
    attention_table,
    attention_written,
    expand_written,
    first,
    layer_kinds,
    layer_names,
    tied,
    used,
)
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig
from everstate.models.layout import write_layout

MIXER: Names = {**MAMBA1, "dt_norm": "dt_layernorm", "B_norm": "b_layernorm", "C_norm": "c_layernorm"}
EXPERTS: Names = {
    "router": "router",
    "in_proj": ("experts.{}.gate_proj", "experts.{}.up_proj"),
    "out_proj": "experts.{}.down_proj",
}


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    d_model, eps = settings.integer("hidden_size"), settings.number("rms_norm_eps", default=1e-6)
    settings.only(hidden_act="silu")
    settings.ignore("calc_logits_for_entire_prompt")
    n_layer = settings.integer("num_hidden_layers")
    layers = [
        name for pair in zip(_kinds(settings, n_layer), _channels(settings, n_layer), strict=True) for name in pair
    ]
    d_hidden, experts = (
        settings.integer("intermediate_size"),
        settings.integer("num_experts", "num_local_experts", default=16),
    )
    moe = {"type": "moe", "nexperts": experts, "d_hidden": d_hidden, "score": "softmax_topk", "normalise": False}
    mixers = {
        SSM: _mamba(settings, d_model, eps),
        ATTENTION: attention_table(settings, window=settings.take("sliding_window")),
        "mlp": {"type": "mlp", "d_hidden": d_hidden},
        "moe": {**moe, "top_k": settings.integer("num_experts_per_tok", default=2)},
    }
    return ModelConfig(
        d_model=d_model,
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used(mixers, layers),
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
    )


def _kinds(settings: Settings, n_layer: int) -> list[str]:
    """What each layer begins with: from the list of types, or attention once in every period."""
    period, offset = settings.integer("attn_layer_period", default=8), settings.count("attn_layer_offset", default=4)
    if "layers_block_type" in settings or "layer_types" in settings:
        return layer_kinds(settings, n_layer)
    return [ATTENTION if i % period == offset else SSM for i in range(n_layer)]


def _channels(settings: Settings, n_layer: int) -> list[str]:
    """What each layer ends with: experts once in every period, where there is more than one."""
    period, offset = (
        settings.integer("expert_layer_period", default=2),
        settings.count("expert_layer_offset", default=1),
    )
    counts = settings.indices("layers_num_experts")
    if counts is None:
        one = settings.peek("num_experts", "num_local_experts", default=16) == 1
        counts = [1 if one or i % period != offset else 2 for i in range(n_layer)]
    return ["mlp" if count == 1 else "moe" for count in counts]


def _mamba(settings: Settings, d_model: int, eps: float) -> dict[str, Any]:
    return {
        "type": "mamba1",
        "d_inner": int(settings.number("mamba_expand", default=2.0) * d_model),
        "d_state": settings.integer("mamba_d_state", default=16),
        "d_conv": settings.integer("mamba_d_conv", default=4),
        "dt_rank": settings.take("mamba_dt_rank", default="auto"),
        "conv_bias": settings.flag("mamba_conv_bias", default=True),
        "bias": settings.flag("mamba_proj_bias", default=False),
        "dt_bc_norm": "learned" if settings.flag("mamba_inner_layernorms", default=True) else "none",
        "dt_bc_norm_eps": eps,
    }


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    ssm, attention = first(blocks, "mamba1"), first(blocks, "attention")
    mlp, moe = first(blocks, "mlp"), first(blocks, "moe")
    channel = mlp or moe or {}
    return {
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(blocks) // 2,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "intermediate_size": channel["d_hidden"],
        "num_experts": moe["nexperts"] if moe else 1,
        "num_experts_per_tok": moe["top_k"] if moe else 1,
        **_period("attn_layer", [block["type"] == "attention" for block in blocks[::2]]),
        **_period("expert_layer", [block["type"] == "moe" for block in blocks[1::2]]),
        **(attention_written(attention) if attention else {"num_attention_heads": 1}),
        **(_mamba_written(ssm, config.d_model) if ssm else {}),
        "sliding_window": attention["window"] if attention else None,
    }


def _period(name: str, chosen: list[bool]) -> dict[str, int]:
    """The period and the offset of the chosen layers; whether they are regular is seen when the config is read back."""
    at = [i for i, yes in enumerate(chosen) if yes]
    if not at:
        return {f"{name}_period": len(chosen) + 1, f"{name}_offset": len(chosen)}
    period = at[1] - at[0] if len(at) > 1 else len(chosen)
    return {f"{name}_period": period, f"{name}_offset": at[0]}


def _mamba_written(ssm: dict[str, Any], d_model: int) -> dict[str, Any]:
    return {
        "mamba_expand": expand_written(ssm["d_inner"], d_model),
        "mamba_d_state": ssm["d_state"],
        "mamba_d_conv": ssm["d_conv"],
        "mamba_dt_rank": ssm["dt_rank"],
        "mamba_conv_bias": ssm["conv_bias"],
        "mamba_proj_bias": ssm["bias"],
        **({} if ssm["dt_bc_norm"] == "learned" else {"mamba_inner_layernorms": False}),
    }


PLACES: dict[str, tuple[str, Names]] = {
    "mamba1": ("mamba", MIXER),
    "attention": ("self_attn", ATTENTION_NAMES),
    "mlp": ("feed_forward", SWIGLU),
    "moe": ("feed_forward", EXPERTS),
}


def names(config: ModelConfig) -> Names:
    return layer_names(config, PLACES)


FAMILY = Family("jamba", read, write, names)
