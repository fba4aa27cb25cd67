"""GGUF files as llama.cpp's converter writes them: what it folds, merges, splits and permutes, written once more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

NAMES = {
    "embeddings": "token_embd", "embed_tokens": "token_embd", "norm_f": "output_norm", "final_layernorm": "output_norm",
    "lm_head": "output", "in_proj": "ssm_in", "conv1d": "ssm_conv1d", "x_proj": "ssm_x", "dt_proj": "ssm_dt",
    "out_proj": "ssm_out", "dt_layernorm": "ssm_dt_norm", "b_layernorm": "ssm_b_norm", "c_layernorm": "ssm_c_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm", "pre_ff_layernorm": "ffn_norm",
    "post_attention_layernorm": "ffn_norm", "router": "ffn_gate_inp", "gate": "ffn_gate_inp",
    "fc1_latent_proj": "ffn_latent_down", "fc2_latent_proj": "ffn_latent_up",
}  # fmt: skip
PERMUTED = ("granitehybrid", "granite", "nemotron_h", "nemotron_h_moe")


def write(path: Path, architecture: str, config: dict[str, Any], tensors: dict[str, Tensor], kind: str = "F32") -> None:
    """Write published tensors; `kind` is the type of the numbers of matrices."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields(architecture, config, tensors).items():
        add(writer, f"{architecture}.{name}", value)
    wanted = gguf.GGMLQuantizationType[kind]
    for name, tensor in converted(architecture, config, tensors).items():
        array = tensor.float().contiguous().numpy()
        if kind == "F32" or tensor.ndim < 2 or "ssm" in name or "inp" in name:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case list():
            writer.add_array(name, value)


