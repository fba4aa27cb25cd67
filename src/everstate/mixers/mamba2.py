"""Mamba-2: input-dependent scalar decay per head, state space duality.

Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from everstate.core.errors import ConfigError
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import LinearEnds, TimeSteps, divide, forward_by_segments, is_long
from everstate.mixers.modules import (
    Linear,
    Multiplier,
    Product,
    RMSNorm,
    init_linear_,
    inverse_softplus,
    is_untouched,
    log_uniform,
    nothing_convolved,
    scaled,
    uniform_,
)
from everstate.ops import (
    Mamba2Layer,
    Mamba2State,
    Normed,
    gated,
    gated_rms_norm,
    linear_conv_step_,
    mamba2_scan,
    mamba2_step_,
)
from everstate.ops.mamba2.ends import inputs, leave
from everstate.ops.ssd.pending import Pending, nothing_pending, pays, settle_, settled


class Mamba2Config(TimeSteps):
    """Settings of one Mamba-2 layer; the names are those of `mamba_ssm`."""

    title = "mamba2"

    d_state: PositiveInt = 128
    d_conv: PositiveInt = 4
    expand: PositiveInt = 2
    d_inner: PositiveInt | None = None
    """Width inside the layer; default: expand * d_model."""
    headdim: PositiveInt = 64
    ngroups: PositiveInt = 1
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """Lowest and highest dt, obeyed in every mode."""
    norm: bool = True
    norm_before_gate: bool = False
    norm_eps: PositiveFloat = 1e-5
    D_has_hdim: bool = False
    """One D per channel instead of one per head."""
    bias: bool = False
    conv_bias: bool = True
    in_multiplier: Multiplier = 1.0
    """Of the input."""
    multipliers: tuple[Multiplier, Multiplier, Multiplier, Multiplier, Multiplier] | None = None
    """Of z, x, B, C and dt, behind `in_proj` (as in Falcon-H1); default: none."""
    out_multiplier: Multiplier = 1.0
    """Of the output."""
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dt_init_floor: PositiveFloat = 1e-4
    chunk_size: PositiveInt = 64


class Deferred(NamedTuple):
    """A state whose part `ssm` has not taken in all that was read: what it has not is `pending`."""

    conv: Float[Tensor, "b channels k1"]
    ssm: Float[Tensor, "b h p n"]
    pending: Pending


class Mamba2(LinearEnds):
    """`in_proj -> [z | x | B | C | dt]`, convolution over `[x | B | C]`, SSD scan, gated norm, `out_proj`."""

    Config = Mamba2Config
    narrows = frozenset({"conv", "ssm"})
    no_decay = frozenset({"A_log", "D", "dt_bias", "conv_bias"})
    in_float32 = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, d_model: int, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.d_inner = config.d_inner or config.expand * d_model
        self.nheads = divide("d_inner", self.d_inner, "headdim", config.headdim)
        divide("nheads", self.nheads, "ngroups", config.ngroups)
        if not 0 <= config.dt_limit[0] < config.dt_limit[1]:
            raise ConfigError(f"mamba2: dt_limit {config.dt_limit} is not 0 <= low < high; give (low, high)")
        if not 0 < config.A_init_range[0] <= config.A_init_range[1]:
            raise ConfigError(f"mamba2: A_init_range {config.A_init_range} is not 0 < low <= high; give (low, high)")
        self.conv_dim = self.d_inner + 2 * config.ngroups * config.d_state
        self.in_proj = Linear(d_model, self.d_inner + self.conv_dim + self.nheads, bias=config.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_dim)) if config.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.empty((self.nheads, config.headdim) if config.D_has_hdim else self.nheads))
        self.norm = RMSNorm(self.d_inner, config.norm_eps) if config.norm else None
        self.out_proj = Linear(self.d_inner, d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        config = self.config
        init_linear_(self.in_proj, generator)
        init_linear_(self.out_proj, generator)
        uniform_(self.conv_weight, config.d_conv**-0.5, generator)
        if self.conv_bias is not None:
            uniform_(self.conv_bias, config.d_conv**-0.5, generator)
        dt = log_uniform((self.nheads,), config.dt_min, config.dt_max, generator).clamp(min=config.dt_init_floor)
        self.dt_bias.copy_(inverse_softplus(dt))
        low, high = config.A_init_range
        self.A_log.copy_((torch.rand(self.nheads, generator=generator, dtype=torch.float64) * (high - low) + low).log())
        nn.init.ones_(self.D)
        if self.norm is not None:
            self.norm.init_()

    def init_state(self, batch: int, *, context: int | None = None) -> Mamba2State:
        make, config = self.A_log.new_zeros, self.config
        return Mamba2State(
            conv=nothing_convolved(batch, self.conv_dim, config.d_conv - 1, self.A_log),
            ssm=make(batch, self.nheads, config.headdim, config.d_state),
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: Mamba2State | Deferred,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Mamba2State | Deferred]:
        if isinstance(state, Deferred):
            y, after = self.forward(x, Mamba2State(state.conv, settled(state.ssm, state.pending)), packing, delta_t)
            assert not isinstance(after, Deferred), "of a state that is none"
            return y, Deferred(after.conv, after.ssm, self._nothing_pending(after))
        if is_long(x, packing):
            return forward_by_segments(self, x, state, delta_t)
        config, out_proj = self.config, self.out_proj
        plain = out_proj.bias is None and out_proj.scale is None
        y, state = mamba2_scan(
            self._project(x), state, delta_t, layer=self._layer(), out_proj=out_proj.weight if plain else None,
            packing=packing, chunk_size=config.chunk_size,
        )  # fmt: skip
        return scaled(y if plain else out_proj(y), config.out_multiplier), state

    def product_step_(
        self,
        x: Float[Tensor, "b d"] | Normed,
        state: Mamba2State | Deferred,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Product:
        config = self.config
        z, xBC, dt = self._project_step_(x, state.conv, slots)
        layer = self._layer()
        u, B, C = inputs(xBC, layer, state.ssm)
        # The gate may come behind the norm, and then both are made behind the step.
        gate = None if config.norm_before_gate else z.unflatten(-1, (self.nheads, config.headdim))
        y = mamba2_step_(
            u, dt, self.A_log, B, C, state.ssm, slots,
            dt_bias=self.dt_bias, D=self.D, z=gate, dt_limit=config.dt_limit, delta_t=delta_t,
            norm=None if gate is None else layer.norm, eps=config.norm_eps, norm_groups=config.ngroups,
            pending=state.pending if isinstance(state, Deferred) else None,
        )  # fmt: skip
        if not isinstance(y, Normed):
            y = leave(y, z, layer, gated, gated_rms_norm) if gate is None else y.flatten(-2)
        return Product(self.out_proj, y, config.out_multiplier)

    def deferred(self, state: Mamba2State | Deferred, turn: int = 0) -> Mamba2State | Deferred:
        """With states that are written every few tokens, where a kernel does so and they are large enough."""
        if (
            isinstance(state, Deferred)
            or not pays(state.ssm)
            or not is_untouched(self, Mamba2, "step_", "product_step_")
        ):
            return state
        pending, gated_first = self._nothing_pending(state, turn), not self.config.norm_before_gate
        x, dt, B = pending.x[:, 0], pending.decay[..., 0], pending.B[:, 0]
        kernel = mamba2_step_.serving(
            x, dt, self.A_log, B, B, state.ssm, dt_bias=self.dt_bias, D=self.D, z=x if gated_first else None,
            norm=self._layer().norm if gated_first else None, norm_groups=self.config.ngroups, pending=pending,
        )  # fmt: skip
        return Deferred(state.conv, state.ssm, pending) if kernel == "triton" else state

    def settle_(self, state: Mamba2State | Deferred) -> None:
        if isinstance(state, Deferred):
            settle_(state.ssm, state.pending)

    def parts(self) -> tuple[nn.Module, ...]:
        return self.in_proj, self.out_proj

    def flops_per_token(self, context: int) -> int:
        projections = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv_weight.numel())
        return projections + 5 * self.d_inner * self.config.d_state

    def _nothing_pending(self, state: Mamba2State, turn: int = 0) -> Pending:
        return nothing_pending(state.ssm, self.config.ngroups, self.conv_weight.dtype, turn)

    def _project(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b w"]:
        """The gate z, the inputs of the convolution, and dt, side by side."""
        projected, multipliers = self.in_proj(scaled(x, self.config.in_multiplier)), self.config.multipliers
        if multipliers is None:
            return projected
        each = projected.split(self._widths(), -1)
        return torch.cat([scaled(part, m) for part, m in zip(each, multipliers, strict=True)], -1)

    def _project_step_(
        self, x: Float[Tensor, "b d"] | Normed, conv: Tensor, slots: Slots
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z, the outputs of the convolution, and dt, for one token."""
        each = self.config.multipliers
        behind = 1.0 if each is None else tuple(zip(self._widths(), each, strict=True))
        scale, bias = self.in_proj.folded(self.config.in_multiplier, behind)
        return linear_conv_step_(
            x, self.in_proj.weight, bias, self.conv_weight, self.conv_bias, conv, slots,
            start=self.d_inner, activation="silu", scale=scale,
        )  # fmt: skip

    def _widths(self) -> tuple[int, int, int, int, int]:
        """Of z, x, B, C and dt."""
        width = self.config.ngroups * self.config.d_state
        return self.d_inner, self.d_inner, width, width, self.nheads

    def _layer(self) -> Mamba2Layer:
        """What the ops need to know of this layer."""
        config = self.config
        return Mamba2Layer(
            conv_weight=self.conv_weight,
            conv_bias=self.conv_bias,
            dt_bias=self.dt_bias,
            A_log=self.A_log,
            D=self.D,
            norm=None if self.norm is None else self.norm.weight,
            ngroups=config.ngroups,
            norm_before_gate=config.norm_before_gate,
            norm_eps=config.norm_eps,
            dt_limit=config.dt_limit,
        )
