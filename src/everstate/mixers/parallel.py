"""Several mixers side by side on the same input, their outputs summed (as attention and Mamba-2 are in Falcon-H1).

Source: Zuo et al. 2025, "Falcon-H1" (arXiv 2507.22448), section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everstate.core.config import Config
from everstate.core.errors import ConfigError
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import LinearEnds, Mixer, State, has_linear_ends, parse_mixer
from everstate.mixers.modules import Unmade, made, plus
from everstate.ops import Normed
from everstate.ops.norm.normed import divided


class ParallelConfig(Config):
    """Settings of mixers side by side."""

    title = "parallel"

    mixers: dict[str, dict[str, Any]]
    """Name -> table of a mixer, such as `{"ssm": {"type": "mamba2"}, "attn": {"type": "attention"}}`."""


class Parallel(LinearEnds):
    """`y = sum_i mixer_i(x)`; the state is the tuple of their states, in order."""

    Config = ParallelConfig

    def __init__(self, d_model: int, config: ParallelConfig) -> None:
        super().__init__()
        self.config = config
        if not config.mixers:
            raise ConfigError("parallel: no mixers were given; give at least one in the table 'mixers'")
        self.mixers = nn.ModuleDict()
        for name, table in config.mixers.items():
            if not name.isidentifier() or hasattr(self.mixers, name):
                raise ConfigError(f"parallel: a mixer cannot be called {name!r}; give it a plain name such as 'ssm'")
            part, mixer_class = parse_mixer(table)
            if not mixer_class.causal:
                raise ConfigError(f"parallel: {name!r} sees the whole sequence and has no state; use causal mixers")
            self.mixers[name] = mixer_class(d_model, part)

    def init_(self, generator: torch.Generator) -> None:
        for part in self._parts():
            part.init_(generator)

    def init_state(self, batch: int, *, context: int | None = None) -> State:
        return tuple(part.init_state(batch, context=context) for part in self._parts())

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: State,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], State]:
        parts = zip(self._parts(), state, strict=True)
        ys, states = zip(*(part(x, before, packing, delta_t) for part, before in parts), strict=True)
        return sum(ys[1:], start=ys[0]), states

    def product_step_(
        self,
        x: Float[Tensor, "b d"] | Normed,
        state: State,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Unmade | Float[Tensor, "b d"]:
        y: Unmade | Tensor | None = None
        for part, pool in zip(self._parts(), state, strict=True):
            own = _step_part_(part, x, pool, slots, delta_t)
            y = own if y is None else plus(made(y), own)
        assert y is not None
        return y

    def has_plain_ends(self) -> bool:
        return all(has_linear_ends(part) for part in self._parts())

    def narrow(self, state: State, dtype: torch.dtype) -> State:
        return tuple(part.narrow(own, dtype) for part, own in zip(self._parts(), state, strict=True))

    def flops_per_token(self, context: int) -> int:
        return sum(part.flops_per_token(context) for part in self._parts())

    def _parts(self) -> Iterator[Mixer]:
        return iter(cast("list[Mixer]", list(self.mixers.values())))


def _step_part_(
    part: Mixer, x: Float[Tensor, "b d"] | Normed, state: State, slots: Slots, delta_t: Float[Tensor, " b"] | None
) -> Unmade | Float[Tensor, "b d"]:
    if has_linear_ends(part):
        return part.product_step_(x, state, slots, delta_t)
    return part.step_(divided(x), state, slots, delta_t)
