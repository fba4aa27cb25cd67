"""The laws of a model, tried on its own weights: every way to read a text gives the same logits."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.packing import Packing
from everstate.engine.snapshots import Snapshot, load_snapshot, save_snapshot
from everstate.models import LM
from everstate.ops import linear_cross_entropy

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Largest difference of a logit between two ways to read, in standard deviations of the logits. Half precision rounds
each way differently; a state that is lost or doubled is off by 1 and more."""
SEGMENT = 512

Logits = Float[Tensor, "l v"]


@torch.no_grad()
def deviations(model: LM, tokens: Int[Tensor, " l"]) -> dict[str, float]:
    """For each way to read the tokens: the largest difference of a logit from one forward pass over all of them.

    In units of the standard deviation of the logits; `TOLERANCE` says what rounding may do.
    """
    whole, _ = model(tokens[None], model.init_state(1, context=len(tokens)))
    unit = whole.float().std().item()
    return {name: _largest(read(model, tokens), whole[0]) / unit for name, read in WAYS.items()}


@torch.no_grad()
def perplexity(model: LM, tokens: Int[Tensor, " l"]) -> float:
    """`exp` of the mean loss of each token given those before it, the state carried through the whole text."""
    state, nats = model.init_state(1, context=len(tokens)), 0.0
    for start in range(0, len(tokens) - 1, SEGMENT):
        now = tokens[start : min(start + SEGMENT, len(tokens) - 1)]
        targets = tokens[start + 1 : start + 1 + len(now)]
        hidden, state = model.hidden(now[None], state)
        softcap = model.config.logit_softcap
        nats += linear_cross_entropy(hidden[0], model.head_weight, targets, softcap=softcap).double().sum().item()
    return math.exp(nats / (len(tokens) - 1))


def _chunks(model: LM, tokens: Int[Tensor, " l"]) -> Logits:
    """Segments of growing length, so that no boundary of an implementation is always met."""
    state, ys, start, width = model.init_state(1, context=len(tokens)), [], 0, 1
    while start < len(tokens):
        y, state = model(tokens[None, start : start + width], state)
        ys.append(y[0])
        start, width = start + width, 2 * width + 1
    return torch.cat(ys)


def _steps(model: LM, tokens: Int[Tensor, " l"]) -> Logits:
    state = model.init_state(1, context=len(tokens))
    return torch.cat([model.step_(token[None], state) for token in tokens])


def _packed(model: LM, tokens: Int[Tensor, " l"]) -> Logits:
    """Between two other sequences."""
    others = tokens.flip(0)[: len(tokens) // 2 + 1]
    row = torch.cat([others, tokens, others])
    packing = Packing.of_lengths([len(others), len(tokens), len(others)])
    y, _ = model(row[None], model.init_state(3, context=len(tokens)), packing)
    return y[0, len(others) : len(others) + len(tokens)]


def _restored(model: LM, tokens: Int[Tensor, " l"]) -> Logits:
    """The state saved to a file in the middle, and read back."""
    middle, context = len(tokens) // 2, len(tokens)
    first, state = model(tokens[None, :middle], model.init_state(1, context=context))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        save_snapshot(file, model, Snapshot(state, context, None, middle))
        state = load_snapshot(file, model).state
    rest, _ = model(tokens[None, middle:], state)
    return torch.cat([first[0], rest[0]])


WAYS: dict[str, Callable[[LM, Tensor], Tensor]] = {
    "in chunks": _chunks,
    "token by token": _steps,
    "packed with others": _packed,
    "saved and restored": _restored,
}


def _largest(got: Logits, wanted: Logits) -> float:
    return (got.float() - wanted.float()).abs().max().item()
