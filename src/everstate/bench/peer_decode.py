"""Decoding with the layers of `mamba_ssm`: steps captured as a device graph, as its own generation runs them."""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everstate.bench.kernels import norm_error
from everstate.bench.peer_ssm import SSMPeer, name_of, unavailable
from everstate.bench.report import Row
from everstate.bench.timing import Gate, Timing
from everstate.models import LM

GATE_TOKENS, ALLOWED = 8, 5e-2
WARM = 8


class SSMDecoder:
    """Greedy steps of several sequences at once, from states of zeros. States are in the dtype of the weights there."""

    def __init__(self, peer: SSMPeer, batch: int) -> None:
        self._peer = peer
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=peer.embedding.weight.device)
        # What the layers read of their package's own object of this kind; a number above 0 makes them step.
        self._cache = SimpleNamespace(seqlen_offset=1, key_value_memory_dict={})
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
        """The logits after one more token of each sequence."""
        hidden = self._peer(tokens.unsqueeze(1), inference_params=self._cache)
        return self._peer.logits(hidden)[:, 0]

    @torch.no_grad()
    def capture(self) -> None:
        """Record a step that chooses its next tokens itself."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._choose()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._choose()

    def write(self) -> list[int]:
        """The next tokens, in the host's hands."""
        assert self._graph is not None, "capture comes first"
        self._graph.replay()
        return [int(token) for token in self._tokens[:, 0].tolist()]

    def _choose(self) -> None:
        self._tokens.copy_(self.step(self._tokens[:, 0]).argmax(-1, keepdim=True))


def peer_steps(model: LM, kind: str, batch: int, steps: int, ours: Row, left_out: list[str]) -> list[Row]:
    """The row of the peer, or none where it cannot be made; its ratio is how much longer a step takes than ours."""
    why = unavailable(kind) if model.device.type == "cuda" else "mamba_ssm runs on a GPU"
    if why is None and kind != "mamba2":
        why = f"mamba_ssm steps {kind} with kernels that need further packages"
    if why is not None:
        left_out.append(why)
        return []
    if ours.timing is None:
        return []
    decoder = SSMDecoder(SSMPeer(model, model.dtype), batch)
    gate = step_gate(model, decoder, batch)
    decoder.capture()
    marks = []
    for _ in range(steps + WARM):
        decoder.write()
        marks.append(time.perf_counter())
    timing = Timing(tuple(after - before for before, after in pairwise(marks[WARM - 1 :])))
    ratio = timing.median / ours.timing.median
    return [Row(f"  {name_of(kind)}", batch, gate, timing, ratio=ratio, ratio_of="the time")]


@torch.no_grad()
def step_gate(model: LM, decoder: SSMDecoder, batch: int) -> Gate:
    """The logits after the first few tokens against ours."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (GATE_TOKENS, batch), generator=generator).to(model.device)
    state, error = model.init_state(batch), 0.0
    for now in tokens:
        error = max(error, norm_error(decoder.step(now), model.step_(now, state)))
    return Gate(error, ALLOWED)
