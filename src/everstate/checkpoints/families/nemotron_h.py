"""Nemotron-H, Nemotron Nano 2 and Nemotron 3 (`model_type` "nemotron_h"): each letter of a pattern is one block.

The authors' own code does not bound the time step from below: `time_step_min` and its kin speak of initial values only.
"""

from __future__ import annotations

import math
from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Part, Shapes, under
from everstate.checkpoints.families.dialect import (
    ATTENTION,
    ATTENTION_NAMES,
    LAYER_KINDS,
    MAMBA2,
    SSM,
    attention_table,
    attention_written,
    backbone_names,
    first,
    tied,
    used,
)
from everstate.checkpoints.families.settings import Settings
from everstate.core.errors import CheckpointError
from everstate.models import ModelConfig
from everstate.models.layout import write_layout

LETTERS = {"M": SSM, "*": ATTENTION, "-": "mlp", "E": "moe"}
KINDS = {**LAYER_KINDS, "mlp": "mlp", "moe": "moe"}
SILENT = (
    "expand", "mamba_expand", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters",
    "moe_shared_expert_overlap", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers",
    "keep_mtp", "time_step_limit", "mamba_dt_limit", "mamba_dt_min", "mamba_dt_max", "mamba_dt_init_floor",
    "max_sequence_length", "time_step_rank", "moe_router_dtype", "mtp_loss_scaling_factor", "use_mtp", "n_inner",
)  # fmt: skip
"""Keys that are there and that the authors' code does not obey: width, positions, bounds of dt, further tokens."""
ACTIVATIONS = {"relu2": "relu2", "silu": "silu", "gelu": "gelu"}


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    eps = settings.number("layer_norm_epsilon", "rms_norm_eps", "norm_eps", default=1e-5)
    settings.ignore(*SILENT)
    layers = _layers(settings)
    activation = settings.choice("mlp_hidden_act", default="relu2", among=ACTIVATIONS)
    settings.only(mamba_hidden_act="silu", mamba_proj_bias=False)
    bias = settings.flag("mlp_bias", default=False)
    d_hidden = settings.take("intermediate_size")
    mixers = {
        SSM: _mamba(settings, eps),
        ATTENTION: attention_table(settings, window=settings.take("sliding_window")),
        "mlp": {"type": "mlp", "d_hidden": d_hidden, "activation": activation, "gated": False, "bias": bias},
        "moe": _moe(settings, activation),
    }
    if "moe" in layers and bias:
        raise settings.error("mlp_bias = true is not implemented for experts; Everstate has false")
    return ModelConfig(
        d_model=settings.integer("hidden_size"),
        vocab_size=settings.integer("vocab_size"),
        layout=write_layout(layers),
        mixers=used(mixers, layers),
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=False),
    )


def _layers(settings: Settings) -> list[str]:
    """The name of each block, from the pattern or from the list of types."""
    pattern, types = settings.text("hybrid_override_pattern"), settings.words("layers_block_type", "layer_types")
    table, given = (KINDS, types) if pattern is None else (LETTERS, pattern)
    unknown = [kind for kind in given or () if kind not in table]
    if not given or unknown:
        problem = f"names {unknown[0]!r}" if unknown else "is missing"
        raise settings.error(
            f"hybrid_override_pattern or layers_block_type {problem}; Everstate has {', '.join(table)}"
        )
    layers = [table[kind] for kind in given]
    if settings.take("num_hidden_layers", default=len(layers)) != len(layers):
        raise settings.error(f"num_hidden_layers is not the {len(layers)} layers of the pattern; keep one of them")
    return layers


def _mamba(settings: Settings, eps: float) -> dict[str, Any]:
    headdim = settings.integer("mamba_head_dim", default=64)
    return {
        "type": "mamba2",
        "d_inner": settings.integer("mamba_num_heads", default=128) * headdim,
        "headdim": headdim,
        "ngroups": settings.integer("n_groups", "mamba_n_groups", default=8),
        "d_state": settings.integer("ssm_state_size", "mamba_state_dim", default=128),
        "d_conv": settings.integer("conv_kernel", "mamba_d_conv", default=4),
        "conv_bias": settings.flag("use_conv_bias", "mamba_conv_bias", default=True),
        "bias": settings.flag("use_bias", default=False),
        "norm_eps": eps,
    }


