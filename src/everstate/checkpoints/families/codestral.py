"""Codestral-Mamba as Mistral publishes it: `params.json` and `consolidated.safetensors`, in names of mamba_ssm.

`params.json` leaves the width of a head and of the state open; they follow from the shapes of the tensors.
"""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Shapes
from everstate.checkpoints.families.mamba_ssm import model_names
from everstate.checkpoints.families.settings import Settings
from everstate.core.errors import CheckpointError
from everstate.models import ModelConfig

MIXER = "model.backbone.layers.0.mixer"


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    d_model, ngroups = settings.integer("dim", "d_model"), settings.integer("n_groups", "ngroups", default=1)
    vocab, multiple = settings.integer("vocab_size"), settings.integer("pad_vocab_size_multiple", default=1)
    settings.only(rms_norm=True)
    missing = [name for name in ("out_proj.weight", "A_log", "conv1d.weight") if f"{MIXER}.{name}" not in shapes]
    if missing:
        raise settings.error(f"the sizes of the heads follow from tensor {MIXER}.{missing[0]}, which is missing")
    d_inner, (nheads,) = shapes[f"{MIXER}.out_proj.weight"][1], shapes[f"{MIXER}.A_log"]
    channels, _, d_conv = shapes[f"{MIXER}.conv1d.weight"]
    ssm = {
        "type": "mamba2",
        "d_inner": d_inner,
        "headdim": d_inner // nheads,
        "d_state": (channels - d_inner) // 2 // ngroups,
        "d_conv": d_conv,
        "ngroups": ngroups,
        "bias": f"{MIXER}.in_proj.bias" in shapes,
        "conv_bias": f"{MIXER}.conv1d.bias" in shapes,
    }
    return ModelConfig(
        d_model=d_model,
        vocab_size=-(-vocab // multiple) * multiple,
        layout=f"{settings.integer('n_layers', 'n_layer')} * ssm",
        mixers={"ssm": ssm},
        tie_embeddings=settings.flag("tie_embeddings", default=False) or "model.lm_head.weight" not in shapes,
    )


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    if any(block["type"] != "mamba2" for block in blocks):
        raise CheckpointError(f"layout {config.layout!r} has other layers than Mamba-2; write it as 'everstate'")
    return {
        "dim": config.d_model,
        "n_layers": len(blocks),
        "vocab_size": config.vocab_size,
        "n_groups": blocks[0]["ngroups"],
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
        "model_type": "mamba",
    }


def names(config: ModelConfig) -> Names:
    return model_names(config, "model.")


FAMILY = Family(
    "codestral", read, write, names, stores_tied_head=True, config_file="params.json",
    weights_file="consolidated.safetensors",
)  # fmt: skip
