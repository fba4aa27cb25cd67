"""The one abstraction that every layer of every model implements.

A mixer maps a sequence to a sequence and carries a state. A channel mixer (MLP, experts) is a mixer whose state is
empty, so a model is one loop without branches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn

from everstate.core.config import Config
from everstate.core.dtypes import state_dtype
from everstate.core.errors import ConfigError, RequestError
from everstate.core.packing import Packing
from everstate.core.registry import Registry
from everstate.core.state import Slots, gather, scatter_
from everstate.mixers.modules import Special, Unmade, is_plain, is_untouched, made
from everstate.ops import Normed

State = Any
"""A NamedTuple of tensors, or a tuple of such states; batch is dimension 0. See `everstate.core.state`."""

MIXERS: Registry[type[Mixer]] = Registry("mixer type")
"""Every mixer by the name that configs use."""


class Empty(NamedTuple):
    """The state of a mixer that remembers nothing."""


class TimeSteps(Config):
    """Settings of a layer whose initial time steps dt are log-uniform in [dt_min, dt_max)."""

    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 1e-1

    @model_validator(mode="after")
    def _in_order(self) -> TimeSteps:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min = {self.dt_min} is above dt_max = {self.dt_max}; give dt_min <= dt_max")
        return self


class Mixer(Special, ABC):
    """A layer: `init_state`, a pure `forward` over a segment, and a `step_` that writes its state in place.

    The constructor takes `(d_model, config)`, creates parameters without values (`init_` gives them) and raises
    `ConfigError` for shapes that cannot be built. The last projection of a mixer is called `out_proj`.
    """

    Config: ClassVar[type[Config]]
    narrows: ClassVar[frozenset[str]] = frozenset()
    """The parts of the state that `step_` takes in bfloat16 and float16 too."""
    causal: ClassVar[bool] = True
    """False for an encoder layer, which sees the whole sequence and cannot be stepped."""

    @abstractmethod
    def init_state(self, batch: int, *, context: int | None = None) -> State:
        """The state before the first token, for `batch` sequences, on the device of the parameters.

        `context` bounds how many past tokens attention keeps; other mixers keep none and do not read it.
        """

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: State,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], State]:
        """Read a segment and return its outputs and the state after it, leaving `state` as it was.

        `delta_t` is the time that passes before each token, in units of the regular step (1 = regular sampling); a
        mixer for which that has no meaning refuses it with `RequestError`.
        """

    @abstractmethod
    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: State,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """Read one token for the rows `slots` of a pool of states (None: all rows) and update them in place.

        What it does follows from the shapes of its arguments, not from their values nor from earlier calls: of mixers
        that come with the library, the engine writes it down once on a GPU, as a device graph.
        """

    def deferred(self, state: State, turn: int = 0) -> State:
        """The same state in a form that `step_` need not write with every token, if there is one that pays.

        It shares the memory of `state`, which `settle_` brings up to date. Mixers of other turns write with other
        tokens.
        """
        return state

    def settle_(self, state: State) -> None:
        """Write what a state that `deferred` gave has put off."""

    @abstractmethod
    def init_(self, generator: torch.Generator) -> None:
        """Give every parameter its initial value."""

    @abstractmethod
    def flops_per_token(self, context: int) -> int:
        """Floating point operations to read one token when `context` tokens were read before (a multiply-add is 2)."""


class LinearEnds(Mixer):
    """A mixer whose step reads through linear maps, a router or experts, to which the division of a norm may be left on
    a GPU, and may give something `Unmade`, which a residual stream takes in where it is made."""

    @abstractmethod
    def product_step_(
        self,
        x: Float[Tensor, "b d"] | Normed,
        state: State,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Unmade | Float[Tensor, "b d"]:
        """`step_`, but what it gives may not be made yet."""

    @abstractmethod
    def parts(self) -> Iterable[nn.Module | None]:
        """The linear maps and mixers whose calls `product_step_` stands for; None for one that is not there."""

    def step_(
        self, x: Float[Tensor, "b d"], state: State, slots: Slots = None, delta_t: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """See `Mixer.step_`."""
        return made(self.product_step_(x, state, slots, delta_t))


def has_linear_ends(mixer: Mixer) -> TypeGuard[LinearEnds]:
    """Whether `product_step_` says all that `step_` does: somebody may have put more in its place, or in a part's."""
    own = ChannelMixer if isinstance(mixer, ChannelMixer) else LinearEnds
    if not isinstance(mixer, LinearEnds) or not is_untouched(mixer, own, "step_"):
        return False
    parts = (part for part in mixer.parts() if part is not None)
    return all(has_linear_ends(part) if isinstance(part, Mixer) else is_plain(part) for part in parts)


