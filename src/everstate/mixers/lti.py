"""What the time-invariant layers have in common: one state space model per channel, and the layer around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Complex, Float
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, silu

from everstate.core.config import Config
from everstate.core.dtypes import state_dtype
from everstate.core.errors import ConfigError
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import Mixer, TimeSteps
from everstate.mixers.modules import Linear, Special, init_linear_, log_uniform
from everstate.ops.lti_conv import Mode

Activation = Literal["gelu", "silu", "identity"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": gelu, "silu": silu, "identity": lambda y: y}


class SystemConfig(TimeSteps):
    """Settings of a state space model with a step per channel."""

    d_state: PositiveInt = 64
    """Size of the state of each channel, in real numbers: d_state / 2 conjugate pairs."""
    mode: Mode = "convolution"
    """How a segment is read; the three are equal. With `delta_t` a convolution runs as a scan (S4: a recurrence)."""


class OutputConfig(Config):
    """Settings of what follows a state space model in its layer."""

    activation: Activation = "gelu"
    glu: bool = True
    """Let half of `out_proj` gate the other half."""
    bias: bool = True


class LTIConfig(SystemConfig, OutputConfig):
    """Settings of a layer around a state space model per channel."""


class LTIState(NamedTuple):
    """ssm: the state of each channel, one of each conjugate pair as (real, imaginary)."""

    ssm: Float[Tensor, "b d n 2"]


class System(Special, ABC):
    """One state space model per channel (or per group of channels): parameters, and both ways to run it.

    Complex parameters are stored as (real, imaginary), so that casts, optimizers and files see real numbers, and only
    one of each conjugate pair. `A = -exp(log_A_real) + i A_imag` is stable whatever the parameters.
    """

    no_decay = frozenset({"log_dt", "log_A_real", "A_imag", "B"})
    in_float32 = no_decay
    flops_per_pair: ClassVar[int]
    """Floating point operations to move one conjugate pair by one token and to read it."""

    def __init__(self, channels: int, config: SystemConfig) -> None:
        super().__init__()
        self.config = config
        self.pairs = conjugate_pairs(f"{config.title}: d_state", config.d_state)
        shape = (channels, self.pairs)
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real = nn.Parameter(torch.empty(shape))
        self.A_imag = nn.Parameter(torch.empty(shape))
        self.B = nn.Parameter(torch.empty(*shape, 2))
        self.C = nn.Parameter(torch.empty(*shape, 2))

    @abstractmethod
    def forward(
        self,
        u: Float[Tensor, "b l d"],
        state: Float[Tensor, "seqs d n 2"],
        packing: Packing | None,
        delta_t: Float[Tensor, "b l"] | None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d n 2"]]:
        """Read a segment."""

    @abstractmethod
    def step_(
        self,
        u: Float[Tensor, "b d"],
        state: Float[Tensor, "slots d n 2"],
        slots: Slots,
        delta_t: Float[Tensor, " b"] | None,
    ) -> Float[Tensor, "b d"]:
        """Read one token for the rows `slots` of the state, written in place."""

    @abstractmethod
    def init_(self, generator: torch.Generator) -> None:
        """Give every parameter its initial value."""

    @property
    def A(self) -> Complex[Tensor, "d n"]:
        """The eigenvalues."""
        return torch.complex(-torch.exp(self.log_A_real), self.A_imag)

    @property
    def dt(self) -> Float[Tensor, " d"]:
        """The regular step."""
        return torch.exp(self.log_dt)

    @torch.no_grad()
    def init_dynamics_(self, A: Complex[Tensor, " n"], B: Complex[Tensor, " n"], generator: torch.Generator) -> None:
        """The same A and B in every channel, log-uniform steps, and a random C of unit variance."""
        self.log_dt.copy_(log_uniform(self.log_dt.shape, self.config.dt_min, self.config.dt_max, generator).log())
        self.log_A_real.copy_((-A.real).log())
        self.A_imag.copy_(A.imag)
        self.B.copy_(torch.view_as_real(B))
        normal_(self.C, 0.5**0.5, generator)


class TimeInvariant(Mixer):
    """`y = out_proj(act(SSM(x) + D x))` with a state space model per channel, the output gated by a half of itself."""

    no_decay = frozenset({"D"})

    @abstractmethod
    def __init__(self, d_model: int, config: LTIConfig, system: System) -> None:
        super().__init__()
        self.config = config
        self.system = system
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = Linear(d_model, (1 + config.glu) * d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        self.system.init_(generator)
        nn.init.ones_(self.D)
        init_linear_(self.out_proj, generator)

    def init_state(self, batch: int, *, context: int | None = None) -> LTIState:
        return LTIState(self.system.log_dt.new_zeros(batch, self.D.shape[0], self.system.pairs, 2))

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: LTIState,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], LTIState]:
        y, ssm = self.system(x, state.ssm, packing, delta_t)
        return self._finish(y, x), LTIState(ssm)

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: LTIState,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        return self._finish(self.system.step_(x, state.ssm, slots, delta_t), x)

    def flops_per_token(self, context: int) -> int:
        return 2 * self.out_proj.weight.numel() + self.system.flops_per_pair * self.system.pairs * self.D.shape[0]

    def _finish(self, y: Float[Tensor, "*b d"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return project(y + self.D * x, self.out_proj, self.config)


def project(y: Float[Tensor, "*b d"], out_proj: Linear, config: OutputConfig) -> Float[Tensor, "*b d"]:
    """Activation, output projection, gate."""
    out: Tensor = out_proj(ACTIVATIONS[config.activation](y))
    return glu(out) if config.glu else out


def conjugate_pairs(name: str, size: int) -> int:
    """Half of the size, or a `ConfigError` when it is odd."""
    if size % 2:
        raise ConfigError(f"{name} = {size} is odd, and states come in conjugate pairs; make it even")
    return size // 2


def as_complex(parameter: Float[Tensor, "*s 2"]) -> Complex[Tensor, "*s"]:
    """A complex parameter, from how it is stored, in the precision of states."""
    return torch.view_as_complex(parameter.to(state_dtype(parameter.dtype)))


def normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with normal values; drawn on the CPU, so that a seed gives one model on every device."""
    with torch.no_grad():
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std)