def fields(architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a config."""
    get = lambda *names: next((config[name] for name in names if config.get(name) is not None), None)
    layers = get("num_hidden_layers")
    inner = next(
        (
            t.shape[1]
            for name, t in tensors.items()
            if name.endswith(("mixer.out_proj.weight", "mamba.out_proj.weight"))
        ),
        64,
    )
    heads = get("num_heads", "mamba_num_heads", "mamba_n_heads")
    attends = [any(f"layers.{i}." in name and "q_proj" in name for name in tensors) for i in range(layers)]
    eps = get("layer_norm_epsilon", "rms_norm_eps")
    kv_heads = [config["num_key_value_heads"] if yes else 0 for yes in attends] if any(attends) else None
    found = {
        "block_count": layers,
        "embedding_length": config["hidden_size"],
        "attention.layer_norm_rms_epsilon": eps,
        "attention.head_count": get("num_attention_heads"),
        "attention.head_count_kv": kv_heads,
        "attention.key_length": get("head_dim") if "nemotron" in architecture or "falcon" in architecture else None,
        "feed_forward_length": get("intermediate_size"),
        "ssm.conv_kernel": get("conv_kernel", "mamba_d_conv") or 4,
        "ssm.inner_size": inner,
        "ssm.state_size": get("state_size", "ssm_state_size", "mamba_d_state"),
        "ssm.time_step_rank": heads or dt_rank(tensors),
        "ssm.group_count": get("n_groups", "mamba_n_groups"),
        "ssm.dt_b_c_rms": config["model_type"] == "falcon_mamba",
        "rope.freq_base": float(get("rope_theta") or 1e4),
        "expert_count": get("num_experts", "num_local_experts", "n_routed_experts"),
        "expert_used_count": get("num_experts_per_tok"),
        "expert_feed_forward_length": get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": get("moe_shared_expert_intermediate_size"),
        "expert_weights_scale": get("routed_scaling_factor"),
        "expert_group_count": get("n_group"),
        "expert_group_used_count": get("topk_group"),
        "moe_latent_size": get("moe_latent_size"),
        "embedding_scale": get("embedding_multiplier") if "granite" in architecture else None,
        "residual_scale": get("residual_multiplier"),
        "attention.scale": get("attention_multiplier"),
        "logit_scale": get("logits_scaling"),
        "rope.scaling.finetuned": config["model_type"] == "bamba" or get("position_embedding_type") == "rope",
    }  # fmt: skip
    if config["model_type"] == "bamba":
        found["rope.dimension_count"] = config["hidden_size"] // config["num_attention_heads"] // 2
    return {name: value for name, value in found.items() if value is not None}


def dt_rank(tensors: dict[str, Tensor]) -> int:
    return next((tensor.shape[1] for name, tensor in tensors.items() if name.endswith("dt_proj.weight")), 1)


def converted(architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if architecture == "falcon-h1":
            tensor = folded(name, tensor, config)
        layer = re.search(r"layers\.(\d+)\.", name)
        block = f"blk.{layer[1]}." if layer else ""
        if expert := re.search(r"experts\.(\d+)\.(\w+)\.weight", name):
            stacks.setdefault(f"{block}{NAMES[expert[2]]}_exps.weight", []).append(tensor)
            continue
        found |= {f"{block}{new}": value for new, value in renamed(architecture, config, name, tensor)}
    return found | {name: torch.stack(stack) for name, stack in stacks.items()}


def renamed(architecture: str, config: dict[str, Any], name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """One tensor, or the two that it is split into."""
    module, _, kind = name.rpartition(".")
    own = module.rpartition(".")[2]
    if name.endswith("A_log"):
        return [("ssm_a", -torch.exp(tensor) if tensor.ndim == 2 else -torch.exp(tensor)[:, None])]
    if name.endswith(".D"):
        per_channel = "mamba1" if architecture in ("mamba", "jamba") else ""
        return [("ssm_d", tensor if per_channel else tensor[:, None])]
    if name.endswith("dt_bias"):
        return [("ssm_dt.bias", tensor)]
    if name.endswith("e_score_correction_bias"):
        return [("exp_probs_b.bias", tensor)]
    if "linear" in own:
        return granite_channel(config, name, tensor)
    if own == "layer":  # the router of Granite
        return [("ffn_gate_inp.weight", tensor)]
    if own == "norm":
        return [norm(architecture, config, name, tensor)]
    if own == "conv1d" and kind == "weight":
        tensor = tensor.squeeze(1)
    if own in ("q_proj", "k_proj") and architecture in PERMUTED:
        heads = config["num_attention_heads" if own == "q_proj" else "num_key_value_heads"]
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    end = "_shexp" if "shared_experts" in name else ""
    return [(f"{NAMES[own]}{end}.{kind}", tensor)]


def norm(architecture: str, config: dict[str, Any], name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if "layers" not in name:
        return "output_norm.weight", tensor
    if name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
        groups = config.get("n_groups") or config.get("mamba_n_groups") or 1
        return "ssm_norm.weight", tensor.view(groups, -1)
    return "attn_norm.weight", tensor


def granite_channel(config: dict[str, Any], name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    end = "_exps" if "block_sparse" in name else "_shexp" if config["num_local_experts"] else ""
    if "output_linear" in name:
        return [(f"ffn_down{end}.weight", tensor)]
    gate, up = tensor.chunk(2, -2)
    return [(f"ffn_gate{end}.weight", gate), (f"ffn_up{end}.weight", up)]


def folded(name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """A weight of Falcon-H1 times its multipliers."""
    if not name.endswith("weight") or "conv1d" in name:
        return tensor
    attention = config["attention_in_multiplier"]
    gate, down = config["mlp_multipliers"]
    factors = {
        "gate_proj": gate, "down_proj": down, "q_proj": attention, "v_proj": attention,
        "k_proj": attention * config["key_multiplier"], "o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"], "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }  # fmt: skip
    own = name.split(".")[-2]
    if own == "in_proj":
        inner, state = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
        widths = [inner, inner, state, state, config["mamba_n_heads"]]
        rows = [torch.full((w,), m) for w, m in zip(widths, config["ssm_multipliers"], strict=True)]
        return tensor * config["ssm_in_multiplier"] * torch.cat(rows)[:, None]
    return tensor * factors.get(own, 1.0)
