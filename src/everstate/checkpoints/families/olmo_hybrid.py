"""OLMo Hybrid (`model_type` "olmo_hybrid"): Gated DeltaNet with norms before its blocks, attention with norms after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    without_none,
)
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig
from everstate.models.layout import write_layout

DELTA = "delta"
LAYERS = {"linear_attention": (DELTA, "mlp"), "full_attention": (ATTENTION, "late_mlp")}
"""The two blocks of a layer; those of an attention layer have their norms behind them."""
LATE = (ATTENTION, "late_mlp")
DELTA_EPS = 1e-5
"""Of the norm of each head, whatever the config says of the others."""
SILENT = ("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    settings.only(hidden_act="silu", linear_use_gate=True)
    settings.ignore(*SILENT)
    eps, d_model = settings.number("rms_norm_eps", default=1e-6), settings.integer("hidden_size")
    layers = [name for pair in _layers(settings) for name in pair]
    d_hidden = settings.integer("intermediate_size")
    attention = attention_table(settings, rope_theta=_theta(settings), qk_norm="full", norm_eps=eps)
    mlp = {"type": "mlp", "d_hidden": d_hidden}
    mixers = {DELTA: _delta(settings, d_model, attention["nheads"]), ATTENTION: attention, "mlp": mlp, "late_mlp": mlp}
    return ModelConfig(
        d_model=d_model,
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used(mixers, layers),
        norm_eps=eps,
        post_norm=tuple(name for name in LATE if name in layers),
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
    )


def _layers(settings: Settings) -> list[tuple[str, str]]:
    n_layer, types = settings.integer("num_hidden_layers"), settings.words("layer_types")
    if types is None:
        types = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(n_layer)]
    pairs = kinds_of(settings, types, n_layer, LAYERS)
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if settings.take("fla_hybrid_attention_indices", default=full) != full:
        raise settings.error("fla_hybrid_attention_indices and layer_types name different layers; keep one of them")
    return pairs


def _theta(settings: Settings) -> float | None:
    """The base of the positions; checkpoints for long contexts have none, which the table inside says by a null."""
    inside = settings.peek("rope_parameters", default={})
    none = isinstance(inside, dict) and "rope_theta" in inside and inside["rope_theta"] is None
    if none:
        settings.ignore("rope_theta")
    if none or not ("rope_theta" in settings or inside):
        settings.ignore("rope_parameters", "rope_scaling")
        return None
    return float(rope(settings)["rope_theta"])


def _delta(settings: Settings, d_model: int, nheads: int) -> dict[str, Any]:
    nheads_k = settings.integer("linear_num_key_heads", default=nheads)
    headdim_k = settings.integer("linear_key_head_dim", default=int(0.75 * d_model / nheads_k))
    return {
        "type": "gated_delta",
        "nheads": settings.integer("linear_num_value_heads", default=nheads),
        "nheads_k": nheads_k,
        "headdim_k": headdim_k,
        "headdim_v": settings.integer("linear_value_head_dim", default=2 * headdim_k),
        "d_conv": settings.integer("linear_conv_kernel_dim", default=4),
        "allow_neg_eigval": settings.flag("linear_allow_neg_eigval", default=True),
        "norm_eps": DELTA_EPS,
    }


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    delta, attention, mlp = first(blocks, "gated_delta"), first(blocks, "attention"), first(blocks, "mlp")
    kinds = ["full_attention" if block["type"] == "attention" else "linear_attention" for block in blocks[::2]]
    return without_none(
        {
            "model_type": "olmo_hybrid",
            "architectures": ["OlmoHybridForCausalLM"],
            "hidden_size": config.d_model,
            "vocab_size": config.vocab_size,
            "num_hidden_layers": len(kinds),
            "layer_types": kinds,
            "intermediate_size": mlp["d_hidden"] if mlp else None,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            **(attention_written(attention) if attention else {"num_attention_heads": 1}),
            "rope_theta": attention["rope_theta"] if attention else None,
            **(_delta_written(delta) if delta else {}),
        }
    )


def _delta_written(delta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "linear_num_value_heads": delta["nheads"],
        "linear_num_key_heads": delta["nheads_k"],
        "linear_key_head_dim": delta["headdim_k"],
        "linear_value_head_dim": delta["headdim_v"],
        "linear_conv_kernel_dim": delta["d_conv"],
        "linear_allow_neg_eigval": delta["allow_neg_eigval"],
    }


def names(config: ModelConfig) -> Names:
    table: Names = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for i, name in enumerate(config.blocks):
        ours, layer, settings = f"blocks.{i}", f"model.layers.{i // 2}", config.mixer_table(name)
        match settings["type"]:
            case "gated_delta":
                table[f"{ours}.norm"] = f"{layer}.attention_layer_norm"
                table |= under(f"{ours}.mixer", f"{layer}.linear_attn", _delta_names(settings))
            case "attention":
                table[f"{ours}.norm"] = f"{layer}.post_attention_layernorm"
                table |= under(f"{ours}.mixer", f"{layer}.self_attn", NORMED_ATTENTION)
            case "mlp":
                late = name in config.post_norm
                table[f"{ours}.norm"] = f"{layer}.{'post_feedforward_layernorm' if late else 'feedforward_layer_norm'}"
                table |= under(f"{ours}.mixer", f"{layer}.mlp", SWIGLU)
    return table


NORMED_ATTENTION: Names = {**ATTENTION_NAMES, "q_norm": "q_norm", "k_norm": "k_norm"}


def _delta_names(settings: Mapping[str, Any]) -> Names:
    return {
        **separate(settings),
        "decay_proj.up": "a_proj",
        "beta_proj": "b_proj",
        "gate_proj.up": "g_proj",
        "dt_bias": "dt_bias",
        "A_log": "A_log",
        "norm": "o_norm",
        "out_proj": "o_proj",
    }


def separate(settings: Mapping[str, Any]) -> Names:
    """Queries, keys and values that are projected and convolved one by one."""
    width_k = settings.get("nheads_k", settings["nheads"]) * settings["headdim_k"]
    widths = {"q": width_k, "k": width_k, "v": settings["nheads"] * settings["headdim_v"]}
    return {
        "in_proj": tuple(Part(f"{name}_proj", rows=width) for name, width in widths.items()),
        "conv_weight": tuple(
            Part(f"{name}_conv1d.weight", rows=width, published=convolution) for name, width in widths.items()
        ),
    }


FAMILY = Family("olmo_hybrid", read, write, names)
