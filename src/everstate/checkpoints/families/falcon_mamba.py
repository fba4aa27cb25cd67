"""Falcon-Mamba (`model_type` "falcon_mamba"): Mamba-1 with norms without a weight on dt, B and C."""

from __future__ import annotations

from typing import Any

from everstate.checkpoints.families import mamba
from everstate.checkpoints.families.base import Blocks, Family, Shapes
from everstate.checkpoints.families.dialect import tied
from everstate.checkpoints.families.settings import Settings
from everstate.models import ModelConfig


def read(settings: Settings, shapes: Shapes) -> ModelConfig:
    settings.ignore("use_falcon_mambapy")
    norms = {"dt_bc_norm": "weightless", "dt_bc_norm_eps": settings.number("mixer_rms_eps", default=1e-6)}
    return mamba.mamba1_model(settings, tied(settings, shapes, "lm_head.weight", default=True), norms)


def write(config: ModelConfig, blocks: Blocks) -> dict[str, Any]:
    own: dict[str, Any] = {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"]}
    own["expand"] = max(blocks[0]["d_inner"] // config.d_model, 1)  # a whole number there, which nobody obeys
    return {**mamba.write(config, blocks), **own, "mixer_rms_eps": blocks[0]["dt_bc_norm_eps"]}


FAMILY = Family("falcon_mamba", read, write, mamba.names)
