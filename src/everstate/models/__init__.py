"""Models as data: a layout of mixers, the language model that runs it, and what it costs."""

from __future__ import annotations

from everstate.models.config import ModelConfig
from everstate.models.cost import Cost, cost
from everstate.models.layout import layout_of_pattern, parse_layout
from everstate.models.lm import LM

__all__ = ["LM", "Cost", "ModelConfig", "cost", "layout_of_pattern", "parse_layout"]
