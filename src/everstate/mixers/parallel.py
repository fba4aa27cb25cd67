"""Several mixers side by side on the same input, their outputs summed (as attention and Mamba-2 are in Falcon-H1).

Source: Zuo et al. 2025, "Falcon-H1" (arXiv 2507.22448), section 2.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everstate.core.config import Config
from everstate.core.errors import ConfigError, RequestError
from everstate.core.packing import Packing
from everstate.core.state import Slots, map_state
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
        for part in self.parts():
            part.init_(generator)

    def init_state(self, batch: int, *, context: int | None = None) -> State:
        return tuple(part.init_state(batch, context=context) for part in self.parts())

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: State,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], State]:
        parts = zip(self.parts(), state, strict=True)
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
        for part, pool in zip(self.parts(), state, strict=True):
            own = _step_part_(part, x, pool, slots, delta_t)
            y = own if y is None else plus(made(y), own)
        assert y is not None
        return y

    def deferred(self, state: State, turn: int = 0) -> State:
        return tuple(part.deferred(own, turn) for part, own in zip(self.parts(), state, strict=True))

    def settle_(self, state: State) -> None:
        for part, own in zip(self.parts(), state, strict=True):
            part.settle_(own)

    def flops_per_token(self, context: int) -> int:
        return sum(part.flops_per_token(context) for part in self.parts())

    def parts(self) -> list[Mixer]:
        return cast("list[Mixer]", list(self.mixers.values()))


def _step_part_(
    part: Mixer, x: Float[Tensor, "b d"] | Normed, state: State, slots: Slots, delta_t: Float[Tensor, " b"] | None
) -> Unmade | Float[Tensor, "b d"]:
    if has_linear_ends(part):
        return part.product_step_(x, state, slots, delta_t)
    return part.step_(divided(x), state, slots, delta_t)


def cast_state(mixer: Mixer, state: State, dtype: torch.dtype) -> State:
    """The state with what `mixer.narrows` names in `dtype`. Raises `RequestError` where nothing can be stepped so."""
    if isinstance(mixer, Parallel):
        return tuple(cast_state(part, own, dtype) for part, own in zip(mixer.parts(), state, strict=True))

    def keep(tensor: Tensor) -> Tensor:
        # A cache of attention has the dtype of the weights.
        kept = (dtype, torch.bfloat16, torch.float16)
        if tensor.dtype in kept or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        raise RequestError(
            f"{type(mixer).__name__} cannot keep its state in {dtype}, only in {tensor.dtype}; leave the dtype out"
        )

    if not mixer.narrows or dtype not in (torch.bfloat16, torch.float16):
        return map_state(keep, state)
    parts = state._asdict().items()
    return type(state)(*(part.to(dtype) if name in mixer.narrows else part for name, part in parts))
