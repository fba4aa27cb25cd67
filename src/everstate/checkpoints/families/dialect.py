"""Settings that many families share, in all the spellings that were published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from everstate.checkpoints.families.base import Blocks, Names, Part, Shapes, convolution, under
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig

K = TypeVar("K")

SSM, ATTENTION = "ssm", "attn"
LAYER_KINDS = {"mamba": SSM, "linear_attention": SSM, "attention": ATTENTION, "full_attention": ATTENTION}
"""Layer types as the hub has them and as transformers 5 writes them."""

CONV1D: Names = {"conv_weight": Part("conv1d.weight", published=convolution), "conv_bias": "conv1d.bias"}
MAMBA1: Names = {
    "in_proj": "in_proj", "x_proj": "x_proj", "dt_proj": "dt_proj", "dt_bias": "dt_proj.bias", "A_log": "A_log",
    "D": "D", "out_proj": "out_proj", **CONV1D,
}  # fmt: skip
MAMBA2: Names = {
    "in_proj": "in_proj", "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm": "norm", "out_proj": "out_proj",
    **CONV1D,
}  # fmt: skip
ATTENTION_NAMES: Names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
SWIGLU: Names = {"in_proj": ("gate_proj", "up_proj"), "out_proj": "down_proj"}


def tied(settings: Settings, shapes: Shapes, head: str, *, default: bool) -> bool:
    """Whether the head is the embedding: as the config says, and where the file has no head."""
    says = settings.flag("tie_word_embeddings", "tie_embeddings", "tie_embedding", default=default)
    return says or (bool(shapes) and head not in shapes)


def dt_limit(settings: Settings) -> tuple[float, float]:
    """The bounds of the time step, where infinity has several spellings."""
    low, high = settings.numbers("time_step_limit", "dt_limit", default=(0.0, math.inf))
    return (low, math.inf if high >= 1e30 else high)


def limit_written(limit: tuple[float, float]) -> list[float] | None:
    """The same for a config file; None where there is none, because JSON has no infinity."""
    return None if limit == (0.0, math.inf) else list(limit)


def rope(settings: Settings, *, default_theta: float = 10_000.0, default_fraction: float = 1.0) -> dict[str, Any]:
    """`rope_theta` and `rotary_fraction` of an attention table, from the flat keys or from `rope_parameters`."""
    inner = settings.nested("rope_parameters")
    outer = settings.nested("rope_scaling")
    for table in (inner, outer):
        kind = table.take("rope_type", "type", default="default")
        if kind != "default":
            raise settings.error(f"rotary positions of type {kind!r} are not implemented; Everstate has 'default'")
    # Positions in three dimensions are one for text, where all three are the same.
    inner.ignore("mrope_section", "mrope_interleaved")
    theta = _one(settings, "rope_theta", inner, default_theta)
    fraction = _one(settings, "partial_rotary_factor", inner, default_fraction)
    inner.closed()
    outer.closed()
    return {"rope_theta": theta, "rotary_fraction": fraction}


def _one(settings: Settings, key: str, inner: Settings, default: float) -> float:
    """A setting that stands in the config or in the table inside it."""
    values = {value for value in (settings.optional_number(key), inner.optional_number(key)) if value is not None}
    if len(values) > 1:
        raise settings.error(f"{key} is given as {sorted(values)}; keep one of them")
    return values.pop() if values else default


def without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table without the keys that have no value."""
    return {key: value for key, value in table.items() if value is not None}


def expand_written(d_inner: int, d_model: int) -> int | float:
    """The `expand` that gives a width."""
    return d_inner / d_model if d_inner % d_model else d_inner // d_model


def mamba2_table(settings: Settings, d_model: int, eps: float) -> dict[str, Any]:
    """The table of Mamba-2 layers from the `mamba_*` keys of Bamba, Granite 4 and Falcon-H1."""
    expand, nheads = settings.integer("mamba_expand", default=2), settings.integer("mamba_n_heads", default=128)
    d_inner = settings.integer("mamba_d_ssm", default=expand * d_model)
    headdim = settings.integer_or_auto("mamba_d_head") or d_inner // nheads
    if headdim * nheads != d_inner:
        raise settings.error(f"mamba_n_heads {nheads} * mamba_d_head {headdim} is not the width {d_inner} of the layer")
    return {
        "type": "mamba2",
        "d_inner": d_inner,
        "headdim": headdim,
        "ngroups": settings.integer("mamba_n_groups", default=1),
        "d_state": settings.integer("mamba_d_state", default=256),
        "d_conv": settings.integer("mamba_d_conv", default=4),
        "conv_bias": settings.flag("mamba_conv_bias", default=True),
        "bias": settings.flag("mamba_proj_bias", default=False),
        "dt_limit": dt_limit(settings),
        "norm_eps": eps,
    }


