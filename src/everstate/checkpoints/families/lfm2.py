"""LFM2 (`model_type` "lfm2"): gated short convolutions, some attention, and after each an MLP.

The width of the MLPs is what the tensors say: the config has one from which it may be computed in two roundings.
"""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Part, Shapes, convolution, under
from everstate.checkpoints.families.dialect import (
    ATTENTION,
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

CONV = "conv"
KINDS = {"conv": CONV, "full_attention": ATTENTION}
WRITTEN = {"short_conv": "conv", "attention": "full_attention"}
THETA = 1_000_000.0
FIRST_MLP = "model.layers.0.feed_forward.w1.weight"

CONV_NAMES: Names = {
    "in_proj": "in_proj",
    "conv_weight": Part("conv.weight", published=convolution),
    "conv_bias": "conv.bias",
    "out_proj": "out_proj",
}
HEADS: Names = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "q_norm": "q_layernorm",
    "k_norm": "k_layernorm",
    "out_proj": "out_proj",
}
MLP: Names = {"in_proj": ("w1", "w3"), "out_proj": "w2"}


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    d_model = settings.peek("hidden_size")
    settings.only(block_dim=d_model, conv_dim=d_model, conv_dim_out=d_model, block_use_swiglu=True, use_pos_enc=True)
    settings.ignore("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")
    layers = [name for kind in kinds(settings) for name in (kind, "mlp")]
    mlp = {"type": "mlp", "d_hidden": _d_hidden(settings, shapes)}
    return model_config(settings, shapes, layers, {"mlp": mlp})


def _d_hidden(settings: Settings, shapes: Shapes) -> int:
    """The width of the MLPs: of the tensors, and where there are none as the authors compute it."""
    # Where both are given, the first is the one that the authors read.
    given = settings.integer("intermediate_size") if "intermediate_size" in settings else None
    width = settings.integer("block_ff_dim", default=given)
    multiple = settings.integer("block_multiple_of", default=256)
    multiplier = settings.number("block_ffn_dim_multiplier", default=1.0)
    if settings.flag("block_auto_adjust_ff_dim", default=True):
        width = -(-int(multiplier * (2 * width // 3)) // multiple) * multiple
    return shapes[FIRST_MLP][0] if FIRST_MLP in shapes else width


def kinds(settings: Settings) -> list[str]:
    """What each layer begins with: from the list of types, or of the indices of attention."""
    n_layer = settings.integer("num_hidden_layers")
    types, indices = settings.words("layer_types"), settings.indices("full_attn_idxs")
    if types is None and indices is None:
        raise settings.error("layer_types or full_attn_idxs is missing; the config is not complete: download it again")
    if types is None:
        types = ["full_attention" if i in (indices or ()) else "conv" for i in range(n_layer)]
    found = kinds_of(settings, types, n_layer, KINDS)
    if indices is not None and [i for i, kind in enumerate(types) if kind == "full_attention"] != sorted(indices):
        raise settings.error("layer_types and full_attn_idxs name different layers; keep one of them")
    return found


def model_config(
    settings: Settings, shapes: Shapes, layers: list[str], channels: dict[str, dict[str, Any]]
) -> ModelConfig:
    """The model of these layers, `channels` being the tables of what each layer ends with."""
    eps = settings.number("norm_eps", default=1e-5)
    settings.only(block_norm_eps=eps, num_heads=settings.peek("num_attention_heads"), attention_bias=False)
    settings.only(theta=settings.peek("rope_theta", default=THETA))
    conv = {
        "type": "short_conv",
        "d_conv": settings.integer("conv_L_cache", default=3),
        "bias": settings.flag("conv_bias", default=False),
    }
    attention = attention_table(settings, **rope(settings, default_theta=THETA), qk_norm="head", norm_eps=eps)
    return ModelConfig(
        d_model=settings.integer("hidden_size"),
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used({CONV: conv, ATTENTION: attention, **channels}, layers),
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=True),
    )


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    mlp = first(blocks, "mlp") or {}
    return {
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],
        "intermediate_size": mlp["d_hidden"],
        "block_auto_adjust_ff_dim": False,
        **written(config, blocks),
    }


def written(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    """What the dense models and those with experts write alike."""
    conv, attention = first(blocks, "short_conv"), first(blocks, "attention")
    return {
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(blocks) // 2,
        "layer_types": [WRITTEN[block["type"]] for block in blocks[::2]],
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **({"conv_L_cache": conv["d_conv"], "conv_bias": conv["bias"]} if conv else {}),
        **({"rope_theta": attention["rope_theta"], "head_dim": attention["head_dim"]} if attention else {}),
        **(attention_written(attention) if attention else {"num_attention_heads": 1}),
    }


def names(config: ModelConfig) -> Names:
    return model_names(config, {"mlp": MLP})


def model_names(config: ModelConfig, channels: dict[str, Names]) -> Names:
    """The names of a model, `channels` being those inside what each layer ends with."""
    table: Names = {"embedding": "model.embed_tokens", "norm": "model.embedding_norm", "head": "lm_head"}
    for i, name in enumerate(config.blocks):
        ours, layer = f"blocks.{i}", f"model.layers.{i // 2}"
        table[f"{ours}.norm"] = f"{layer}.{'ffn_norm' if i % 2 else 'operator_norm'}"
        kind = config.mixer_table(name)["type"]
        match kind:
            case "short_conv":
                table |= under(f"{ours}.mixer", f"{layer}.conv", CONV_NAMES)
            case "attention":
                table |= under(f"{ours}.mixer", f"{layer}.self_attn", HEADS)
            case _:
                table |= under(f"{ours}.mixer", f"{layer}.feed_forward", channels[kind])
    return table


FAMILY = Family("lfm2", read, write, names)
