"""The format of the package `mamba_ssm`, in which its authors publish: Mamba-1, Mamba-2 (and attention), Mamba-3.

The config has no `model_type`; which mixer it is says `ssm_cfg.layer`. `A_activation` inside `ssm_cfg` is our key.
Checkpoints since June 2026 want the heavy tail and carry no mark of it, so it is the default here; `everstate verify
--text` compares the two.
"""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families.base import Blocks, Family, Names, Part, Shapes, convolution, under
from everstate.checkpoints.families.dialect import (
    ATTENTION,
    MAMBA1,
    MAMBA2,
    SSM,
    dt_limit,
    expand_written,
    limit_written,
    tied,
    used,
    without_none,
)
from everstate.checkpoints.families.settings import Settings
from everstate.core.errors import CheckpointError
from everstate.models import ModelConfig
from everstate.models.layout import write_layout

A_ACTIVATIONS = {"heavy_tail": "heavy_tail", "softplus": "softplus"}
MLP_MULTIPLE = 128
"""The hidden width of a gated MLP is rounded up to a multiple of this."""

MAMBA3: Names = {
    name: name
    for name in (
        "in_proj", "dt_bias", "B_bias", "C_bias", "B_norm", "C_norm", "D", "mimo_x", "mimo_z", "mimo_o", "norm",
        "out_proj",
    )
}  # fmt: skip
SSM_NAMES: dict[str, Names] = {"mamba1": MAMBA1, "mamba2": MAMBA2, "mamba3": MAMBA3}


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    d_model = settings.integer("d_model")
    vocab, multiple = settings.integer("vocab_size"), settings.integer("pad_vocab_size_multiple", default=8)
    eps = settings.number("norm_epsilon", default=1e-5)
    mixers: dict[str, dict[str, Any]] = {SSM: _ssm(settings.nested("ssm_cfg"), d_model)}
    n_layer = settings.integer("n_layer")
    attention = set(settings.indices("attn_layer_idx") or ())
    heads = settings.nested("attn_cfg")
    if attention:
        mixers[ATTENTION] = _attention(heads, d_model)
    heads.closed()
    d_hidden = settings.count("d_intermediate", default=0)
    if d_hidden:
        mixers["mlp"] = {"type": "mlp", "d_hidden": -(-d_hidden // MLP_MULTIPLE) * MLP_MULTIPLE}
    kinds = [ATTENTION if i in attention else SSM for i in range(n_layer)]
    layers = [name for kind in kinds for name in ([kind, "mlp"] if d_hidden else [kind])]
    return ModelConfig(
        d_model=d_model,
        vocab_size=-(-vocab // multiple) * multiple,
        layout=write_layout(layers),
        mixers=used(mixers, layers),
        norm="rms" if settings.flag("rms_norm", default=True) else "layer",
        norm_eps=eps,
        tie_embeddings=tied(settings, shapes, "lm_head.weight", default=True),
    )


def _ssm(settings: Settings, d_model: int) -> dict[str, Any]:
    """The table of the mixers in `ssm_cfg`, whose defaults are those of the package."""
    kind = settings.choice(
        "layer", default="Mamba1", among={"Mamba1": "mamba1", "Mamba2": "mamba2", "Mamba3": "mamba3"}
    )
    settings.ignore(
        "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "use_fast_path", "use_mem_eff_path"
    )
    table = {"mamba1": _mamba1, "mamba2": _mamba2, "mamba3": _mamba3}[kind](settings, d_model)
    settings.closed()
    return {"type": kind, **table}


def _mamba1(settings: Settings, d_model: int) -> dict[str, Any]:
    return {
        "d_inner": int(settings.number("expand", default=2.0) * d_model),
        "d_state": settings.integer("d_state", default=16),
        "d_conv": settings.integer("d_conv", default=4),
        "dt_rank": settings.take("dt_rank", default="auto"),
        "bias": settings.flag("bias", default=False),
        "conv_bias": settings.flag("conv_bias", default=True),
    }


def _mamba2(settings: Settings, d_model: int) -> dict[str, Any]:
    d_inner = int(settings.number("expand", default=2.0) * d_model)
    settings.only(d_ssm=d_inner)
    return {
        "d_inner": d_inner,
        "d_state": settings.integer("d_state", default=128),
        "d_conv": settings.integer("d_conv", default=4),
        "headdim": settings.integer("headdim", default=64),
        "ngroups": settings.integer("ngroups", default=1),
        "D_has_hdim": settings.flag("D_has_hdim", default=False),
        "norm": settings.flag("rmsnorm", default=True),
        "norm_before_gate": settings.flag("norm_before_gate", default=False),
        "dt_limit": dt_limit(settings),
        "bias": settings.flag("bias", default=False),
        "conv_bias": settings.flag("conv_bias", default=True),
    }


def _mamba3(settings: Settings, d_model: int) -> dict[str, Any]:
    settings.ignore("A_floor_init", "dropout")
    mimo = settings.flag("is_mimo", default=False)
    rank = settings.integer("mimo_rank", default=4)
    return {
        "expand": settings.integer("expand", default=2),
        "d_state": settings.integer("d_state", default=128),
        "headdim": settings.integer("headdim", default=64),
        "ngroups": settings.integer("ngroups", default=1),
        "rope_fraction": settings.number("rope_fraction", default=0.5),
        "A_floor": settings.number("A_floor", default=1e-4),
        "A_activation": settings.choice("A_activation", default="heavy_tail", among=A_ACTIVATIONS),
        "is_mimo": mimo,
        **({"mimo_rank": rank} if mimo else {}),
        "out_norm": settings.flag("is_outproj_norm", default=False),
    }  # fmt: skip


def _attention(settings: Settings, d_model: int) -> dict[str, Any]:
    settings.only(causal=True, rotary_interleaved=False, mlp_dim=0)
    nheads = settings.integer("num_heads")
    head_dim = settings.integer("head_dim", default=d_model // nheads)
    rotary = settings.count("rotary_emb_dim", default=0)
    theta = settings.number("rotary_emb_base", default=10_000.0)
    d_conv = settings.count("d_conv", default=0)
    return without_none(
        {
            "type": "attention",
            "nheads": nheads,
            "nheads_kv": settings.integer("num_heads_kv", default=nheads),
            "head_dim": head_dim,
            "rope_theta": theta if rotary else None,
            "rotary_fraction": rotary / head_dim if rotary else None,
            "scale": settings.take("softmax_scale"),
            "bias": settings.flag("qkv_proj_bias", default=True),
            "out_bias": settings.flag("out_proj_bias", default=True),
            "d_conv": d_conv or None,
        }
    )


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    mlp = next((block for block in blocks if block["type"] == "mlp"), None)
    layers = [block for block in blocks if block["type"] != "mlp"]
    heads = [i for i, block in enumerate(layers) if block["type"] == "attention"]
    ssm = next((block for block in layers if block["type"] in SSM_NAMES), None)
    if not (ssm or heads) or (mlp and mlp["d_hidden"] % MLP_MULTIPLE):
        raise CheckpointError(
            f"layout {config.layout!r} is none of mamba_ssm, which has Mamba or attention layers and MLPs "
            f"of a width that is a multiple of {MLP_MULTIPLE}; write it as 'everstate'"
        )
    return {
        "d_model": config.d_model,
        "d_intermediate": mlp["d_hidden"] if mlp else 0,
        "n_layer": len(layers),
        "vocab_size": config.vocab_size,
        "ssm_cfg": _ssm_written(ssm, config.d_model) if ssm else {},
        "attn_layer_idx": heads,
        "attn_cfg": _attention_written(layers[heads[0]]) if heads else {},
        "rms_norm": config.norm == "rms",
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
        **({"norm_epsilon": config.norm_eps} if config.norm_eps != 1e-5 else {}),
    }


def _ssm_written(ssm: dict[str, Any], d_model: int) -> dict[str, Any]:
    shared = ("d_state", "d_conv", "headdim", "ngroups", "dt_rank", "conv_bias", "bias")
    same: dict[str, Any] = {key: ssm[key] for key in shared if key in ssm}
    match ssm["type"]:
        case "mamba1":
            return {"layer": "Mamba1", "expand": expand_written(ssm["d_inner"], d_model), **same}
        case "mamba2":
            own = {
                "expand": expand_written(ssm["d_inner"], d_model),
                "D_has_hdim": ssm["D_has_hdim"],
                "rmsnorm": ssm["norm"],
                "norm_before_gate": ssm["norm_before_gate"],
                "dt_limit": limit_written(ssm["dt_limit"]),
            }
            return without_none({"layer": "Mamba2", **same, **own})
    own = {key: ssm[key] for key in ("expand", "rope_fraction", "A_floor", "is_mimo", "mimo_rank")}
    if ssm["A_activation"] != "heavy_tail":  # a key that mamba_ssm itself does not know
        own["A_activation"] = ssm["A_activation"]
    return {"layer": "Mamba3", **same, **own, "is_outproj_norm": ssm["out_norm"]}


def _attention_written(block: dict[str, Any]) -> dict[str, Any]:
    rotary = 0 if block["rope_theta"] is None else round(block["rotary_fraction"] * block["head_dim"])
    return {
        "causal": True,
        "d_conv": block["d_conv"] or 0,
        "head_dim": block["head_dim"],
        "num_heads": block["nheads"],
        "num_heads_kv": block["nheads_kv"],
        "out_proj_bias": block["out_bias"],
        "qkv_proj_bias": block["bias"],
        "rotary_emb_dim": rotary,
        **({"rotary_emb_base": block["rope_theta"]} if rotary else {}),
    }


def names(config: ModelConfig) -> Names:
    return model_names(config, "")


def model_names(config: ModelConfig, prefix: str) -> Names:
    """The names of a model, all of which begin with `prefix`."""
    model = f"{prefix}backbone"
    table: Names = {"embedding": f"{model}.embedding", "norm": f"{model}.norm_f", "head": f"{prefix}lm_head"}
    layer = -1
    for i, name in enumerate(config.blocks):
        settings = config.mixer_table(name)
        own = settings["type"] == "mlp"
        layer += not own
        place = f"{model}.layers.{layer}"
        table |= under(f"blocks.{i}", place, {"norm": "norm2" if own else "norm"})
        table |= under(f"blocks.{i}.mixer", f"{place}.{'mlp' if own else 'mixer'}", _mixer_names(settings))
    return table


def _mixer_names(settings: dict[str, Any]) -> Names:
    match settings["type"]:
        case "mlp":  # fc1 makes [up | gate], and we have the gate first
            width = settings["d_hidden"]
            halves = (Part("fc1", of=slice(width, 2 * width)), Part("fc1", of=slice(0, width)))
            return {"in_proj": halves, "out_proj": "fc2"}
        case "attention":
            return _attention_names(settings)
    return SSM_NAMES[settings["type"]]


def _attention_names(settings: dict[str, Any]) -> Names:
    """`in_proj` makes [q | k | v]."""
    q, kv = (settings[key] * settings["head_dim"] for key in ("nheads", "nheads_kv"))
    return {
        "q_proj": Part("in_proj", of=slice(0, q)),
        "k_proj": Part("in_proj", of=slice(q, q + kv)),
        "v_proj": Part("in_proj", of=slice(q + kv, q + 2 * kv)),
        "conv_weight": Part("conv1d.weight", published=convolution),
        "conv_bias": "conv1d.bias",
        "out_proj": "out_proj",
    }


NEOX, LLAMA = "EleutherAI/gpt-neox-20b", "meta-llama/Llama-3.1-8B"

FAMILY = Family(
    "mamba_ssm", read, write, names, tokenizers=((50280, NEOX), (50288, NEOX), (128256, LLAMA)), stores_tied_head=True,
    weights_file="pytorch_model.bin",
)  # fmt: skip
