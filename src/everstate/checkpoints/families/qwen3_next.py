"""Qwen3-Next (`model_type` "qwen3_next"): Gated DeltaNet, gated attention in every fourth layer, and experts.

The projections of the delta layers are published per key head, `[q | k | v | z]` and `[b | a]` of one head after the
other, and those of attention `[q | gate]` of one head after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from everstate.checkpoints.families.base import Blocks, Family, Names, Part, Shapes, convolution, under
from everstate.checkpoints.families.dialect import (
    ATTENTION,
    ATTENTION_NAMES,
    SWIGLU,
    attention_table,
    attention_written,
    first,
    kinds_of,
    rope,
    tied,
    used,
)
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig
from everstate.models.layout import write_layout

DELTA = "delta"
KINDS = {"linear_attention": DELTA, "full_attention": ATTENTION}
SILENT = (
    "mamba_ssm_dtype",
    "attn_output_gate",
    "use_sliding_window",
    "max_window_layers",
    "mtp_use_dedicated_embeddings",
)
"""Keys that say nothing, or what is so in every model of the family."""

EXPERTS: Names = {
    "router": "gate",
    "in_proj": ("experts.{}.gate_proj", "experts.{}.up_proj"),
    "out_proj": "experts.{}.down_proj",
    "shared_gate": "shared_expert_gate",
    **under("shared", "shared_expert", SWIGLU),
}


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    n_layer = settings.integer("num_hidden_layers")
    experts, step = settings.count("num_experts", default=512), settings.integer("decoder_sparse_step", default=1)
    dense = settings.indices("mlp_only_layers") or []
    channels = ["mlp" if i in dense or not experts or (i + 1) % step else "moe" for i in range(n_layer)]
    return model_config(settings, shapes, channels, experts)


def model_config(settings: Settings, shapes: Shapes, channels: Sequence[str], experts: int) -> ModelConfig:
    """The config of a model whose layers end with these blocks."""
    settings.only(hidden_act="silu", attn_output_gate=True, output_gate_type="swish")
    settings.ignore(*SILENT)
    eps = settings.number("rms_norm_eps", default=1e-6)
    layers = [name for pair in zip(_kinds(settings, len(channels)), channels, strict=True) for name in pair]
    attention = attention_table(
        settings, **rope(settings, default_fraction=0.25), qk_norm="head", qk_norm_kind="rms1p", norm_eps=eps,
        output_gate=True,
    )  # fmt: skip
    mixers = {DELTA: _delta(settings, eps), ATTENTION: attention}
    if "mlp" in channels:
        mixers["mlp"] = {"type": "mlp", "d_hidden": settings.integer("intermediate_size")}
    if "moe" in channels:
        mixers["moe"] = _moe(settings, experts)
    settings.ignore("intermediate_size")
    return ModelConfig(
        d_model=settings.integer("hidden_size"),
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used(mixers, layers),
        norm="rms1p",
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
    )


def _kinds(settings: Settings, n_layer: int) -> list[str]:
    """What each layer begins with: from the list of types, or attention at the end of every interval."""
    interval, types = settings.integer("full_attention_interval", default=4), settings.words("layer_types")
    if types is None:
        return [DELTA if (i + 1) % interval else ATTENTION for i in range(n_layer)]
    return kinds_of(settings, types, n_layer, KINDS)


def _delta(settings: Settings, eps: float) -> dict[str, Any]:
    return {
        "type": "gated_delta",
        "nheads": settings.integer("linear_num_value_heads", default=32),
        "nheads_k": settings.integer("linear_num_key_heads", default=16),
        "headdim_k": settings.integer("linear_key_head_dim", default=128),
        "headdim_v": settings.integer("linear_value_head_dim", default=128),
        "d_conv": settings.integer("linear_conv_kernel_dim", default=4),
        "norm_eps": eps,
    }


def _moe(settings: Settings, experts: int) -> dict[str, Any]:
    return {
        "type": "moe",
        "nexperts": experts,
        "top_k": settings.integer("num_experts_per_tok", default=10),
        "d_hidden": settings.integer("moe_intermediate_size"),
        "d_shared": settings.integer("shared_expert_intermediate_size"),
        "shared_gate": True,
        "score": "softmax_topk",
        "normalise": settings.flag("norm_topk_prob", default=True),
    }


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    channels = [block["type"] for block in blocks[1::2]]
    return {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(channels) if kind == "mlp"],
        **written(config, blocks),
    }


def written(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    """The way back of `model_config`."""
    delta, attention = first(blocks, "gated_delta"), first(blocks, "attention")
    mlp, moe = first(blocks, "mlp"), first(blocks, "moe")
    kinds = ["full_attention" if block["type"] == "attention" else "linear_attention" for block in blocks[::2]]
    return {
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **({"intermediate_size": mlp["d_hidden"]} if mlp else {}),
        **(_attention_written(attention) if attention else {"num_attention_heads": 1}),
        **(_delta_written(delta) if delta else {}),
        **(_moe_written(moe) if moe else {}),
    }


def _attention_written(attention: Mapping[str, Any]) -> dict[str, Any]:
    theta, fraction = attention["rope_theta"], attention["rotary_fraction"]
    positions = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction}
    return {**attention_written(attention), "head_dim": attention["head_dim"], "rope_parameters": positions}


def _delta_written(delta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "linear_num_value_heads": delta["nheads"],
        "linear_num_key_heads": delta["nheads_k"],
        "linear_key_head_dim": delta["headdim_k"],
        "linear_value_head_dim": delta["headdim_v"],
        "linear_conv_kernel_dim": delta["d_conv"],
    }


def _moe_written(moe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": moe["nexperts"],
        "num_experts_per_tok": moe["top_k"],
        "moe_intermediate_size": moe["d_hidden"],
        "shared_expert_intermediate_size": moe["d_shared"],
        "norm_topk_prob": moe["normalise"],
    }


def names(config: ModelConfig) -> Names:
    return model_names(config, "model", delta_names)


def model_names(config: ModelConfig, prefix: str, delta: Any) -> Names:
    """The names of a model, the delta layers' by `delta(table)`."""
    table: Names = {"embedding": f"{prefix}.embed_tokens", "norm": f"{prefix}.norm", "head": "lm_head"}
    for i, name in enumerate(config.blocks):
        ours, layer, settings = f"blocks.{i}", f"{prefix}.layers.{i // 2}", config.mixer_table(name)
        table[f"{ours}.norm"] = f"{layer}.{'post_attention_layernorm' if i % 2 else 'input_layernorm'}"
        match settings["type"]:
            case "gated_delta":
                table |= under(f"{ours}.mixer", f"{layer}.linear_attn", delta(settings))
            case "attention":
                table |= under(f"{ours}.mixer", f"{layer}.self_attn", _attention_names(settings))
            case "mlp":
                table |= under(f"{ours}.mixer", f"{layer}.mlp", SWIGLU)
            case "moe":
                table |= under(f"{ours}.mixer", f"{layer}.mlp", EXPERTS)
    return table


