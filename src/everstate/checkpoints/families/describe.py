"""A config with nothing left open, so that two ways to write one model compare equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everstate.mixers import Mixer, build_mixer
from everstate.mixers.attention import Attention
from everstate.mixers.base import parse_mixer
from everstate.mixers.gated_delta import GatedDelta
from everstate.mixers.mamba1 import Mamba1
from everstate.mixers.mamba2 import Mamba2
from everstate.mixers.mlp import MLP
from everstate.mixers.moe import MoE
from everstate.mixers.parallel import Parallel
from everstate.mixers.rglru import RGLRU
from everstate.models import ModelConfig

NO_SAY = frozenset({"chunk_size", "context", "dt_min", "dt_max", "dt_init_floor", "A_init_range", "a_init_range"})
"""Settings of speed, of memory, and of initial values: published configs need not repeat them."""


def described(config: ModelConfig) -> list[dict[str, Any]]:
    """The table of each block with every setting that has a say in the outputs, widths instead of "as default"."""
    tables = {name: _complete(config.mixer_table(name), config.d_model) for name in set(config.blocks)}
    return [tables[name] for name in config.blocks]


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """What sets two configs apart, each as `setting: this and that`."""
    fields = [name for name in type(one).model_fields if name not in ("layout", "mixers", "post_norm")]
    found = [
        f"{name}: {getattr(one, name)} and {getattr(other, name)}"
        for name in fields
        if getattr(one, name) != getattr(other, name)
    ]
    blocks, others = described(one), described(other)
    if len(blocks) != len(others):
        return [*found, f"blocks: {len(blocks)} and {len(others)}"]
    for i, (a, b) in enumerate(zip(blocks, others, strict=True)):
        found += [
            f"block {i} {key}: {a.get(key)} and {b.get(key)}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)
        ]
        late = [config.blocks[i] in config.post_norm for config in (one, other)]
        found += [f"block {i} post_norm: {late[0]} and {late[1]}"] if late[0] != late[1] else []
    return found


def _complete(table: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    mixer = build_mixer(table, d_model, device="meta")
    config, _ = parse_mixer(table)
    settings = {key: value for key, value in config.model_dump().items() if key not in NO_SAY}
    return {"type": table["type"], **settings, **_widths(mixer, d_model)}


def _widths(mixer: Mixer, d_model: int) -> dict[str, Any]:
    """What a mixer chose where its table left it open."""
    match mixer:
        case Mamba1():
            return {"expand": None, "d_inner": mixer.d_inner, "dt_rank": mixer.dt_rank}
        case Mamba2():
            return {"expand": None, "d_inner": mixer.d_inner}
        case GatedDelta():
            return {"nheads_k": mixer.nheads_k}
        case RGLRU():
            return {"d_inner": mixer.d_inner}
        case Attention():
            config = mixer.config
            return {
                "nheads": mixer.nheads,
                "nheads_kv": mixer.nheads_kv,
                "head_dim": mixer.head_dim,
                "scale": mixer.head_dim**-0.5 if config.scale is None else config.scale,
                "out_bias": config.bias if config.out_bias is None else config.out_bias,
            }
        case MLP() | MoE():
            return {"d_hidden": mixer.out_proj.weight.shape[-1]}
        case Parallel():
            return {"mixers": {name: _complete(part, d_model) for name, part in mixer.config.mixers.items()}}
    return {}
