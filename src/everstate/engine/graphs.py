"""A token on a GPU without Python in between: choosing it and reading it, captured once as a device graph.

A decoding step of a small batch is hundreds of launches of a few microseconds each, and asking for them takes longer
than running them. A graph asks once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.state import clone
from everstate.engine.sampler import Filters, choose, greedy
from everstate.mixers import State
from everstate.mixers.attention import Attention
from everstate.mixers.mamba1 import Mamba1
from everstate.mixers.mamba2 import Mamba2
from everstate.mixers.mamba3 import Mamba3
from everstate.mixers.mlp import MLP
from everstate.mixers.moe import MoE
from everstate.models import LM

CAPTURED = (Attention, Mamba1, Mamba2, Mamba3, MLP, MoE)
"""Mixers whose `step_` asks the host nothing; a test on a GPU compares each with itself uncaptured."""
SHORTEST = 16
"""Tokens from which a capture, which takes about as long as some steps, is worth it."""


def worth_capturing(model: LM, max_tokens: int) -> bool:
    """Whether decoding so many tokens of this model runs as a graph."""
    known = all(type(block.mixer) in CAPTURED for block in model.layers)
    return model.device.type == "cuda" and max_tokens >= SHORTEST and known


class DecodeGraph:
    """`step` chooses a token for every row of `state`, in place, and reads it.

    It is captured on the caller's own state, so that nothing is copied in or out; the state must not be replaced while
    the graph is in use. `filters` None takes the most likely token.
    """

    def __init__(self, model: LM, logits: Float[Tensor, "b v"], state: State, filters: Filters | None) -> None:
        self.model = model
        self.filters = filters
        self.logits = logits.clone()
        self.chosen = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        self.u = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        self._graph = torch.cuda.CUDAGraph()
        self._warm_up(state)
        with torch.cuda.graph(self._graph):
            self._step(state)
        # A capture runs nothing, but its buffers are new memory: put back what the first choice is made from.
        self.logits.copy_(logits)

    def step(self, u: Float[Tensor, " b"]) -> tuple[Int[Tensor, " b"], Float[Tensor, "b v"]]:
        """The chosen tokens, and the logits after them; both are overwritten by the next step."""
        if self.filters is not None:
            self.u.copy_(u)
        self._graph.replay()
        return self.chosen, self.logits

    def _step(self, state: State) -> None:
        chosen = greedy(self.logits) if self.filters is None else choose(self.logits, self.u, self.filters)
        self.chosen.copy_(chosen)
        self.logits.copy_(self.model.step_(self.chosen, state))

    def _warm_up(self, state: State) -> None:
        """Compile kernels and create workspaces, which a capture may not, on a state that nobody needs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            scratch = clone(state)
            for _ in range(2):
                self._step(scratch)
        torch.cuda.current_stream().wait_stream(stream)
