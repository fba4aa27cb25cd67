"""llama.cpp's architectures: for each the published config and the origin of every published tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from everstate.checkpoints.reader.gguf.file import GGUFFile
from everstate.checkpoints.reader.gguf.origin import Origin, halves, log_of_decay
from everstate.core.errors import CheckpointError

Origins: TypeAlias = dict[str, Origin]
Model: TypeAlias = tuple[dict[str, Any], Origins]

SSM: Mapping[str, str] = {
    "ssm_in": "in_proj",
    "ssm_conv1d": "conv1d",
    "ssm_x": "x_proj",
    "ssm_dt": "dt_proj",
    "ssm_out": "out_proj",
}
JAMBA_NORMS = {"ssm_dt_norm": "dt_layernorm", "ssm_b_norm": "b_layernorm", "ssm_c_norm": "c_layernorm"}
ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
GATED = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


def _renamed(file: GGUFFile, layer: int, theirs: str, names: Mapping[str, str]) -> Origins:
    """What of a layer has another name and nothing else, weights and biases."""
    found: Origins = {}
    for ours, name in names.items():
        for kind in ("weight", "bias"):
            tensor = f"blk.{layer}.{ours}.{kind}"
            if file.has(tensor):
                found[f"{theirs}.{name}.{kind}"] = Origin((tensor,))
    return found


def _mamba1(file: GGUFFile, layer: int, theirs: str) -> Origins:
    block = f"blk.{layer}"
    return {
        f"{theirs}.A_log": Origin((f"{block}.ssm_a",), form=log_of_decay),
        f"{theirs}.D": Origin((f"{block}.ssm_d",)),
        **_renamed(file, layer, theirs, {**SSM, **JAMBA_NORMS}),
    }


def _mamba2(file: GGUFFile, layer: int, theirs: str) -> Origins:
    block = f"blk.{layer}"
    found = {
        f"{theirs}.A_log": Origin((f"{block}.ssm_a",), flat=True, form=log_of_decay),
        f"{theirs}.D": Origin((f"{block}.ssm_d",), flat=True),
        f"{theirs}.dt_bias": Origin((f"{block}.ssm_dt.bias",)),
    }
    if file.has(f"{block}.ssm_norm.weight"):
        found[f"{theirs}.norm.weight"] = Origin((f"{block}.ssm_norm.weight",), flat=True)
    return found | _renamed(file, layer, theirs, {ours: name for ours, name in SSM.items() if ours != "ssm_dt"})


def _attention(file: GGUFFile, layer: int, theirs: str, *, permuted: bool) -> Origins:
    """`permuted`: whether the pairs of queries and keys that turn together were laid side by side."""
    found = _renamed(file, layer, theirs, ATTENTION)
    if permuted:
        heads = {"q_proj": file.field("attention.head_count"), "k_proj": _heads_kv(file)}
        for name, origin in found.items():
            projection = name.split(".")[-2]
            if projection in heads:
                found[name] = origin._replace(form=halves(heads[projection]))
    return found


def _experts(file: GGUFFile, layer: int, theirs: str, names: Mapping[str, str]) -> Origins:
    """The experts of a layer, published one by one."""
    count = file.field("expert_count")
    return {
        f"{theirs}.experts.{expert}.{name}.weight": Origin((f"blk.{layer}.{ours}_exps.weight",), expert=expert)
        for ours, name in names.items()
        for expert in range(count)
    }


def _ends(file: GGUFFile, embedding: str, norm: str) -> Origins:
    """The tensors before the first layer and after the last."""
    found = {f"{embedding}.weight": Origin(("token_embd.weight",)), f"{norm}.weight": Origin(("output_norm.weight",))}
    return found | ({"lm_head.weight": Origin(("output.weight",))} if file.has("output.weight") else {})


def _shared(file: GGUFFile, model_type: str) -> dict[str, Any]:
    """Settings that every architecture has."""
    eps = "attention.layer_norm_rms_epsilon"
    return {
        "model_type": model_type,
        "hidden_size": file.field("embedding_length"),
        "vocab_size": file.rows("token_embd.weight"),
        "num_hidden_layers": file.layers,
        "tie_word_embeddings": not file.has("output.weight"),
        "rms_norm_eps": file.field(eps, file.field("attention.layer_norm_epsilon", 1e-5)),
    }


def _heads_kv(file: GGUFFile) -> int:
    """Heads of keys and values in the layers that have any."""
    counts = file.field("attention.head_count_kv")
    return max(counts) if isinstance(counts, list) else int(counts)


def _heads(file: GGUFFile) -> dict[str, int]:
    return {"num_attention_heads": file.field("attention.head_count"), "num_key_value_heads": _heads_kv(file)}


def _mamba2_settings(file: GGUFFile) -> dict[str, Any]:
    """The `mamba_*` settings of hybrids."""
    inner, heads = file.field("ssm.inner_size"), file.field("ssm.time_step_rank")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_d_state": file.field("ssm.state_size"),
        "mamba_d_conv": file.field("ssm.conv_kernel"),
        "mamba_n_groups": file.field("ssm.group_count"),
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in file.tensors),
    }


def mamba(file: GGUFFile) -> Model:
    """Mamba and Falcon-Mamba."""
    falcon = bool(file.field("ssm.dt_b_c_rms", False))
    config = _shared(file, "falcon_mamba" if falcon else "mamba")
    config |= {
        "layer_norm_epsilon": config.pop("rms_norm_eps"),
        "intermediate_size": file.field("ssm.inner_size"),
        "state_size": file.field("ssm.state_size"),
        "conv_kernel": file.field("ssm.conv_kernel"),
        "time_step_rank": file.field("ssm.time_step_rank"),
        "use_conv_bias": file.has("blk.0.ssm_conv1d.bias"),
        "use_bias": file.has("blk.0.ssm_in.bias"),
    }
    origins = _ends(file, "backbone.embeddings", "backbone.norm_f")
    for i in range(file.layers):
        layer = f"backbone.layers.{i}"
        origins |= _mamba1(file, i, f"{layer}.mixer") | _renamed(file, i, layer, {"attn_norm": "norm"})
    return config, origins


def mamba2(file: GGUFFile) -> Model:
    """Mamba-2 and Codestral."""
    config, inner, heads = _shared(file, "mamba2"), file.field("ssm.inner_size"), file.field("ssm.time_step_rank")
    config |= {
        "layer_norm_epsilon": config.pop("rms_norm_eps"),
        "num_heads": heads,
        "head_dim": inner // heads,
        "expand": inner / config["hidden_size"],
        "state_size": file.field("ssm.state_size"),
        "n_groups": file.field("ssm.group_count"),
        "conv_kernel": file.field("ssm.conv_kernel"),
        "use_conv_bias": file.has("blk.0.ssm_conv1d.bias"),
        "use_bias": file.has("blk.0.ssm_in.bias"),
    }
    origins = _ends(file, "backbone.embeddings", "backbone.norm_f")
    for i in range(file.layers):
        layer = f"backbone.layers.{i}"
        origins |= _mamba2(file, i, f"{layer}.mixer") | _renamed(file, i, layer, {"attn_norm": "norm"})
    return config, origins


def jamba(file: GGUFFile) -> Model:
    """Jamba, dense and with experts."""
    layers = range(file.layers)
    kinds = ["attention" if file.has(f"blk.{i}.attn_q.weight") else "mamba" for i in layers]
    experts = [file.has(f"blk.{i}.ffn_gate_exps.weight") for i in layers]
    config = _shared(file, "jamba")
    config |= {
        **_heads(file),
        "intermediate_size": file.field("feed_forward_length"),
        "layers_block_type": kinds,
        "layers_num_experts": [file.field("expert_count") if some else 1 for some in experts],
        "num_experts": max(file.field("expert_count", 1), 1),
        "num_experts_per_tok": max(file.field("expert_used_count", 1), 1),
        "mamba_expand": file.field("ssm.inner_size") / config["hidden_size"],
        "mamba_d_state": file.field("ssm.state_size"),
        "mamba_d_conv": file.field("ssm.conv_kernel"),
        "mamba_dt_rank": file.field("ssm.time_step_rank"),
    }
    origins = _ends(file, "model.embed_tokens", "model.final_layernorm")
    for i, kind, some in zip(layers, kinds, experts, strict=True):
        layer = f"model.layers.{i}"
        if kind == "mamba":
            origins |= _mamba1(file, i, f"{layer}.mamba")
        else:
            origins |= _attention(file, i, f"{layer}.self_attn", permuted=False)
        channel = f"{layer}.feed_forward"
        origins |= _experts(file, i, channel, GATED) if some else _renamed(file, i, channel, GATED)
        origins |= _renamed(file, i, channel, {"ffn_gate_inp": "router"})
        origins |= _renamed(file, i, layer, {"attn_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"})
    return config, origins


def granite(file: GGUFFile) -> Model:
    """Granite 4, hybrid or of attention alone; and Bamba, which the converter writes as a Granite with positions."""
    layers = range(file.layers)
    attention = [i for i in layers if file.has(f"blk.{i}.attn_q.weight")]
    positions = bool(file.field("rope.scaling.finetuned", True))
    if positions and len(attention) < file.layers:
        return _bamba(file, attention)
    config, experts = _shared(file, "granitemoehybrid"), file.field("expert_count", 0)
    shared = "blk.0.ffn_gate_shexp.weight" if experts else "blk.0.ffn_gate.weight"
    config |= {
        **_heads(file),
        "layer_types": ["attention" if i in attention else "mamba" for i in layers],
        "num_local_experts": experts,
        "num_experts_per_tok": file.field("expert_used_count", 0) or None,
        "intermediate_size": file.field("feed_forward_length"),
        "shared_intermediate_size": file.rows(shared),
        "embedding_multiplier": file.field("embedding_scale", 1.0),
        "residual_multiplier": file.field("residual_scale", 1.0),
        "logits_scaling": file.field("logit_scale", 1.0),
        "attention_multiplier": file.field("attention.scale"),
        "position_embedding_type": "rope" if positions else "nope",
        "rope_theta": file.field("rope.freq_base", 10_000.0),
    }
    if len(attention) < file.layers:
        config |= {**_mamba2_settings(file), "mamba_expand": _expand(file)}
    origins = _ends(file, "model.embed_tokens", "model.norm")
    for i in layers:
        layer = f"model.layers.{i}"
        if i in attention:
            origins |= _attention(file, i, f"{layer}.self_attn", permuted=True)
        else:
            origins |= _mamba2(file, i, f"{layer}.mamba")
        origins |= _granite_channel(f"blk.{i}", layer, bool(experts))
        origins |= _renamed(file, i, layer, {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"})
    return config, origins


def _granite_channel(block: str, layer: str, experts: bool) -> Origins:
    """Gates and other halves are published one above the other."""
    end = "_shexp" if experts else ""
    found = {
        f"{layer}.shared_mlp.input_linear.weight": Origin(
            (f"{block}.ffn_gate{end}.weight", f"{block}.ffn_up{end}.weight")
        ),
        f"{layer}.shared_mlp.output_linear.weight": Origin((f"{block}.ffn_down{end}.weight",)),
    }
    if experts:
        moe = f"{layer}.block_sparse_moe"
        found |= {
            f"{moe}.input_linear.weight": Origin((f"{block}.ffn_gate_exps.weight", f"{block}.ffn_up_exps.weight")),
            f"{moe}.output_linear.weight": Origin((f"{block}.ffn_down_exps.weight",)),
            f"{moe}.router.layer.weight": Origin((f"{block}.ffn_gate_inp.weight",)),
        }
    return found


def _bamba(file: GGUFFile, attention: list[int]) -> Model:
    config = _shared(file, "bamba")
    head_dim = config["hidden_size"] // file.field("attention.head_count")
    config |= {
        **_heads(file),
        "attn_layer_indices": attention,
        "intermediate_size": file.field("feed_forward_length"),
        "rope_theta": file.field("rope.freq_base", 10_000.0),
        "partial_rotary_factor": file.field("rope.dimension_count", head_dim) / head_dim,
        **_mamba2_settings(file),
        "mamba_expand": _expand(file),
    }
    origins = _ends(file, "model.embed_tokens", "model.final_layernorm")
    for i in range(file.layers):
        layer = f"model.layers.{i}"
        if i in attention:
            origins |= _attention(file, i, f"{layer}.self_attn", permuted=True)
        else:
            origins |= _mamba2(file, i, f"{layer}.mamba")
        origins |= _renamed(file, i, f"{layer}.feed_forward", GATED)
        origins |= _renamed(file, i, layer, {"attn_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"})
    return config, origins


def _expand(file: GGUFFile) -> int:
    return int(file.field("ssm.inner_size")) // int(file.field("embedding_length"))


def nemotron(file: GGUFFile) -> Model:
    """Nemotron-H and Nemotron 3, dense and with experts."""
    layers, inner, heads = range(file.layers), file.field("ssm.inner_size"), file.field("ssm.time_step_rank")
    kinds = [_nemotron_kind(file, i) for i in layers]
    config = _shared(file, "nemotron_h")
    config |= {
        **_heads(file),
        "head_dim": file.field("attention.key_length"),
        "layers_block_type": kinds,
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "ssm_state_size": file.field("ssm.state_size"),
        "conv_kernel": file.field("ssm.conv_kernel"),
        "n_groups": file.field("ssm.group_count"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in file.tensors),
        **(_nemotron_experts(file) if "moe" in kinds else {}),
    }
    if "mlp" in kinds:
        config["intermediate_size"] = file.rows(f"blk.{kinds.index('mlp')}.ffn_up.weight")
    origins = _ends(file, "backbone.embeddings", "backbone.norm_f")
    for i, kind in enumerate(kinds):
        layer = f"backbone.layers.{i}"
        origins |= _nemotron_layer(file, i, kind, f"{layer}.mixer") | _renamed(file, i, layer, {"attn_norm": "norm"})
    return config, origins


def _nemotron_kind(file: GGUFFile, layer: int) -> str:
    """Each layer is one block, which its tensors tell."""
    marks = {"ssm_in": "mamba", "attn_q": "attention", "ffn_up_exps": "moe", "ffn_up": "mlp"}
    found = next((kind for mark, kind in marks.items() if file.has(f"blk.{layer}.{mark}.weight")), None)
    if found is None:
        raise CheckpointError(f"{file.path}: layer {layer} has none of {', '.join(marks)}; download the file again")
    return found


def _nemotron_experts(file: GGUFFile) -> dict[str, Any]:
    return {
        "n_routed_experts": file.field("expert_count"),
        "n_shared_experts": file.field("expert_shared_count", 1),
        "num_experts_per_tok": file.field("expert_used_count"),
        "moe_intermediate_size": file.field("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": file.field("expert_shared_feed_forward_length"),
        "moe_latent_size": file.field("moe_latent_size", 0) or None,
        "norm_topk_prob": file.field("expert_weights_norm", True),
        "routed_scaling_factor": file.field("expert_weights_scale", 1.0),
        "n_group": file.field("expert_group_count", 1),
        "topk_group": file.field("expert_group_used_count", 1),
    }


def _nemotron_layer(file: GGUFFile, layer: int, kind: str, theirs: str) -> Origins:
    plain = {"ffn_up": "up_proj", "ffn_down": "down_proj"}
    match kind:
        case "mamba":
            return _mamba2(file, layer, theirs)
        case "attention":
            return _attention(file, layer, theirs, permuted=True)
        case "mlp":
            return _renamed(file, layer, theirs, plain)
    shared = {"ffn_up_shexp": "shared_experts.up_proj", "ffn_down_shexp": "shared_experts.down_proj"}
    latent = {"ffn_latent_down": "fc1_latent_proj", "ffn_latent_up": "fc2_latent_proj"}
    return {
        f"{theirs}.gate.e_score_correction_bias": Origin((f"blk.{layer}.exp_probs_b.bias",)),
        **_experts(file, layer, theirs, plain),
        **_renamed(file, layer, theirs, {"ffn_gate_inp": "gate", **shared, **latent}),
    }


def falcon_h1(file: GGUFFile) -> Model:
    """Falcon-H1, whose multipliers the converter folded into the weights, those of the embedding and the head too."""
    if not file.has("output.weight"):
        raise CheckpointError(
            f"{file.path}: a Falcon-H1 whose head is its embedding has lost the multipliers of both in GGUF; use the "
            "safetensors version of the model"
        )
    config = _shared(file, "falcon_h1")
    config |= {
        **_heads(file),
        "head_dim": file.field("attention.key_length"),
        "intermediate_size": file.field("feed_forward_length"),
        "rope_theta": file.field("rope.freq_base"),
        **_mamba2_settings(file),
        "mamba_d_ssm": file.field("ssm.inner_size"),
        "mamba_rms_norm": file.has("blk.0.ssm_norm.weight"),
        "mamba_norm_before_gate": False,
    }
    origins = _ends(file, "model.embed_tokens", "model.final_layernorm")
    for i in range(file.layers):
        layer = f"model.layers.{i}"
        origins |= _mamba2(file, i, f"{layer}.mamba")
        origins |= _attention(file, i, f"{layer}.self_attn", permuted=False)
        origins |= _renamed(file, i, f"{layer}.feed_forward", GATED)
        origins |= _renamed(file, i, layer, {"attn_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"})
        if file.has(f"blk.{i}.ffn_norm"):  # older converters left the ending out
            origins[f"{layer}.pre_ff_layernorm.weight"] = Origin((f"blk.{i}.ffn_norm",))
    return config, origins


ARCHITECTURES: Mapping[str, Callable[[GGUFFile], Model]] = {
    "mamba": mamba,
    "mamba2": mamba2,
    "jamba": jamba,
    "granitehybrid": granite,
    "granite": granite,
    "granitemoe": granite,
    "nemotron_h": nemotron,
    "nemotron_h_moe": nemotron,
    "falcon-h1": falcon_h1,
}
"""By llama.cpp's names."""
