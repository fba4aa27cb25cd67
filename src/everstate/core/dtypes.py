"""The precision policy, in one place: states and decays in float32 whatever the weights are, never autocast."""

from __future__ import annotations

import torch

from everstate.core.errors import ConfigError, did_you_mean

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What states, decays and accumulations are held in: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """The complex counterpart of `state_dtype`."""
    return torch.complex128 if state_dtype(dtype) is torch.float64 else torch.complex64


def dtype_named(name: str) -> torch.dtype:
    """The dtype that a config or a command line names."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; {did_you_mean(name, DTYPES)}")
    return DTYPES[name]
