"""Published formats. Each family is one file, and one line here."""

from __future__ import annotations

from everstate.checkpoints.families.base import Family
from everstate.core.registry import Registry

FAMILIES: Registry[Family] = Registry("model family")
"""Every family by its name; for most that is the `model_type` of the published config."""

FAMILIES.add("mamba", "everstate.checkpoints.families.mamba:FAMILY")
FAMILIES.add("falcon_mamba", "everstate.checkpoints.families.falcon_mamba:FAMILY")
FAMILIES.add("mamba2", "everstate.checkpoints.families.mamba2:FAMILY")
FAMILIES.add("mamba_ssm", "everstate.checkpoints.families.mamba_ssm:FAMILY")
FAMILIES.add("codestral", "everstate.checkpoints.families.codestral:FAMILY")
FAMILIES.add("jamba", "everstate.checkpoints.families.jamba:FAMILY")
FAMILIES.add("bamba", "everstate.checkpoints.families.bamba:FAMILY")
FAMILIES.add("granitemoehybrid", "everstate.checkpoints.families.granitemoehybrid:FAMILY")
FAMILIES.add("nemotron_h", "everstate.checkpoints.families.nemotron_h:FAMILY")
FAMILIES.add("falcon_h1", "everstate.checkpoints.families.falcon_h1:FAMILY")
FAMILIES.add("lfm2", "everstate.checkpoints.families.lfm2:FAMILY")
FAMILIES.add("lfm2_moe", "everstate.checkpoints.families.lfm2_moe:FAMILY")
FAMILIES.add("recurrent_gemma", "everstate.checkpoints.families.recurrent_gemma:FAMILY")
FAMILIES.add("qwen3_next", "everstate.checkpoints.families.qwen3_next:FAMILY")
FAMILIES.add("qwen3_5", "everstate.checkpoints.families.qwen3_5:QWEN3_5")
FAMILIES.add("qwen3_5_text", "everstate.checkpoints.families.qwen3_5:QWEN3_5_TEXT")
FAMILIES.add("qwen3_5_moe", "everstate.checkpoints.families.qwen3_5:QWEN3_5_MOE")
FAMILIES.add("qwen3_5_moe_text", "everstate.checkpoints.families.qwen3_5:QWEN3_5_MOE_TEXT")
FAMILIES.add("olmo_hybrid", "everstate.checkpoints.families.olmo_hybrid:FAMILY")
FAMILIES.add("kimi_linear", "everstate.checkpoints.families.kimi_linear:FAMILY")
