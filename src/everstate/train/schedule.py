"""The learning rate as a pure function of the step: warm-up, then a decay."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["cosine", "linear", "wsd", "constant"]


def learning_rate(
    step: int, steps: float, *, lr: float, min_lr: float, warmup: int, decay: Decay, cooldown: float
) -> float:
    """The rate of the optimizer step with index `step` (from 0) in a run of `steps`.

        warm-up:  lr (step + 1) / warmup                       for step < warmup
        after it: min_lr + (lr - min_lr) f(t),                 t = (step - warmup) / (steps - warmup) in [0, 1]

    with f = (1 + cos(pi t)) / 2 for `cosine`, 1 - t for `linear`, 1 for `constant`, and for `wsd` (warm-up, stable,
    decay: Hu et al. 2024, arXiv 2404.06395) 1 until the last `cooldown` of the steps after the warm-up, then linear to
    0. A run may go on past `steps`: the rate then stays what it is at the end.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    t = min((step - warmup) / max(steps - warmup, 1.0), 1.0)
    return min_lr + (lr - min_lr) * _shape(t, decay, cooldown)


def _shape(t: float, decay: Decay, cooldown: float) -> float:
    """What is left of the rate after the part `t` of the decay."""
    if decay == "cosine":
        return (1 + math.cos(math.pi * t)) / 2
    if decay == "linear":
        return 1 - t
    if decay == "wsd":
        return min((1 - t) / cooldown, 1.0)
    return 1.0