def _moe(settings: Settings, activation: str) -> dict[str, Any]:
    experts = settings.count("n_shared_experts", default=1)
    shared = experts * settings.count("moe_shared_expert_intermediate_size", default=0)
    return {
        "type": "moe",
        "nexperts": settings.take("n_routed_experts", "num_local_experts", default=8),
        "top_k": settings.take("num_experts_per_tok", default=2),
        "d_hidden": settings.take("moe_intermediate_size"),
        "activation": activation,
        "gated": False,
        "score": "sigmoid",
        "normalise": settings.flag("norm_topk_prob", default=True),
        "normalise_eps": 1e-20,
        "routed_scale": settings.number("routed_scaling_factor", default=1.0),
        "correction_bias": True,
        "ngroups": settings.integer("n_group", default=1),
        "topk_groups": settings.integer("topk_group", default=1),
        **({"d_shared": shared} if shared else {}),
        **({"d_latent": latent} if (latent := settings.take("moe_latent_size")) else {}),
    }


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    letters = {"mamba2": "M", "attention": "*", "mlp": "-", "moe": "E"}
    ssm, attention = first(blocks, "mamba2"), first(blocks, "attention")
    mlp, moe = first(blocks, "mlp"), first(blocks, "moe")
    if ssm is not None and ssm["dt_limit"] != (0.0, math.inf):
        raise CheckpointError("a bound of dt cannot be written as 'nemotron_h'; write it as 'everstate'")
    channel = mlp or moe
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": len(blocks),
        "hybrid_override_pattern": "".join(letters[block["type"]] for block in blocks),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "mlp_hidden_act": channel["activation"] if channel else "relu2",
        **({"intermediate_size": mlp["d_hidden"], "mlp_bias": mlp["bias"]} if mlp else {}),
        **(
            {**attention_written(attention), "head_dim": attention["head_dim"]}
            if attention
            else {"num_attention_heads": 1}
        ),
        **(_mamba_written(ssm) if ssm else {}),
        **(_moe_written(moe) if moe else {}),
    }


def _mamba_written(ssm: dict[str, Any]) -> dict[str, Any]:
    return {
        "mamba_num_heads": ssm["d_inner"] // ssm["headdim"],
        "mamba_head_dim": ssm["headdim"],
        "mamba_hidden_act": "silu",
        "n_groups": ssm["ngroups"],
        "ssm_state_size": ssm["d_state"],
        "conv_kernel": ssm["d_conv"],
        "use_conv_bias": ssm["conv_bias"],
        "use_bias": ssm["bias"],
        "time_step_limit": [0.0, 1e30],
    }


def _moe_written(moe: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_routed_experts": moe["nexperts"],
        "n_shared_experts": 1 if moe["d_shared"] else 0,
        "num_experts_per_tok": moe["top_k"],
        "moe_intermediate_size": moe["d_hidden"],
        "moe_shared_expert_intermediate_size": moe["d_shared"] or 0,
        "moe_latent_size": moe["d_latent"],
        "n_group": moe["ngroups"],
        "topk_group": moe["topk_groups"],
        "norm_topk_prob": moe["normalise"],
        "routed_scaling_factor": moe["routed_scale"],
    }


MLP_NAMES: Names = {"in_proj": "up_proj", "out_proj": "down_proj"}
MOE_NAMES: Names = {
    "router": "gate",
    "router_bias": "gate.e_score_correction_bias",
    "in_proj": Part("experts.{}.up_proj"),
    "out_proj": Part("experts.{}.down_proj"),
    "latent_in": "fc1_latent_proj",
    "latent_out": "fc2_latent_proj",
    **under("shared", "shared_experts", MLP_NAMES),
}
BLOCK_NAMES: dict[str, Names] = {"mamba2": MAMBA2, "attention": ATTENTION_NAMES, "mlp": MLP_NAMES, "moe": MOE_NAMES}


def names(config: ModelConfig) -> Names:
    return backbone_names(config, BLOCK_NAMES)


FAMILY = Family("nemotron_h", read, write, names, skipped=(r"mtp\..*",))
