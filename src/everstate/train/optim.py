"""AdamW and the two groups of parameters: those that decay and those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from everstate.mixers.modules import Special

HALF = (torch.bfloat16, torch.float16)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: each parameter once, decayed or not.

    Not decayed: what its module marks `no_decay` (`mixers/modules.py`), and everything with fewer than two dimensions:
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
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over `parameter_groups`, in one fused call per group.

    Weights of half precision are stepped as `MasterAdamW` does it.
    """
    groups = parameter_groups(model, weight_decay)
    if any(p.dtype in HALF for p in model.parameters()):
        return MasterAdamW(groups, lr=lr, betas=betas, eps=eps)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW for weights of half precision, with a float32 master copy of each.

    A step is often smaller than the distance between two numbers of bfloat16 and would be lost there. It changes the
    master copy, and the weight becomes that, rounded. What a model keeps in float32 is its own master.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients as they are."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for low in (True, False):
                self._step([p for p in group["params"] if p.grad is not None and (p.dtype in HALF) == low], group, low)

    def _step(self, weights: list[nn.Parameter], group: dict[str, Any], low: bool) -> None:
        """All weights of a group that are of half precision, or all others, in a few launches."""
        if not weights:
            return
        states = [self._state_of(p) for p in weights]
        masters: list[Tensor] = [s["master"] for s in states] if low else list(weights)
        gradients = [p.grad for p in weights if p.grad is not None]
        if low:
            widened = [torch.empty_like(m) for m in masters]
            torch._foreach_copy_(widened, gradients)
            gradients = widened
        beta1, beta2 = group["betas"]
        fused_adamw(
            masters, gradients, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
            [s["step"] for s in states], fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        if low:
            torch._foreach_copy_(list(weights), masters)

    def _state_of(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered of a weight, made at its first step."""
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            make = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            state |= {"step": make.new_zeros(()), "exp_avg": make, "exp_avg_sq": torch.zeros_like(make)}
            if weight.dtype in HALF:
                state["master"] = weight.detach().to(make.dtype)
        return state


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
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
