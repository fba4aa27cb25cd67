"""RecurrentGemma (`model_type` "recurrent_gemma"): Griffin's recurrent blocks, local attention, after each an MLP."""

from __future__ import annotations

import math
from itertools import cycle, islice
from typing import Any

import torch

from everstate.checkpoints.families.base import Blocks, Family, Names, Part, Shapes, convolution, under
from everstate.checkpoints.families.dialect import (
    ATTENTION,
    ATTENTION_NAMES,
    SWIGLU,
    attention_table,
    attention_written,
    first,
    rope,
    tied,
    used,
    without_none,
)
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig
from everstate.models.layout import write_layout

RECURRENT = "rec"
KINDS = {"recurrent": RECURRENT, "attention": ATTENTION, "linear_attention": RECURRENT, "sliding_attention": ATTENTION}
"""Layer types as the hub has them and as transformers 5 calls them."""
WRITTEN = {"rglru": "recurrent", "attention": "attention"}
CYCLE = ["recurrent", "recurrent", "attention"]

RGLRU: Names = {
    "in_proj": ("linear_y", "linear_x"),
    "conv_weight": Part("conv_1d.weight", published=convolution),
    "conv_bias": "conv_1d.bias",
    "input_gate.weight": "rg_lru.input_gate_weight",
    "input_gate.bias": "rg_lru.input_gate_bias",
    "recurrence_gate.weight": "rg_lru.recurrent_gate_weight",
    "recurrence_gate.bias": "rg_lru.recurrent_gate_bias",
    "a_param": "rg_lru.recurrent_param",
    "out_proj": "linear_out",
}
PLACES = {"rglru": ("temporal", RGLRU), "attention": ("temporal", ATTENTION_NAMES)}


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    d_model, eps = settings.integer("hidden_size"), settings.number("rms_norm_eps", default=1e-6)
    settings.only(hidden_activation="gelu_pytorch_tanh", embeddings_scale_by_sqrt_dim=True)
    settings.ignore("w_init_variance_scale", "final_w_init_variance_scale")
    layers = [name for kind in _kinds(settings) for name in (kind, "mlp")]
    rglru = {
        "type": "rglru",
        "d_inner": settings.integer("lru_width", default=d_model),
        "nheads": settings.peek("num_attention_heads"),
        "d_conv": settings.integer("conv1d_width", default=4),
    }
    attention = attention_table(
        settings,
        **rope(settings, default_fraction=0.5),
        window=settings.integer("attention_window_size", "sliding_window", default=2048),
        out_bias=True,
    )
    width = settings.integer("intermediate_size")
    mlp = {"type": "mlp", "d_hidden": width // 2, "activation": "gelu_tanh", "gated": True, "bias": True}
    return ModelConfig(
        d_model=d_model,
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used({RECURRENT: rglru, ATTENTION: attention, "mlp": mlp}, layers),
        norm="rms1p",
        norm_eps=eps,
        # The published weights were trained with the root as bfloat16 has it.
        embedding_multiplier=torch.tensor(math.sqrt(d_model), dtype=torch.bfloat16).item(),
        logit_softcap=settings.number("logits_soft_cap", default=30.0),
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=True),
    )


def _kinds(settings: Settings) -> list[str]:
    """What each layer begins with: the types that are given, over and over."""
    types = settings.words("block_types", "_block_types") or CYCLE
    unknown = [kind for kind in types if kind not in KINDS]
    if unknown or not types:
        raise settings.error(f"block_types {types!r} is not implemented; Everstate has {', '.join(map(repr, KINDS))}")
    kinds = [KINDS[kind] for kind in islice(cycle(types), settings.integer("num_hidden_layers"))]
    said = settings.words("layers_block_type", "layer_types")
    if said is not None and [KINDS.get(kind) for kind in said] != kinds:
        raise settings.error("block_types and layers_block_type name different layers; keep one of them")
    return kinds


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    rglru, attention, mlp = first(blocks, "rglru") or {}, first(blocks, "attention"), first(blocks, "mlp") or {}
    return without_none(
        {
            "model_type": "recurrent_gemma",
            "architectures": ["RecurrentGemmaForCausalLM"],
            "hidden_size": config.d_model,
            "vocab_size": config.vocab_size,
            "num_hidden_layers": len(blocks) // 2,
            "block_types": [WRITTEN[block["type"]] for block in blocks[::2]],
            "lru_width": rglru["d_inner"],
            "conv1d_width": rglru["d_conv"],
            "intermediate_size": 2 * mlp["d_hidden"],
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": config.norm_eps,
            "logits_soft_cap": config.logit_softcap,
            "tie_word_embeddings": config.tie_embeddings,
            **(_attention_written(attention) if attention else {"num_attention_heads": rglru["nheads"]}),
        }
    )


def _attention_written(attention: dict[str, Any]) -> dict[str, Any]:
    return {
        **attention_written(attention),
        "head_dim": attention["head_dim"],
        "attention_window_size": attention["window"],
        "rope_theta": attention["rope_theta"],
        "partial_rotary_factor": attention["rotary_fraction"],
    }


def names(config: ModelConfig) -> Names:
    table: Names = {"embedding": "model.embed_tokens", "norm": "model.final_norm", "head": "lm_head"}
    for i, name in enumerate(config.blocks):
        layer, kind = f"model.layers.{i // 2}", config.mixer_table(name)["type"]
        place, inside = PLACES.get(kind, ("channel", SWIGLU))
        table[f"blocks.{i}.norm"] = f"{layer}.{place}_pre_norm"
        table |= under(f"blocks.{i}.mixer", f"{layer}.{'mlp' if place == 'channel' else place}_block", inside)
    return table


FAMILY = Family("recurrent_gemma", read, write, names)
