"""The kernels of a model, compiled at the same time before it is first used on a GPU.

Each op has its own kernels compiled at once. But a model calls one op after the other, each for the first time, and
would wait for each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from everstate.core.kernels import has_triton
from everstate.mixers import Mixer
from everstate.mixers.modules import has_hooks
from everstate.mixers.moe import MoE
from everstate.models import LM
from everstate.ops import experts

R = TypeVar("R")

OURS = "everstate.mixers."
"""Where mixers are whose ops ask the host nothing; a test on a GPU compares each step with itself captured."""

_used: WeakKeyDictionary[LM, set[Hashable]] = WeakKeyDictionary()
"""How models have been used."""


def asks_host_nothing(model: LM) -> bool:
    """Whether no value that the model computes decides what it does next."""
    mixers = (part for part in model.modules() if isinstance(part, Mixer))
    return all(type(mixer).__module__.startswith(OURS) and not _counts_on_host(mixer) for mixer in mixers)


def _counts_on_host(mixer: Mixer) -> bool:
    """Whether it is a mixture of experts that PyTorch serves, which asks how many tokens each expert has."""
    if not isinstance(mixer, MoE):
        return False
    x = mixer.in_proj.weight[0, :1]
    chosen = torch.zeros(1, mixer.config.top_k, dtype=torch.int64, device=x.device)
    return experts.serving(x, chosen.float(), chosen, mixer.in_proj.weight, mixer.out_proj.weight) != "triton"


def first_compiled(model: LM, kind: Hashable, function: Callable[[], R]) -> R:
    """`function()`, which runs the model. The first time of each `kind` on a GPU, its kernels are compiled together.

    Then `everstate.ops.triton_launch.compile_together` says what it may do.
    """
    if model.device.type != "cuda":
        return function()
    known = _used.setdefault(model, set())
    if kind not in known and _can_rehearse(model):
        from everstate.ops.triton_launch import compile_together

        result = compile_together(function)
    else:
        result = function()
    known.add(kind)
    return result


def _can_rehearse(model: LM) -> bool:
    """Whether nobody looks at what its kernels have not written."""
    return has_triton() and asks_host_nothing(model) and all(map(_is_ours, model.modules()))


def _is_ours(part: nn.Module) -> bool:
    """Whether nobody else sees what a part of a model is given, which may be what no kernel has written."""
    return type(part).__module__.partition(".")[0] in ("everstate", "torch") and not has_hooks(part)