class ChannelMixer(Mixer):
    """A mixer that looks at one token alone: its state is empty, and how much time passes says nothing to it."""

    @abstractmethod
    def read(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """What `forward` and `step_` do to each token."""

    def init_state(self, batch: int, *, context: int | None = None) -> Empty:
        return Empty()

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: Empty,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Empty]:
        return self.read(x), state

    def step_(
        self, x: Float[Tensor, "b d"], state: Empty, slots: Slots = None, delta_t: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d"]:
        return self.read(x)


def step_by_forward(
    mixer: Mixer, x: Float[Tensor, "b d"], state: State, slots: Slots, delta_t: Float[Tensor, " b"] | None = None
) -> Float[Tensor, "b d"]:
    """A correct body for `step_`: gather, `forward` on one token, scatter."""
    y, after = mixer(x.unsqueeze(1), gather(state, slots), None, None if delta_t is None else delta_t.unsqueeze(1))
    scatter_(state, slots, after)
    return y[:, 0]


CPU_SEGMENT = 2048
"""Tokens that `is_long` lets a layer read at once on a CPU."""


def is_long(x: Float[Tensor, "b l d"], packing: Packing | None) -> bool:
    """Whether a layer should read x in segments: on a CPU its intermediate tensors would fall out of every cache."""
    return x.device.type == "cpu" and packing is None and x.shape[1] > CPU_SEGMENT


def forward_by_segments(
    mixer: Mixer, x: Float[Tensor, "b l d"], state: State, delta_t: Float[Tensor, "b l"] | None = None
) -> tuple[Float[Tensor, "b l d"], State]:
    """`forward` on one segment after the other, which changes nothing but memory and speed."""
    ys = []
    for start in range(0, x.shape[1], CPU_SEGMENT):
        now = slice(start, start + CPU_SEGMENT)
        y, state = mixer(x[:, now], state, None, None if delta_t is None else delta_t[:, now])
        ys.append(y)
    return torch.cat(ys, 1), state


def build_mixer(
    table: Mapping[str, Any],
    d_model: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Mixer:
    """Build a mixer from a config table such as `{"type": "mamba2", "d_state": 64}` and initialise it.

    On the `meta` device nothing is allocated. Raises `ConfigError` for an unknown type, key or impossible shape.
    """
    config, mixer_class = parse_mixer(table)
    with torch.device("meta"):
        mixer = mixer_class(d_model, config)
    cast_(mixer, dtype)
    if torch.device(device).type != "meta":
        allocate_(mixer, device)
        mixer.init_(generator or torch.Generator().manual_seed(0))
    return mixer


def parse_mixer(table: Mapping[str, Any]) -> tuple[Config, type[Mixer]]:
    """The validated config of a mixer table and the class that it asks for."""
    if not isinstance(table.get("type"), str):
        raise ConfigError(f"mixer table {dict(table)} has no 'type' that is a name; give one of {', '.join(MIXERS)}")
    mixer_class = MIXERS[table["type"]]
    return mixer_class.Config.parse({k: v for k, v in table.items() if k != "type"}), mixer_class


def cast_(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters to `dtype`, except those marked `in_float32`, which get float32 (float64 for float64)."""
    for part in module.modules():
        kept = part.in_float32 if isinstance(part, Special) else frozenset()
        for name, parameter in part.named_parameters(recurse=False):
            parameter.data = parameter.data.to(state_dtype(dtype) if name in kept else dtype)


def allocate_(module: nn.Module, device: torch.device | str) -> None:
    """Give the tensors of a module on the `meta` device memory, but no values.

    What `nn.Module.to_empty` does, without importing a second's worth of torch's compiler on the way.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(part, name, nn.Parameter(memory, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def refuse_delta_t(mixer: Mixer, delta_t: Tensor | None) -> None:
    """Raise `RequestError` if elapsed times were given to a mixer that has no notion of time."""
    if delta_t is not None:
        raise RequestError(
            f"{type(mixer).__name__} cannot take delta_t: it does not know how much time passes between tokens; "
            "leave delta_t out, or build the model of S4, S4D, H3, S5 or Mamba layers"
        )


def divide(name: str, whole: int, by: str, part: int) -> int:
    """`whole / part`, or a `ConfigError` that names both when the one does not divide the other."""
    if part <= 0 or whole % part:
        raise ConfigError(f"{by} = {part} does not divide {name} = {whole}; choose a {by} that does")
    return whole // part