def mamba2_written(ssm: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """The way back."""
    return without_none(
        {
            "mamba_n_heads": ssm["d_inner"] // ssm["headdim"],
            "mamba_d_head": ssm["headdim"],
            "mamba_n_groups": ssm["ngroups"],
            "mamba_d_state": ssm["d_state"],
            "mamba_d_conv": ssm["d_conv"],
            "mamba_expand": max(ssm["d_inner"] // d_model, 1),
            "mamba_conv_bias": ssm["conv_bias"],
            "mamba_proj_bias": ssm["bias"],
            "time_step_limit": limit_written(ssm["dt_limit"]),
        }
    )


def attention_table(settings: Settings, **more: Any) -> dict[str, Any]:
    """The table of attention layers from the keys that all families have; `more` are those that they do not."""
    nheads = settings.integer("num_attention_heads")
    return without_none(
        {
            "type": "attention",
            "nheads": nheads,
            "nheads_kv": settings.integer("num_key_value_heads", "num_query_groups", default=nheads),
            "head_dim": settings.take("head_dim", "attention_head_dim"),
            "bias": settings.flag("attention_bias", default=False),
            **more,
        }
    )


def attention_written(block: Mapping[str, Any]) -> dict[str, Any]:
    """The way back, but for what a family has of its own."""
    return {
        "num_attention_heads": block["nheads"],
        "num_key_value_heads": block["nheads_kv"],
        "attention_bias": block["bias"],
    }


def layer_kinds(settings: Settings, n_layer: int) -> list[str]:
    """`SSM` or `ATTENTION` for each layer: from a list of types, or of the indices of attention; else all `SSM`."""
    types = settings.words("layer_types", "layers_block_type")
    indices = settings.indices("attn_layer_indices")
    if types is None:
        return [ATTENTION if i in (indices or ()) else SSM for i in range(n_layer)]
    kinds = kinds_of(settings, types, n_layer, LAYER_KINDS)
    if indices is not None and [i for i, kind in enumerate(kinds) if kind == ATTENTION] != list(indices):
        raise settings.error("layer_types and attn_layer_indices name different layers; keep one of them")
    return kinds


def kinds_of(settings: Settings, types: Sequence[str], n_layer: int, among: Mapping[str, K]) -> list[K]:
    """What `among` has for each of the published layer types, of which there must be one for each layer."""
    unknown = [kind for kind in types if kind not in among]
    if unknown or len(types) != n_layer:
        given = repr(unknown[0]) if unknown else f"{len(types)} layers and not {n_layer}"
        raise settings.error(f"layer_types has {given}; Everstate has {', '.join(map(repr, among))}")
    return [among[kind] for kind in types]


def first(blocks: Blocks, kind: str) -> dict[str, Any] | None:
    """The table of the first block of a type, as a model has one table for all of them."""
    return next((block for block in blocks if block["type"] == kind), None)


def used(mixers: Mapping[str, dict[str, Any]], blocks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of all that a config describes, the tables that its layers use."""
    return {name: table for name, table in mixers.items() if name in blocks}


def inverse_written(multiplier: float) -> float:
    """The divisor whose inverse is exactly this multiplier."""
    divisor = 1 / multiplier
    near = (float(round(divisor)), divisor, math.nextafter(divisor, 0), math.nextafter(divisor, math.inf))
    return next((number for number in near if number and 1 / number == multiplier), divisor)


def layer_names(config: ModelConfig, places: Mapping[str, tuple[str, Names]]) -> Names:
    """The names of models of which each layer is two blocks, as Jamba and Bamba have them.

    places: for each mixer type the module of a layer that it is, and the names inside.
    """
    table: Names = {"embedding": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"}
    for i, name in enumerate(config.blocks):
        layer = f"model.layers.{i // 2}"
        table[f"blocks.{i}.norm"] = f"{layer}.{'pre_ff_layernorm' if i % 2 else 'input_layernorm'}"
        module, inside = places[config.mixer_table(name)["type"]]
        table |= under(f"blocks.{i}.mixer", f"{layer}.{module}", inside)
    return table


def backbone_names(config: ModelConfig, places: Mapping[str, Names]) -> Names:
    """The names of models of which each layer is one block; `places` has for each mixer type the names inside."""
    table: Names = {"embedding": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"}
    for i, name in enumerate(config.blocks):
        layer = f"backbone.layers.{i}"
        table[f"blocks.{i}.norm"] = f"{layer}.norm"
        table |= under(f"blocks.{i}.mixer", f"{layer}.mixer", places[config.mixer_table(name)["type"]])
    return table
