"""Gated short convolution: a convolution over three tokens between two gates that the input opens.

Source: Liquid AI 2025, "LFM2 Technical Report" (arXiv 2511.23404), section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from everstate.core.config import Config
from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import Mixer, forward_by_segments, is_long, refuse_delta_t
from everstate.mixers.modules import Linear, init_linear_, nothing_convolved, uniform_
from everstate.ops import causal_conv1d, causal_conv1d_step_


class ShortConvConfig(Config):
    """Settings of one gated short convolution."""

    title = "short_conv"

    d_conv: PositiveInt = 3
    bias: bool = False
    """Of both projections and of the convolution."""


class ShortConvState(NamedTuple):
    """conv: the last d_conv - 1 inputs of the convolution."""

    conv: Float[Tensor, "b d k1"]


class ShortConv(Mixer):
    """`in_proj -> [B | C | x]`, then `out_proj(C * conv(B * x))`; nothing in it is bent by an activation."""

    Config = ShortConvConfig
    no_decay = frozenset({"conv_bias"})

    def __init__(self, d_model: int, config: ShortConvConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Linear(d_model, 3 * d_model, bias=config.bias)
        self.conv_weight = nn.Parameter(torch.empty(d_model, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(d_model)) if config.bias else None
        self.out_proj = Linear(d_model, d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        init_linear_(self.in_proj, generator)
        init_linear_(self.out_proj, generator)
        uniform_(self.conv_weight, self.config.d_conv**-0.5, generator)
        if self.conv_bias is not None:
            uniform_(self.conv_bias, self.config.d_conv**-0.5, generator)

    def init_state(self, batch: int, *, context: int | None = None) -> ShortConvState:
        weight = self.conv_weight
        return ShortConvState(
            nothing_convolved(batch, len(weight), self.config.d_conv - 1, weight, state_dtype(weight.dtype))
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: ShortConvState,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], ShortConvState]:
        refuse_delta_t(self, delta_t)
        if is_long(x, packing):
            return forward_by_segments(self, x, state)
        B, C, x = self.in_proj(x).chunk(3, -1)
        y, conv = causal_conv1d(B * x, self.conv_weight, self.conv_bias, state.conv, packing=packing)
        return self.out_proj(C * y), ShortConvState(conv)

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: ShortConvState,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        refuse_delta_t(self, delta_t)
        B, C, x = self.in_proj(x).chunk(3, -1)
        return self.out_proj(C * causal_conv1d_step_(B * x, self.conv_weight, self.conv_bias, state.conv, slots))

    def flops_per_token(self, context: int) -> int:
        return 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv_weight.numel())