def _attention_names(settings: Mapping[str, Any]) -> Names:
    q, gate = dealt(settings["nheads"], [settings["head_dim"]] * 2)
    return {**ATTENTION_NAMES, "q_proj": Part("q_proj", of=q), "gate_proj": Part("q_proj", of=gate),
            "q_norm": "q_norm", "k_norm": "k_norm"}  # fmt: skip


COMMON: Names = {
    "conv_weight": Part("conv1d.weight", published=convolution),
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "norm": "norm",
    "out_proj": "out_proj",
}


def delta_names(settings: Mapping[str, Any]) -> Names:
    """The names of a delta layer whose projections are published per key head."""
    groups, each = settings["nheads_k"], settings["nheads"] // settings["nheads_k"]
    widths = [settings["headdim_k"]] * 2 + [each * settings["headdim_v"]] * 2
    q, k, v, z = dealt(groups, widths)
    beta, decay = dealt(groups, [each] * 2)
    return {
        "in_proj": Part("in_proj_qkvz", of=torch.cat([q, k, v])),
        "gate_proj.up": Part("in_proj_qkvz", of=z),
        "beta_proj": Part("in_proj_ba", of=beta),
        "decay_proj.up": Part("in_proj_ba", of=decay),
        **COMMON,
    }


def dealt(groups: int, widths: Sequence[int]) -> list[Tensor]:
    """The rows of each part, where every group has its own rows of all parts in order."""
    rows = torch.arange(groups * sum(widths)).view(groups, -1)
    return [part.flatten() for part in rows.split(list(widths), 1)]


FAMILY = Family("qwen3_next", read, write, names, skipped=(r"mtp\..*",))
