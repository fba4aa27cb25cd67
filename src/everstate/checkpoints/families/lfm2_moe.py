"""LFM2 with experts (`model_type` "lfm2_moe"): as LFM2, with a mixture of experts after all but the first layers."""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families import lfm2
from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes
from everstate.checkpoints.families.dialect import first
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig

EXPERTS: Names = {
    "router": "gate",
    "router_bias": "expert_bias",
    "in_proj": ("experts.{}.w1", "experts.{}.w3"),
    "out_proj": "experts.{}.w2",
}


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    dense = settings.count("num_dense_layers", default=2)
    layers = [name for i, kind in enumerate(lfm2.kinds(settings)) for name in (kind, "mlp" if i < dense else "moe")]
    channels = {
        "mlp": {"type": "mlp", "d_hidden": settings.integer("intermediate_size")},
        "moe": _moe(settings),
    }
    return lfm2.model_config(settings, shapes, layers, channels)


def _moe(settings: Settings) -> dict[str, Any]:
    return {
        "type": "moe",
        "nexperts": settings.integer("num_experts", default=32),
        "top_k": settings.integer("num_experts_per_tok", default=4),
        "d_hidden": settings.integer("moe_intermediate_size"),
        "score": "sigmoid",
        "normalise": settings.flag("norm_topk_prob", default=True),
        "normalise_eps": 1e-6,
        "routed_scale": settings.number("routed_scaling_factor", default=1.0),
        "correction_bias": settings.flag("use_expert_bias", default=True),
    }


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    mlp, moe = first(blocks, "mlp"), first(blocks, "moe") or {}
    return {
        "model_type": "lfm2_moe",
        "architectures": ["Lfm2MoeForCausalLM"],
        "num_dense_layers": sum(block["type"] == "mlp" for block in blocks),
        "intermediate_size": (mlp or moe)["d_hidden"],
        "moe_intermediate_size": moe["d_hidden"],
        "num_experts": moe["nexperts"],
        "num_experts_per_tok": moe["top_k"],
        "norm_topk_prob": moe["normalise"],
        "routed_scaling_factor": moe["routed_scale"],
        "use_expert_bias": moe["correction_bias"],
        **lfm2.written(config, blocks),
    }


def names(config: ModelConfig) -> Names:
    return lfm2.model_names(config, {"mlp": lfm2.MLP, "moe": EXPERTS})


FAMILY = Family("lfm2_moe", read, write, names)
