"""Everstate: state space models, from the mathematics to the server.

    model = everstate.LM(everstate.ModelConfig(d_model=256, vocab_size=259, layout="4 * (mamba3 mlp)"))

Importing the package imports nothing else: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstate import core, engine, errors, mixers, models, ops, tokenizers, train
    from everstate.checkpoints import export, load, load_model, save
    from everstate.engine import Sampling, Session, generate
    from everstate.models import LM, ModelConfig, cost

__version__ = "0.1.0"

__all__ = [
    "LM",
    "ModelConfig",
    "Sampling",
    "Session",
    "core",
    "cost",
    "engine",
    "errors",
    "export",
    "generate",
    "load",
    "load_model",
    "mixers",
    "models",
    "ops",
    "save",
    "tokenizers",
    "train",
]

_HOMES = {
    "LM": "models",
    "ModelConfig": "models",
    "Sampling": "engine",
    "Session": "engine",
    "cost": "models",
    "export": "checkpoints",
    "generate": "engine",
    "load": "checkpoints",
    "load_model": "checkpoints",
    "save": "checkpoints",
}
"""Where each public name lives."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in __all__ or name in ("bench", "checkpoints", "cli", "data"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
