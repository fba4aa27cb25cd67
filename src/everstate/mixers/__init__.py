"""Layers. Each is one file, and one line here."""

from __future__ import annotations

from everstate.mixers.base import MIXERS, Empty, Mixer, State, build_mixer, step_by_forward

__all__ = ["MIXERS", "Empty", "Mixer", "State", "build_mixer", "step_by_forward"]

MIXERS.add("s4", "everstate.mixers.s4:S4")
MIXERS.add("s4d", "everstate.mixers.s4d:S4D")
MIXERS.add("h3", "everstate.mixers.h3:H3")
MIXERS.add("s5", "everstate.mixers.s5:S5")
MIXERS.add("mamba1", "everstate.mixers.mamba1:Mamba1")
MIXERS.add("mamba2", "everstate.mixers.mamba2:Mamba2")
MIXERS.add("mamba3", "everstate.mixers.mamba3:Mamba3")
MIXERS.add("short_conv", "everstate.mixers.short_conv:ShortConv")
MIXERS.add("rglru", "everstate.mixers.rglru:RGLRU")
MIXERS.add("gated_delta", "everstate.mixers.gated_delta:GatedDelta")
MIXERS.add("attention", "everstate.mixers.attention:Attention")
MIXERS.add("mla", "everstate.mixers.mla:MLA")
MIXERS.add("mlp", "everstate.mixers.mlp:MLP")
MIXERS.add("moe", "everstate.mixers.moe:MoE")
MIXERS.add("parallel", "everstate.mixers.parallel:Parallel")
MIXERS.add("bidirectional", "everstate.mixers.bidirectional:Bidirectional")
