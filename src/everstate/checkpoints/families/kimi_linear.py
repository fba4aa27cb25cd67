"""Kimi Linear (`model_type` "kimi_linear"): Kimi Delta Attention, latent attention without positions, and experts.

The lists of layers in the published config count from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Part, Shape, Shapes, under
from everstate.checkpoints.families.dialect import SWIGLU, first, tied, used, without_none
from everstate.checkpoints.families.olmo_hybrid import separate
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig
from everstate.models.layout import write_layout

DELTA, LATENT = "delta", "mla"
LATENT_EPS = 1e-6
"""Of the norm of the latent vector, whatever the config says of the others."""
KINDS = {"linear_attention": DELTA, "full_attention": LATENT}
SILENT = (
    "model_max_length", "head_dim", "use_grouped_topk", "num_nextn_predict_layers", "rope_theta", "rope_parameters",
    "qk_head_dim",
)  # fmt: skip
"""Keys that say nothing: a length, widths that follow from others, and positions, of which there are none."""


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    settings.only(hidden_act="silu", mla_use_nope=True, moe_router_activation_func="sigmoid")
    settings.only(rope_scaling=None, moe_layer_freq=1)
    settings.ignore(*SILENT)
    eps, n_layer = settings.number("rms_norm_eps", default=1e-5), settings.integer("num_hidden_layers")
    linear = settings.nested("linear_attn_config")
    pairs = zip(_kinds(settings, linear, n_layer), _channels(settings, n_layer), strict=True)
    layers = [name for pair in pairs for name in pair]
    mixers = {
        DELTA: _delta(settings, linear, eps),
        LATENT: _latent(settings),
        "mlp": {"type": "mlp", "d_hidden": settings.integer("intermediate_size")},
        "moe": _moe(settings),
    }
    linear.closed()
    return ModelConfig(
        d_model=settings.integer("hidden_size"),
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used(mixers, layers),
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
    )


def _kinds(settings: Settings, linear: Settings, n_layer: int) -> list[str]:
    """What each layer begins with, from one list of types or from two lists of numbers."""
    full, delta = linear.indices("full_attn_layers"), linear.indices("kda_layers")
    types = settings.words("layer_types")
    if types is not None and full is None and len(types) == n_layer and set(types) <= set(KINDS):
        return [KINDS[kind] for kind in types]
    if full is None or delta is None or sorted([*full, *delta]) != list(range(1, n_layer + 1)):
        raise settings.error(
            "linear_attn_config does not name each layer, from 1 on, in kda_layers or full_attn_layers"
        )
    return [LATENT if i + 1 in full else DELTA for i in range(n_layer)]


def _channels(settings: Settings, n_layer: int) -> list[str]:
    """What each layer ends with: the first ones with an MLP, the others with experts."""
    dense, kinds = settings.count("first_k_dense_replace", default=1), settings.words("mlp_layer_types")
    if kinds is None:
        kinds = ["dense" if i < dense else "sparse" for i in range(n_layer)]
    if len(kinds) != n_layer or not set(kinds) <= {"dense", "sparse"}:
        raise settings.error(f"mlp_layer_types = {kinds} does not say 'dense' or 'sparse' for each of {n_layer} layers")
    return ["mlp" if kind == "dense" else "moe" for kind in kinds]


def _delta(settings: Settings, linear: Settings, eps: float) -> dict[str, Any]:
    nheads = settings.integer("linear_num_heads", default=linear.integer("num_heads", default=32))
    headdim = settings.integer("linear_head_dim", default=linear.integer("head_dim", default=128))
    width = linear.take("short_conv_kernel_size", default=4)
    return {
        "type": "gated_delta",
        "nheads": nheads,
        "headdim_k": headdim,
        "headdim_v": headdim,
        "d_conv": settings.take("linear_conv_kernel_dim", default=width),
        "decay": "channel",
        "rank": headdim,
        "gate": "sigmoid",
        "norm_eps": eps,
    }


def _latent(settings: Settings) -> dict[str, Any]:
    nheads = settings.integer("num_attention_heads")
    settings.only(num_key_value_heads=nheads, attention_bias=False)
    rank = settings.take("q_lora_rank")
    return without_none(
        {
            "type": "mla",
            "nheads": nheads,
            "d_latent": settings.integer("kv_lora_rank"),
            "d_nope": settings.integer("qk_nope_head_dim"),
            "d_shared": settings.integer("qk_rope_head_dim"),
            "d_value": settings.integer("v_head_dim"),
            "q_rank": rank,
            "norm_eps": LATENT_EPS,
        }
    )


def _moe(settings: Settings) -> dict[str, Any]:
    d_hidden = settings.integer("moe_intermediate_size")
    shared = settings.count("num_shared_experts", "n_shared_experts", default=1)
    return {
        "type": "moe",
        "nexperts": settings.integer("num_experts", "num_local_experts"),
        "top_k": settings.integer("num_experts_per_token", "num_experts_per_tok"),
        "d_hidden": d_hidden,
        **({"d_shared": shared * d_hidden} if shared else {}),
        "score": "sigmoid",
        "normalise": settings.flag("moe_renormalize", "norm_topk_prob", default=True),
        "normalise_eps": 1e-20,
        "routed_scale": settings.number("routed_scaling_factor", default=1.0),
        "correction_bias": True,
        "ngroups": settings.integer("num_expert_group", "n_group", default=1),
        "topk_groups": settings.integer("topk_group", default=1),
    }


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    delta, latent = first(blocks, "gated_delta") or {}, first(blocks, "mla") or {}
    mlp, moe = first(blocks, "mlp"), first(blocks, "moe") or {}
    full = [i + 1 for i, block in enumerate(blocks[::2]) if block["type"] == "mla"]
    return without_none(
        {
            "model_type": "kimi_linear",
            "architectures": ["KimiLinearForCausalLM"],
            "hidden_size": config.d_model,
            "vocab_size": config.vocab_size,
            "num_hidden_layers": len(blocks) // 2,
            "first_k_dense_replace": sum(block["type"] == "mlp" for block in blocks),
            "intermediate_size": (mlp or moe)["d_hidden"],
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "linear_attn_config": {
                "kda_layers": [i + 1 for i in range(len(blocks) // 2) if i + 1 not in full],
                "full_attn_layers": full,
                "num_heads": delta["nheads"],
                "head_dim": delta["headdim_k"],
                "short_conv_kernel_size": delta["d_conv"],
            },
            **_latent_written(latent),
            **_moe_written(moe),
        }
    )


def _latent_written(latent: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": latent["nheads"],
        "num_key_value_heads": latent["nheads"],
        "kv_lora_rank": latent["d_latent"],
        "qk_nope_head_dim": latent["d_nope"],
        "qk_rope_head_dim": latent["d_shared"],
        "v_head_dim": latent["d_value"],
        "q_lora_rank": latent["q_rank"],
        "mla_use_nope": True,
    }


def _moe_written(moe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": moe["nexperts"],
        "num_experts_per_token": moe["top_k"],
        "moe_intermediate_size": moe["d_hidden"],
        "num_shared_experts": (moe["d_shared"] or 0) // moe["d_hidden"],
        "moe_renormalize": moe["normalise"],
        "routed_scaling_factor": moe["routed_scale"],
        "num_expert_group": moe["ngroups"],
        "topk_group": moe["topk_groups"],
        "moe_router_activation_func": "sigmoid",
    }


def _for_each_head(shape: Shape) -> Shape:
    return (1, 1, *shape, 1)


DELTA_NAMES: Names = {
    "decay_proj.down": "f_a_proj",
    "decay_proj.up": "f_b_proj",
    "gate_proj.down": "g_a_proj",
    "gate_proj.up": "g_b_proj",
    "beta_proj": "b_proj",
    "dt_bias": "dt_bias",
    "A_log": Part("A_log", published=_for_each_head),
    "norm": "o_norm",
    "out_proj": "o_proj",
}
LATENT_NAMES: Names = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "out_proj": "o_proj",
}
EXPERTS: Names = {
    "router": "gate",
    "router_bias": "gate.e_score_correction_bias",
    "in_proj": ("experts.{}.w1", "experts.{}.w3"),
    "out_proj": "experts.{}.w2",
    **under("shared", "shared_experts", SWIGLU),
}


def names(config: ModelConfig) -> Names:
    table: Names = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for i, name in enumerate(config.blocks):
        ours, layer, settings = f"blocks.{i}", f"model.layers.{i // 2}", config.mixer_table(name)
        table[f"{ours}.norm"] = f"{layer}.{'post_attention_layernorm' if i % 2 else 'input_layernorm'}"
        match settings["type"]:
            case "gated_delta":
                table |= under(f"{ours}.mixer", f"{layer}.self_attn", {**separate(settings), **DELTA_NAMES})
            case "mla":
                table |= under(f"{ours}.mixer", f"{layer}.self_attn", LATENT_NAMES)
            case "mlp":
                table |= under(f"{ours}.mixer", f"{layer}.mlp", SWIGLU)
            case "moe":
                table |= under(f"{ours}.mixer", f"{layer}.block_sparse_moe", EXPERTS)
    return table


FAMILY = Family(
    "kimi_linear", read, write, names, skipped=(r"model\.mtp\..*",),
    # transformers calls the MLP of a dense layer so when it saves a model.
    aliases=((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
)  # fmt: skip
