"""The whole models that the benchmarks make, by name: one kind of layer in a published size, or a published hybrid."""

from __future__ import annotations

from typing import Any

from everstate.core.errors import ConfigError
from everstate.models import ModelConfig

WIDTHS = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
"""Width and layers of the published sizes."""
KINDS = ("mamba1", "mamba2", "mamba3")
VOCABULARY = 50_288

HYBRIDS: dict[str, dict[str, Any]] = {
    "granite4-h-tiny": {
        "d_model": 1536,
        "vocab_size": 100_352,
        "layout": "5 * (ssm moe) attn moe 3 * (9 * (ssm moe) attn moe) 4 * (ssm moe)",
        "mixers": {
            "ssm": {"type": "mamba2", "d_inner": 3072, "headdim": 64, "d_state": 128},
            "attn": {"type": "attention", "nheads": 12, "nheads_kv": 4, "head_dim": 128, "scale": 1 / 128},
            "moe": {
                "type": "moe", "nexperts": 64, "top_k": 6, "d_hidden": 512, "d_shared": 1024, "score": "topk_softmax",
            },
        },
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logit_multiplier": 1 / 6,
    },
    "falcon-h1-1.5b": {
        "d_model": 2048,
        "vocab_size": 65_537,
        "layout": "24 * (both mlp)",
        "mixers": {
            "both": {
                "type": "parallel",
                "mixers": {
                    "ssm": {
                        "type": "mamba2", "d_inner": 3072, "headdim": 64, "d_state": 256, "norm": False,
                        "in_multiplier": 1.25, "multipliers": [0.35, 0.25, 0.35, 0.5, 0.35], "out_multiplier": 0.24,
                    },
                    "attn": {
                        "type": "attention", "nheads": 8, "nheads_kv": 2, "head_dim": 128, "rope_theta": 1e11,
                        "key_multiplier": 0.39, "out_multiplier": 0.94,
                    },
                },
            },
            "mlp": {"type": "mlp", "d_hidden": 4608, "gate_multiplier": 0.88, "out_multiplier": 0.59},
        },
        "embedding_multiplier": 5.66, "logit_multiplier": 0.04, "tie_embeddings": False,
    },
    "nemotron-h-8b": {
        "d_model": 4096,
        "vocab_size": 131_072,
        "layout": "3 * (ssm mlp) ssm attn mlp 3 * (4 * (ssm mlp) ssm attn mlp) 5 * (ssm mlp)",
        "mixers": {
            "ssm": {"type": "mamba2", "d_inner": 8192, "headdim": 64, "d_state": 128, "ngroups": 8},
            "attn": {"type": "attention", "nheads": 32, "nheads_kv": 8, "head_dim": 128},
            "mlp": {"type": "mlp", "d_hidden": 21_504, "activation": "relu2", "gated": False},
        },
        "tie_embeddings": False,
    },
}  # fmt: skip
"""Layers and sizes of published hybrids, whose numbers of parameters they have; multipliers are rounded."""

TINY_WIDTH, TINY_LAYERS = 64, 2
TINY = {
    "d_inner": 128, "headdim": 16, "d_state": 16, "nheads": 4, "nheads_kv": 2, "head_dim": 16, "nexperts": 4,
    "top_k": 2, "d_hidden": 32, "d_shared": 32,
}  # fmt: skip
"""What the sizes inside a layer are in a tiny model."""


def config_of(name: str, *, quick: bool = False) -> ModelConfig:
    """The model of this name, `mamba2-1.3b` or one of `HYBRIDS`; `quick` makes it tiny. Raises `ConfigError`."""
    if name in HYBRIDS:
        table = HYBRIDS[name]
        # Of a tiny one each block once.
        once = {"d_model": TINY_WIDTH, "vocab_size": VOCABULARY, "layout": " ".join(table["mixers"])}
        return ModelConfig.parse({**_tiny(table), **once} if quick else table)
    kind, _, size = name.partition("-")
    if kind not in KINDS or size not in WIDTHS:
        raise ConfigError(
            f"{name!r} is not one of {', '.join(KINDS)}, a dash, and {', '.join(WIDTHS)}; nor one of "
            f"{', '.join(HYBRIDS)}"
        )
    width, layers = (TINY_WIDTH, TINY_LAYERS) if quick else WIDTHS[size]
    return ModelConfig(d_model=width, vocab_size=VOCABULARY, layout=f"{layers} * ({kind})")


def kind_of(name: str) -> str:
    """What peers know a model by: its kind of layer, or the name of a hybrid."""
    return name if name in HYBRIDS else name.partition("-")[0]


def _tiny(table: dict[str, Any]) -> dict[str, Any]:
    """The same with the sizes of tiny models, in the tables inside it too."""
    return {k: _tiny(v) if isinstance(v, dict) else TINY.get(k, v) for k, v in table.items()}
