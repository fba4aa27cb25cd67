"""Mamba-3: trapezoidal steps, a state that turns, and several inputs and outputs per head.

No short convolution: the trapezoid sees two tokens at once. Rotation gives the decay a phase, and with it one layer
counts modulo a number (parity), which a real decay between 0 and 1 cannot.

Source: Lahoti et al. 2026, "Mamba-3" (arXiv 2603.15569), and the released state-spaces/mamba3-* checkpoints.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from everstate.core.errors import ConfigError
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import LinearEnds, TimeSteps, divide, forward_by_segments, is_long
from everstate.mixers.modules import Linear, Product, RMSNorm, init_linear_, inverse_softplus, log_uniform
from everstate.ops import Mamba3Layer, Normed, TrapezoidState, mamba3_scan, mamba3_step_


class Mamba3Config(TimeSteps):
    """Settings of one Mamba-3 layer; the names are those of `mamba_ssm`."""

    title = "mamba3"

    d_state: PositiveInt = 128
    expand: PositiveInt = 2
    headdim: PositiveInt = 64
    ngroups: PositiveInt = 1
    rope_fraction: PositiveFloat = 0.5
    """Part of the state that turns: 0.5 or 1.0."""
    rope_interleaved: bool | None = None
    """Which entries turn together: (2j, 2j + 1), or (j, j + n / 2). None: as published, the first for SISO only."""
    A_activation: Literal["softplus", "heavy_tail"] = "softplus"
    """-A as a function of its projection. Softplus is that of the paper and of a fresh model; checkpoints since June
    2026 want the heavy tail, `1 + x` for x >= 0 and `1 / (1 - x)` below, and carry no mark of it: compare the
    perplexities."""
    A_floor: PositiveFloat = 1e-4
    """Smallest -A."""
    is_mimo: bool = False
    mimo_rank: PositiveInt = 4
    """Inputs and outputs per head, if `is_mimo`."""
    out_norm: bool = False
    """A norm over each head of y before the gate."""
    norm_eps: PositiveFloat = 1e-5
    dt_init_floor: PositiveFloat = 1e-4
    chunk_size: PositiveInt = 64


class Mamba3(LinearEnds):
    """`in_proj -> [z | x | B | C | dt | A | lam | omega]`, trapezoid scan, gate, sum over the ranks, `out_proj`."""

    Config = Mamba3Config
    narrows = frozenset({"ssm", "k", "x"})  # an angle of 8 bits would be no angle
    no_decay = frozenset({"dt_bias", "B_bias", "C_bias", "D"})
    in_float32 = frozenset({"dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o", "D"})

    def __init__(self, d_model: int, config: Mamba3Config) -> None:
        super().__init__()
        self.config = config
        self.d_inner = config.expand * d_model
        self.nheads = divide("d_inner", self.d_inner, "headdim", config.headdim)
        divide("nheads", self.nheads, "ngroups", config.ngroups)
        self.rank = config.mimo_rank if config.is_mimo else 1
        self.pairs = _pairs(config)
        self.interleaved = not config.is_mimo if config.rope_interleaved is None else config.rope_interleaved
        n, shape = config.d_state, (self.nheads, self.rank, config.headdim)
        width = 2 * self.d_inner + 2 * n * config.ngroups * self.rank + 3 * self.nheads + self.pairs
        self.in_proj = Linear(d_model, width, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.B_bias = nn.Parameter(torch.empty(self.nheads, self.rank, n))
        self.C_bias = nn.Parameter(torch.empty(self.nheads, self.rank, n))
        self.B_norm = RMSNorm(n, config.norm_eps)
        self.C_norm = RMSNorm(n, config.norm_eps)
        self.D = nn.Parameter(torch.empty(self.nheads))
        self.mimo_x = nn.Parameter(torch.empty(shape)) if config.is_mimo else None
        self.mimo_z = nn.Parameter(torch.empty(shape)) if config.is_mimo else None
        self.mimo_o = nn.Parameter(torch.empty(shape)) if config.is_mimo else None
        self.norm = RMSNorm(self.d_inner, config.norm_eps) if config.out_norm else None
        self.out_proj = Linear(self.d_inner, d_model, bias=False)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        config = self.config
        init_linear_(self.in_proj, generator)
        init_linear_(self.out_proj, generator)
        dt = log_uniform((self.nheads,), config.dt_min, config.dt_max, generator).clamp(min=config.dt_init_floor)
        self.dt_bias.copy_(inverse_softplus(dt))
        # Keys and queries that begin with a common part: worth 5 % of perplexity against zeros at 440M parameters.
        for parameter in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(parameter)
        if self.mimo_x is not None and self.mimo_z is not None and self.mimo_o is not None:
            nn.init.constant_(self.mimo_x, 1 / self.rank)
            nn.init.ones_(self.mimo_z)
            nn.init.constant_(self.mimo_o, 1 / self.rank)
        for norm in (self.B_norm, self.C_norm, self.norm):
            if norm is not None:
                norm.init_()

    def init_state(self, batch: int, *, context: int | None = None) -> TrapezoidState:
        make, config = self.D.new_zeros, self.config
        return TrapezoidState(
            ssm=make(batch, self.nheads, config.headdim, config.d_state),
            k=make(batch, self.rank, self.nheads, config.d_state),
            x=make(batch, self.nheads, config.headdim),
            angle=make(batch, self.nheads, self.pairs),
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: TrapezoidState,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], TrapezoidState]:
        if is_long(x, packing):
            return forward_by_segments(self, x, state, delta_t)
        out_proj = self.out_proj
        plain = out_proj.bias is None and out_proj.scale is None
        y, state = mamba3_scan(
            self.in_proj(x), state, delta_t, layer=self._layer(), out_proj=out_proj.weight if plain else None,
            packing=packing, chunk_size=self.config.chunk_size,
        )  # fmt: skip
        return y if plain else out_proj(y), state

    def product_step_(
        self,
        x: Float[Tensor, "b d"] | Normed,
        state: TrapezoidState,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Product:
        return Product(self.out_proj, mamba3_step_(self.in_proj(x), state, slots, delta_t, layer=self._layer()))

    def parts(self) -> tuple[nn.Module, ...]:
        return self.in_proj, self.out_proj

    def flops_per_token(self, context: int) -> int:
        projections = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        return projections + (1 + 4 * self.rank) * self.d_inner * self.config.d_state

    def _layer(self) -> Mamba3Layer:
        """What the ops need to know of this layer."""
        config = self.config
        return Mamba3Layer(
            dt_bias=self.dt_bias,
            B_norm=self.B_norm.weight,
            C_norm=self.C_norm.weight,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            D=self.D,
            mimo_x=self.mimo_x,
            mimo_z=self.mimo_z,
            mimo_o=self.mimo_o,
            norm=None if self.norm is None else self.norm.weight,
            ngroups=config.ngroups,
            interleaved=self.interleaved,
            A_activation=config.A_activation,
            A_floor=config.A_floor,
            norm_eps=config.norm_eps,
        )


def _pairs(config: Mamba3Config) -> int:
    """How many pairs of entries of the state turn."""
    if config.rope_fraction not in (0.5, 1.0):
        raise ConfigError(f"mamba3: rope_fraction = {config.rope_fraction} is not allowed; give 0.5 or 1.0")
    pairs = int(config.d_state * config.rope_fraction) // 2
    if config.d_state % 2 or pairs == 0:
        raise ConfigError(
            f"mamba3: of d_state = {config.d_state} a part of {config.rope_fraction} turns in pairs; "
            "give an even d_state of at least 2 / rope_fraction"
        )
    return pairs
