"""Running models: prompts in, tokens out, over states that never grow."""

from __future__ import annotations

from everstate.engine.generate import generate
from everstate.engine.sampler import Sampling
from everstate.engine.session import Session

__all__ = ["Sampling", "Session", "generate"]
