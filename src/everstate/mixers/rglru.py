"""The recurrent block of Griffin: a real gated linear recurrent unit beside a gate.

Source: De et al. 2024, "Griffin: mixing gated linear recurrences with local attention" (arXiv 2402.19427), section 2.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import gelu, softplus

from everstate.core.config import Config
from everstate.core.dtypes import state_dtype
from everstate.core.errors import ConfigError
from everstate.core.packing import Packing, first_tokens
from everstate.core.state import Slots, gather, scatter_
from everstate.mixers.base import Mixer, divide, forward_by_segments, is_long, refuse_delta_t
from everstate.mixers.modules import Linear, Special, init_linear_, inverse_softplus, nothing_convolved, uniform_
from everstate.ops import causal_conv1d, causal_conv1d_step_, linear_scan, linear_step_

DECAY = 8.0
"""The constant c of the paper: how often a decay is applied where the recurrence gate is open."""


class RGLRUConfig(Config):
    """Settings of one recurrent block."""

    title = "rglru"

    d_inner: PositiveInt | None = None
    """Width of the recurrence; default: d_model."""
    nheads: PositiveInt = 16
    """Blocks of the two gates: a channel sees the others of its block alone."""
    d_conv: PositiveInt = 4
    a_init_range: tuple[float, float] = (0.9, 0.999)
    """Initial decays where the recurrence gate is open."""


class RGLRUState(NamedTuple):
    """conv: the last d_conv - 1 inputs of the convolution; h: the recurrence; pos: how many tokens were read."""

    conv: Float[Tensor, "b e k1"]
    h: Float[Tensor, "b e"]
    pos: Int[Tensor, " b"]


class BlockDiagonal(Special):
    """`y = x W + bias` with a block-diagonal W, computed in float32 (float64 for float64 inputs)."""

    no_decay = frozenset({"bias"})

    def __init__(self, nheads: int, headdim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nheads, headdim, headdim))
        self.bias = nn.Parameter(torch.empty(nheads, headdim))

    def init_(self, generator: torch.Generator) -> None:
        """Uniform in +-1 / sqrt(width of a block), bias zero."""
        uniform_(self.weight, self.weight.shape[1] ** -0.5, generator)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
        """Apply each block to its part of x."""
        dtype = state_dtype(x.dtype)
        parts = x.to(dtype).unflatten(-1, self.bias.shape)
        return (torch.einsum("...hi,hij->...hj", parts, self.weight.to(dtype)) + self.bias).flatten(-2)


class RGLRU(Mixer):
    """`in_proj -> [y | x]`, convolution and recurrence over x, then `out_proj(h * gelu(y))`.

    `a = exp(-8 softplus(a_param) sigmoid(recurrence_gate(x)))`, `h = a h + sqrt(1 - a^2) sigmoid(input_gate(x)) x`.
    The first token of a sequence enters whole, without the root: there is no past to make room for.
    """

    Config = RGLRUConfig
    no_decay = frozenset({"a_param", "conv_bias"})
    in_float32 = frozenset({"a_param"})

    def __init__(self, d_model: int, config: RGLRUConfig) -> None:
        super().__init__()
        self.config = config
        self.d_inner = config.d_inner or d_model
        headdim = divide("d_inner", self.d_inner, "nheads", config.nheads)
        if not 0 < config.a_init_range[0] <= config.a_init_range[1] < 1:
            raise ConfigError(f"rglru: a_init_range {config.a_init_range} is not 0 < low <= high < 1; give (low, high)")
        self.in_proj = Linear(d_model, 2 * self.d_inner)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.d_inner))
        self.input_gate = BlockDiagonal(config.nheads, headdim)
        self.recurrence_gate = BlockDiagonal(config.nheads, headdim)
        self.a_param = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = Linear(self.d_inner, d_model)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        for part in (self.in_proj, self.out_proj):
            init_linear_(part, generator)
        for gate in (self.input_gate, self.recurrence_gate):
            gate.init_(generator)
        uniform_(self.conv_weight, self.config.d_conv**-0.5, generator)
        uniform_(self.conv_bias, self.config.d_conv**-0.5, generator)
        low, high = self.config.a_init_range
        a = torch.rand(self.d_inner, generator=generator, dtype=torch.float64) * (high - low) + low
        self.a_param.copy_(inverse_softplus(-a.log() / DECAY))

    def init_state(self, batch: int, *, context: int | None = None) -> RGLRUState:
        make = self.a_param.new_zeros
        return RGLRUState(
            conv=nothing_convolved(batch, self.d_inner, self.config.d_conv - 1, self.a_param),
            h=make(batch, self.d_inner),
            pos=make(batch, dtype=torch.int64),
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: RGLRUState,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], RGLRUState]:
        refuse_delta_t(self, delta_t)
        if is_long(x, packing):
            return forward_by_segments(self, x, state)
        batch, length, unread = *x.shape[:2], state.pos == 0
        if packing is None:
            first, pos = unread.unsqueeze(1), state.pos + length
        else:
            first = unread[packing.sequence_ids(x.device)].unsqueeze(0)
            pos = state.pos + packing.ends(x.device) - packing.starts(x.device) + 1
        y, x = self.in_proj(x).chunk(2, -1)
        x, conv = causal_conv1d(x, self.conv_weight, self.conv_bias, state.conv, packing=packing)
        a, x = self._recurrence(x, first & first_tokens(batch, length, packing, x.device))
        h, last = linear_scan(a, x, state.h, packing=packing)
        return self._finish(h, y), RGLRUState(conv, last, pos)

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: RGLRUState,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        refuse_delta_t(self, delta_t)
        pos = gather(state.pos, slots)
        y, x = self.in_proj(x).chunk(2, -1)
        x = causal_conv1d_step_(x, self.conv_weight, self.conv_bias, state.conv, slots)
        h = linear_step_(*self._recurrence(x, pos == 0), state.h, slots)
        scatter_(state.pos, slots, pos + 1)
        return self._finish(h, y)

    def flops_per_token(self, context: int) -> int:
        matrices = self.in_proj, self.out_proj, self.input_gate, self.recurrence_gate
        return 2 * (sum(m.weight.numel() for m in matrices) + self.conv_weight.numel()) + 8 * self.d_inner

    def _recurrence(self, x: Float[Tensor, "*b e"], first: Bool[Tensor, "*b"]) -> tuple[Tensor, Tensor]:
        """The decay of each channel and what is added to it."""
        log_a = -DECAY * softplus(self.a_param) * torch.sigmoid(self.recurrence_gate(x))
        room = torch.sqrt(-torch.expm1(2 * log_a)).masked_fill(first.unsqueeze(-1), 1.0)
        return log_a.exp(), room * torch.sigmoid(self.input_gate(x)) * x

    def _finish(self, h: Float[Tensor, "*b e"], y: Float[Tensor, "*b e"]) -> Float[Tensor, "*b d"]:
        """Gate and the last projection."""
        return self.out_proj(h.to(y.dtype) * gelu(y, approximate="tanh"))
