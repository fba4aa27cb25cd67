"""AdamW and the two groups of parameters: those that decay and those that do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everstate.mixers.base import Special


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: each parameter once, decayed or not.

    Not decayed: what its module marks `no_decay` (`mixers/base.py`), and everything with fewer than two dimensions:
    biases, scales of norms, rates. Decayed: all matrices, the embedding too, because with tied weights it is the output
    head; GPT-2 and the Mamba releases do the same. A parameter that two modules share is spared if one of them asks.
    """
    spared: set[nn.Parameter] = set()
    for part in model.modules():
        marked = part.no_decay if isinstance(part, Special) else frozenset()
        for name, parameter in part.named_parameters(recurse=False):
            if name in marked or parameter.ndim < 2:
                spared.add(parameter)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p not in spared], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over `parameter_groups`, in one fused call per group."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers, by the names of the model: `"blocks.0.norm.weight.exp_avg"`."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer_(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, _, key = path.rpartition(".")
        optimizer.state[parameters[name]][key] = value
