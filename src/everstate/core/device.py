"""Devices that a user names."""

from __future__ import annotations

import torch

from everstate.core.errors import ConfigError


def device_named(name: torch.device | str, setting: str = "device") -> torch.device:
    """The device of that name. Raises `ConfigError`, which names the `setting`, for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{setting} = {name!r} names no device; give cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        there = "no GPU here; give cpu" if count == 0 else f"{count} here; give cpu, or cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"{setting} = {str(name)!r}, and PyTorch sees {there}")
    return device
