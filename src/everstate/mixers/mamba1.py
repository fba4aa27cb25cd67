"""Mamba-1: a diagonal state space per channel whose step, input and output depend on the token.

Source: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752).
The norms on dt, B and C are those of Jamba (arXiv 2403.19887, learned) and Falcon-Mamba (arXiv 2410.05355, weightless).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import softplus

from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import LinearEnds, TimeSteps, forward_by_segments, is_long
from everstate.mixers.modules import (
    Linear,
    Product,
    RMSNorm,
    init_linear_,
    inverse_softplus,
    is_plain,
    log_uniform,
    nothing_convolved,
    uniform_,
)
from everstate.ops import Normed, causal_conv1d, linear_conv_step_, mamba1_step_, rms_norm, selective_scan


class Mamba1Config(TimeSteps):
    """Settings of one Mamba-1 layer; the names are those of `mamba_ssm`."""

    title = "mamba1"

    d_state: PositiveInt = 16
    d_conv: PositiveInt = 4
    expand: PositiveInt = 2
    d_inner: PositiveInt | None = None
    """Width inside the layer; default: expand * d_model."""
    dt_rank: PositiveInt | Literal["auto"] = "auto"
    """Width of the bottleneck before dt; "auto" is d_model / 16, rounded up."""
    bias: bool = False
    conv_bias: bool = True
    dt_init_floor: PositiveFloat = 1e-4
    dt_bc_norm: Literal["none", "learned", "weightless"] = "none"
    """RMS norms on the low-rank dt, on B and on C."""
    dt_bc_norm_eps: PositiveFloat = 1e-6


class Mamba1State(NamedTuple):
    """conv: the last d_conv - 1 inputs of the convolution; ssm: the state of each channel."""

    conv: Float[Tensor, "b d k1"]
    ssm: Float[Tensor, "b d n"]


class Mamba1(LinearEnds):
    """`in_proj -> [x | z]`, convolution over x, `x_proj -> [dt | B | C]`, selective scan, gate, `out_proj`."""

    Config = Mamba1Config
    narrows = frozenset({"conv", "ssm"})
    no_decay = frozenset({"A_log", "D", "dt_bias", "conv_bias"})
    in_float32 = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, d_model: int, config: Mamba1Config) -> None:
        super().__init__()
        self.config = config
        self.d_inner = config.d_inner or config.expand * d_model
        self.dt_rank = -(-d_model // 16) if config.dt_rank == "auto" else config.dt_rank
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=config.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.d_inner)) if config.conv_bias else None
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = Linear(self.dt_rank, self.d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        learned, eps = config.dt_bc_norm == "learned", config.dt_bc_norm_eps
        self.dt_norm = RMSNorm(self.dt_rank, eps) if learned else None
        self.B_norm = RMSNorm(config.d_state, eps) if learned else None
        self.C_norm = RMSNorm(config.d_state, eps) if learned else None
        self.out_proj = Linear(self.d_inner, d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        config = self.config
        init_linear_(self.in_proj, generator)
        init_linear_(self.x_proj, generator)
        init_linear_(self.out_proj, generator)
        uniform_(self.conv_weight, config.d_conv**-0.5, generator)
        if self.conv_bias is not None:
            uniform_(self.conv_bias, config.d_conv**-0.5, generator)
        uniform_(self.dt_proj.weight, self.dt_rank**-0.5, generator)
        dt = log_uniform((self.d_inner,), config.dt_min, config.dt_max, generator).clamp(min=config.dt_init_floor)
        self.dt_bias.copy_(inverse_softplus(dt))
        self.A_log.copy_(torch.arange(1, config.d_state + 1, dtype=torch.float64).log())
        nn.init.ones_(self.D)
        for norm in (self.dt_norm, self.B_norm, self.C_norm):
            if norm is not None:
                norm.init_()

    def init_state(self, batch: int, *, context: int | None = None) -> Mamba1State:
        make, config = self.A_log.new_zeros, self.config
        return Mamba1State(
            conv=nothing_convolved(batch, self.d_inner, config.d_conv - 1, self.A_log),
            ssm=make(batch, self.d_inner, config.d_state),
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: Mamba1State,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Mamba1State]:
        if is_long(x, packing):
            return forward_by_segments(self, x, state, delta_t)
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = causal_conv1d(u, self.conv_weight, self.conv_bias, state.conv, activation="silu", packing=packing)
        low, B, C = self._select(u)
        dt = self.dt_proj(low)
        dt_bias: Tensor | None = self.dt_bias
        if delta_t is not None:
            dt, dt_bias = softplus(dt.to(state_dtype(u.dtype)).add(self.dt_bias)) * delta_t.unsqueeze(-1), None
        A = -torch.exp(self.A_log)
        y, ssm = selective_scan(u, dt, A, B, C, state.ssm, D=self.D, z=z, dt_bias=dt_bias, packing=packing)
        return self.out_proj(y), Mamba1State(conv, ssm)

    def product_step_(
        self,
        x: Float[Tensor, "b d"] | Normed,
        state: Mamba1State,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Product:
        _, u, z = linear_conv_step_(
            x, self.in_proj.weight, self.in_proj.bias, self.conv_weight, self.conv_bias, state.conv, slots,
            activation="silu", scale=self.in_proj.scale,
        )  # fmt: skip
        low, B, C = self._select(u)
        if is_plain(self.dt_proj):
            dt, of_dt = low, {"dt_weight": self.dt_proj.weight, "dt_scale": self.dt_proj.scale}
        else:
            dt, of_dt = self.dt_proj(low), {}
        y = mamba1_step_(
            u, dt, self.A_log, B, C, state.ssm, slots,
            dt_bias=self.dt_bias, D=self.D, z=z, delta_t=delta_t, **of_dt,
        )  # fmt: skip
        return Product(self.out_proj, y)

    def parts(self) -> tuple[nn.Module, ...]:
        return self.in_proj, self.out_proj

    def flops_per_token(self, context: int) -> int:
        linears = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        matrices = sum(linear.weight.numel() for linear in linears) + self.conv_weight.numel()
        return 2 * matrices + 7 * self.A_log.numel()

    def _select(
        self, u: Float[Tensor, "*b e"]
    ) -> tuple[Float[Tensor, "*b r"], Float[Tensor, "*b n"], Float[Tensor, "*b n"]]:
        """What `dt_proj` reads, B and C, all chosen by the token."""
        low, B, C = self.x_proj(u).split([self.dt_rank, self.config.d_state, self.config.d_state], -1)
        low, B, C = self._norm(low, self.dt_norm), self._norm(B, self.B_norm), self._norm(C, self.C_norm)
        return low, B, C

    def _norm(self, x: Float[Tensor, "*b n"], learned: RMSNorm | None) -> Float[Tensor, "*b n"]:
        if learned is not None:
            return learned(x)
        return x if self.config.dt_bc_norm == "none" else rms_norm(x, None, eps=self.config.dt_bc_norm_eps)
