"""A second mixer over the reversed sequence, for encoders: genomes, audio, classification."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from everstate.core.config import Config
from everstate.core.errors import RequestError
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import Empty, Mixer, parse_mixer
from everstate.mixers.modules import Linear, init_linear_


class BidirectionalConfig(Config):
    """Settings of a mixer read in both directions."""

    title = "bidirectional"

    mixer: dict[str, Any] = Field(default_factory=lambda: {"type": "s4d"})
    """Table of the mixer that reads each direction."""
    shared: bool = False
    """One set of weights for both directions."""
    combine: Literal["sum", "concat"] = "sum"
    """Add the two outputs, or concatenate them and project."""


class Bidirectional(Mixer):
    """`y = forwards(x) + reverse(backwards(reverse(x)))`, each packed sequence reversed on its own."""

    Config = BidirectionalConfig
    causal = False

    def __init__(self, d_model: int, config: BidirectionalConfig) -> None:
        super().__init__()
        self.config = config
        part, mixer_class = parse_mixer(config.mixer)
        self.forwards = mixer_class(d_model, part)
        self.backwards = None if config.shared else mixer_class(d_model, part)
        self.out_proj = Linear(2 * d_model, d_model) if config.combine == "concat" else None

    def init_(self, generator: torch.Generator) -> None:
        self.forwards.init_(generator)
        if self.backwards is not None:
            self.backwards.init_(generator)
        if self.out_proj is not None:
            init_linear_(self.out_proj, generator)

    def init_state(self, batch: int, *, context: int | None = None) -> Empty:
        return Empty()

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: Empty,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Empty]:
        backwards = self.forwards if self.backwards is None else self.backwards
        batch, length = (x.shape[0] if packing is None else len(packing)), x.shape[1]
        order = reversed_order(length, packing, x.device)
        gaps = None if delta_t is None else reversed_gaps(delta_t, order, packing)
        y, _ = self.forwards(x, self.forwards.init_state(batch, context=length), packing, delta_t)
        z, _ = backwards(x[:, order], backwards.init_state(batch, context=length), packing, gaps)
        z = z[:, order]
        return (y + z if self.out_proj is None else self.out_proj(torch.cat([y, z], -1))), state

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: Empty,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        raise RequestError(
            "bidirectional cannot read token by token: an output depends on what comes later; "
            "give it whole sequences, or build the model of causal mixers to generate"
        )

    def flops_per_token(self, context: int) -> int:
        projection = 0 if self.out_proj is None else 2 * self.out_proj.weight.numel()
        return 2 * self.forwards.flops_per_token(context) + projection


def reversed_order(length: int, packing: Packing | None, device: torch.device) -> Int[Tensor, " l"]:
    """Where each token goes when every sequence is reversed in its place; the order is its own inverse."""
    at = torch.arange(length, device=device)
    if packing is None:
        return at.flip(0)
    ids = packing.sequence_ids(device)
    return packing.starts(device)[ids] + packing.ends(device)[ids] - at


def reversed_gaps(
    delta_t: Float[Tensor, "b l"], order: Int[Tensor, " l"], packing: Packing | None
) -> Float[Tensor, "b l"]:
    """The time that passes before each token of the reversed sequences: in time, that after it.

    Nothing was measured after the last token of a sequence, which therefore takes a regular step.
    """
    last = torch.tensor([delta_t.shape[1] - 1]) if packing is None else packing.ends(delta_t.device)
    return delta_t.roll(-1, 1).index_fill(1, last.to(delta_t.device), 1.0)[:, order]
