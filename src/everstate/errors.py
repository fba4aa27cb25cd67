"""The errors that users meet; see `everstate.core.errors`."""

from __future__ import annotations

from everstate.core.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    EverstateError,
    RequestError,
    TokenizerError,
    TrainingError,
)

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EverstateError",
    "RequestError",
    "TokenizerError",
    "TrainingError",
]
