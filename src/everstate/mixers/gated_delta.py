"""Gated DeltaNet and Kimi Delta Attention: linear attention that corrects what its state holds under a key.

Sources: Yang et al. 2024, "Gated Delta Networks" (arXiv 2412.06464); Kimi Team 2025, "Kimi Linear" (arXiv 2510.26692).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import sigmoid, silu, softplus

from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import Mixer, TimeSteps, divide, forward_by_segments, is_long, refuse_delta_t
from everstate.mixers.modules import (
    Linear,
    RMSNorm,
    init_linear_,
    inverse_softplus,
    log_uniform,
    nothing_convolved,
    uniform_,
)
from everstate.ops import causal_conv1d, causal_conv1d_step_, gated_delta_scan, gated_delta_step_

UNIT_EPS = 1e-6
"""Added to the square of the length of a query or key, by which it is divided."""


class GatedDeltaConfig(TimeSteps):
    """Settings of one layer; the default is that of Gated DeltaNet."""

    title = "gated_delta"

    nheads: PositiveInt = 4
    """Heads of values, each with a state of its own."""
    nheads_k: PositiveInt | None = None
    """Heads of queries and keys, each shared by nheads / nheads_k heads of values; default: nheads."""
    headdim_k: PositiveInt = 64
    headdim_v: PositiveInt = 64
    d_conv: PositiveInt = 4
    decay: Literal["head", "channel"] = "head"
    """One decay for each head, or for each key channel of each head (Kimi Delta Attention)."""
    rank: PositiveInt | None = None
    """Width between the two projections of a decay of channels, and of the gate; default: one projection each."""
    allow_neg_eigval: bool = False
    """Let beta reach 2, so that the state can be turned over and not only erased (needed to track parity)."""
    gate: Literal["silu", "sigmoid"] = "silu"
    norm_eps: PositiveFloat = 1e-5
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dt_init_floor: PositiveFloat = 1e-4
    chunk_size: PositiveInt = 64


class GatedDeltaState(NamedTuple):
    """conv: the last d_conv - 1 inputs of the convolution; delta: what each head holds under its keys."""

    conv: Float[Tensor, "b channels k1"]
    delta: Float[Tensor, "b h k v"]


class Projection(nn.Module):
    """A linear map, or two with a narrow middle."""

    def __init__(self, d_in: int, d_out: int, rank: int | None) -> None:
        super().__init__()
        self.down = None if rank is None else Linear(d_in, rank, bias=False)
        self.up = Linear(d_in if rank is None else rank, d_out, bias=False)

    def init_(self, generator: torch.Generator) -> None:
        """Uniform in +-1 / sqrt(fan_in)."""
        for linear in (self.down, self.up):
            if linear is not None:
                init_linear_(linear, generator)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """`up(down(x))`."""
        return self.up(x if self.down is None else self.down(x))

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.parameters())


class GatedDelta(Mixer):
    """`in_proj -> [q | k | v]`, convolution, keys of length 1, gated delta rule, norm, gate, `out_proj`."""

    Config = GatedDeltaConfig
    no_decay = frozenset({"A_log", "dt_bias"})
    in_float32 = frozenset({"A_log", "dt_bias"})

    def __init__(self, d_model: int, config: GatedDeltaConfig) -> None:
        super().__init__()
        self.config = config
        self.nheads_k = config.nheads_k or config.nheads
        divide("nheads", config.nheads, "nheads_k", self.nheads_k)
        width_k, width_v = self.nheads_k * config.headdim_k, config.nheads * config.headdim_v
        self.widths = [width_k, width_k, width_v]
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), config.d_conv))
        by_channel = config.decay == "channel"
        decays = config.nheads * (config.headdim_k if by_channel else 1)
        self.decay_proj = Projection(d_model, decays, config.rank if by_channel else None)
        self.dt_bias = nn.Parameter(torch.empty(decays))
        self.A_log = nn.Parameter(torch.empty(config.nheads))
        self.beta_proj = Linear(d_model, config.nheads, bias=False)
        self.gate_proj = Projection(d_model, width_v, config.rank)
        self.norm = RMSNorm(config.headdim_v, config.norm_eps)
        self.out_proj = Linear(width_v, d_model, bias=False)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        config = self.config
        for linear in (self.in_proj, self.beta_proj, self.out_proj):
            init_linear_(linear, generator)
        for projection in (self.decay_proj, self.gate_proj):
            projection.init_(generator)
        uniform_(self.conv_weight, config.d_conv**-0.5, generator)
        dt = log_uniform(tuple(self.dt_bias.shape), config.dt_min, config.dt_max, generator)
        self.dt_bias.copy_(inverse_softplus(dt.clamp(min=config.dt_init_floor)))
        low, high = config.A_init_range
        drawn = torch.rand(config.nheads, generator=generator, dtype=torch.float64)
        self.A_log.copy_((drawn * (high - low) + low).log())
        self.norm.init_()

    def init_state(self, batch: int, *, context: int | None = None) -> GatedDeltaState:
        make, config = self.A_log.new_zeros, self.config
        return GatedDeltaState(
            conv=nothing_convolved(batch, sum(self.widths), config.d_conv - 1, self.A_log),
            delta=make(batch, config.nheads, config.headdim_k, config.headdim_v),
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: GatedDeltaState,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], GatedDeltaState]:
        refuse_delta_t(self, delta_t)
        if is_long(x, packing):
            return forward_by_segments(self, x, state)
        qkv, conv = causal_conv1d(
            self.in_proj(x), self.conv_weight, None, state.conv, activation="silu", packing=packing
        )
        q, k, v = self._split(qkv)
        y, delta = gated_delta_scan(
            q, k, v, *self._choose(x), state.delta, packing=packing, chunk_size=self.config.chunk_size
        )
        return self._finish(y, x), GatedDeltaState(conv, delta)

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: GatedDeltaState,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        refuse_delta_t(self, delta_t)
        qkv = causal_conv1d_step_(self.in_proj(x), self.conv_weight, None, state.conv, slots, activation="silu")
        y = gated_delta_step_(*self._split(qkv), *self._choose(x), state.delta, slots)
        return self._finish(y, x)

    def flops_per_token(self, context: int) -> int:
        config = self.config
        linears = (self.in_proj, self.beta_proj, self.out_proj)
        weights = sum(linear.weight.numel() for linear in linears) + self.conv_weight.numel()
        weights += self.decay_proj.weights + self.gate_proj.weights
        return 2 * weights + 7 * config.nheads * config.headdim_k * config.headdim_v

    def _split(self, qkv: Float[Tensor, "*b channels"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of length 1, queries divided by the root of their width, and values; per head."""
        config = self.config
        q, k, v = qkv.split(self.widths, -1)
        q, k = (_unit(m.unflatten(-1, (self.nheads_k, config.headdim_k))) for m in (q, k))
        return q * config.headdim_k**-0.5, k, v.unflatten(-1, (config.nheads, config.headdim_v))

    def _choose(self, x: Float[Tensor, "*b d"]) -> tuple[Tensor, Tensor]:
        """The log decay and the strength of the correction, chosen by the token."""
        config, dtype = self.config, state_dtype(x.dtype)
        dt = softplus(self.decay_proj(x).to(dtype) + self.dt_bias)
        A = -torch.exp(self.A_log)
        a = dt * A if config.decay == "head" else dt.unflatten(-1, (config.nheads, config.headdim_k)) * A[:, None]
        beta = sigmoid(self.beta_proj(x).to(dtype))
        return a, 2 * beta if config.allow_neg_eigval else beta

    def _finish(self, y: Float[Tensor, "*b h v"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Norm of each head, gate and last projection."""
        gate = self.gate_proj(x).unflatten(-1, (self.config.nheads, self.config.headdim_v))
        y = self.norm(y) * (silu(gate) if self.config.gate == "silu" else sigmoid(gate))
        return self.out_proj(y.flatten(-2))


def _unit(x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """`x / |x|`, in float32."""
    x = x.to(state_dtype(x.dtype))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
