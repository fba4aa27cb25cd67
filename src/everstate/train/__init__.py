"""Training: recipes, the optimizer and its schedule, the loop, and checkpoints that resume to the bit."""

from __future__ import annotations

from everstate.train.config import DataRecipe, TrainRecipe, TrainSettings
from everstate.train.loop import Outcome, train
from everstate.train.progress import Bar, JsonLines, Lines, Silent, Watch

__all__ = [
    "Bar",
    "DataRecipe",
    "JsonLines",
    "Lines",
    "Outcome",
    "Silent",
    "TrainRecipe",
    "TrainSettings",
    "Watch",
    "train",
]
