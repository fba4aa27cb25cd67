"""A token on a GPU without Python in between: choosing it and reading it, captured once as a device graph.

A decoding step of a small batch is hundreds of launches of a few microseconds each, and asking for them takes longer
than running them. A graph asks once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import overlapping
from everstate.core.state import batch_size, clone
from everstate.engine.compiling import asks_host_nothing, first_compiled
from everstate.engine.sampler import Filters, choose, greedy
from everstate.mixers import State
from everstate.models import LM

SHORTEST = 16
"""Tokens from which a capture, which takes about as long as some steps, is worth it."""


def worth_capturing(model: LM, max_tokens: int) -> bool:
    """Whether decoding so many tokens of this model runs as a graph.

    A capture that fails would leave the device in disorder, so that none is tried which might.
    """
    return model.device.type == "cuda" and max_tokens >= SHORTEST and asks_host_nothing(model)


class DecodeGraph:
    """`step` chooses a token for every row of `state`, and reads it.

    It is captured on the memory of the caller's own state, so that nothing is copied in or out; the state must not be
    replaced while the graph is in use, and is up to date when `settle_` was called: of several rows some may be put
    off. `filters` None takes the most likely token; see `choose` for `most`. Choosing and reading are graphs of their
    own: the host has the chosen tokens as soon as the one is done, and asks for the next step while the other runs.
    """

    def __init__(
        self, model: LM, logits: Float[Tensor, "b v"], state: State, filters: Filters | None, most: int = 0
    ) -> None:
        self.model = model
        self.state = self.form(model, state)
        self.filters, self.most = filters, most
        self.logits = logits.clone()
        self.chosen = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        self.u = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        self._fetched = torch.zeros(len(logits), dtype=torch.int64, pin_memory=True)
        self._is_chosen = torch.cuda.Event()
        self._choosing, self._reading = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # The weights are those of a model that decodes: no kernel has just written them.
        with overlapping() as self._kept:
            self._warm_up()
            with torch.cuda.graph(self._reading):
                self.logits = self._read(self.state)
            with torch.cuda.graph(self._choosing):
                self._choose()
                self._fetched.copy_(self.chosen, non_blocking=True)
        # A capture runs nothing, and its buffers are new memory: put there what the first choice is made from.
        self.logits.copy_(logits)

    def step(self, u: Float[Tensor, " b"]) -> tuple[list[int], Float[Tensor, "b v"]]:
        """The chosen tokens, and the logits after them, which the next step overwrites."""
        if self.filters is not None:
            self.u.copy_(u)
        self._choosing.replay()
        self._is_chosen.record()
        self._reading.replay()
        self._is_chosen.synchronize()
        return self._fetched.tolist(), self.logits

    @staticmethod
    def form(model: LM, state: State) -> State:
        """In what form the state is stepped: that of one row, a session's, which may be saved meanwhile, as it is."""
        return model.deferred(state) if batch_size(state) > 1 else state

    def settle_(self) -> None:
        """Bring the caller's state up to date."""
        self.model.settle_(self.state)

    def _choose(self) -> None:
        self.chosen.copy_(
            greedy(self.logits) if self.filters is None else choose(self.logits, self.u, self.filters, self.most)
        )

    def _read(self, state: State) -> Float[Tensor, "b v"]:
        return self.model.step_(self.chosen, state)

    def _warm_up(self) -> None:
        """Compile kernels and create workspaces, which a capture may not, on a state that nobody needs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first_compiled(self.model, len(self.chosen), lambda: self._try(clone(self.state)))
            scratch = clone(self.state)
            for _ in range(2):
                self._choose()
                self._read(scratch)
        torch.cuda.current_stream().wait_stream(stream)

    def _try(self, state: State) -> None:
        """Use all kernels of a step. It reads token 0, because what kernels that do not run have chosen is none."""
        self.chosen.zero_()
        self._read(state)
        self._choose()
