"""Causal attention: grouped queries, sliding window, rotary positions, soft cap, norms on queries and keys.

Source: Vaswani et al. 2017 (arXiv 1706.03762); see `everstate.ops.attention` and `everstate.ops.rotary`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from everstate.core.config import Config
from everstate.core.errors import ConfigError
from everstate.core.packing import Packing
from everstate.core.state import Slots, gather
from everstate.mixers.base import Mixer, RMSNorm, divide, init_linear_, refuse_delta_t
from everstate.ops import AttentionState, attention, attention_step_, rotary


class AttentionConfig(Config):
    """Settings of one attention layer."""

    title = "attention"

    nheads: PositiveInt | None = None
    """Default: d_model / head_dim, or as many of at least 64 numbers as divide d_model evenly."""
    nheads_kv: PositiveInt | None = None
    """Heads of keys and values, each shared by nheads / nheads_kv query heads; default: nheads."""
    head_dim: PositiveInt | None = None
    """Default: d_model / nheads."""
    window: PositiveInt | None = None
    """A token sees itself and window - 1 before it; default: all before it."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary positions, such as 10000.0; default: no positions, since state space layers tell the order."""
    rope_interleaved: bool = False
    """Rotate adjacent numbers, instead of one of the first with one of the second half."""
    rotary_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Part of each head that is rotated."""
    scale: PositiveFloat | None = None
    """Of the scores; default: head_dim^-0.5."""
    softcap: PositiveFloat | None = None
    """Bound of the scores, by tanh; default: none."""
    qk_norm: bool = False
    """RMS norm on each head of queries and keys, before the rotation."""
    norm_eps: PositiveFloat = 1e-5
    bias: bool = False
    context: NonNegativeInt = 4096
    """Tokens that a state holds when `init_state` is not told; a window needs none beyond itself."""


class Attention(Mixer):
    """`q_proj k_proj v_proj`, optional norm and rotation, attention, `out_proj`."""

    Config = AttentionConfig

    def __init__(self, d_model: int, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.nheads = config.nheads or _default_nheads(d_model, config.head_dim)
        self.nheads_kv = config.nheads_kv or self.nheads
        self.head_dim = config.head_dim or divide("d_model", d_model, "nheads", self.nheads)
        divide("nheads", self.nheads, "nheads_kv", self.nheads_kv)
        self.rotary_dim = int(self.head_dim * config.rotary_fraction)
        if config.rope_theta is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ConfigError(
                f"attention: rotary_fraction {config.rotary_fraction} of head_dim {self.head_dim} is {self.rotary_dim} "
                "numbers, and pairs are rotated; choose them so that the product is even and not 0"
            )
        width, width_kv = self.nheads * self.head_dim, self.nheads_kv * self.head_dim
        self.q_proj = nn.Linear(d_model, width, bias=config.bias)
        self.k_proj = nn.Linear(d_model, width_kv, bias=config.bias)
        self.v_proj = nn.Linear(d_model, width_kv, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.out_proj = nn.Linear(width, d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            init_linear_(linear, generator)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.init_()

    def init_state(self, batch: int, *, context: int | None = None) -> AttentionState:
        """Room for `context` tokens (None: for the window, or for `config.context`), and never more than the window.

        With `context=0` nothing is remembered: forward is attention within its segment, which is the fast way to train.
        """
        window = self.config.window
        capacity = (window or self.config.context) if context is None else min(context, window or context)
        make = self.k_proj.weight.new_zeros
        return AttentionState(
            k=make(batch, capacity, self.nheads_kv, self.head_dim),
            v=make(batch, capacity, self.nheads_kv, self.head_dim),
            pos=make(batch, dtype=torch.int64),
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: AttentionState,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], AttentionState]:
        refuse_delta_t(self, delta_t)
        if packing is None:
            positions = state.pos.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
        else:
            positions = (state.pos[packing.sequence_ids(x.device)] + packing.positions(x.device)).unsqueeze(0)
        q, k, v = self._project(x, positions)
        config = self.config
        y, state = attention(
            q, k, v, state, window=config.window, scale=config.scale, softcap=config.softcap, packing=packing
        )
        return self.out_proj(y.flatten(-2)), state

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: AttentionState,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        refuse_delta_t(self, delta_t)
        q, k, v = (t[:, 0] for t in self._project(x.unsqueeze(1), gather(state.pos, slots).unsqueeze(1)))
        config = self.config
        y = attention_step_(q, k, v, state, slots, window=config.window, scale=config.scale, softcap=config.softcap)
        return self.out_proj(y.flatten(-2))

    def flops_per_token(self, context: int) -> int:
        projections = sum(m.weight.numel() for m in (self.q_proj, self.k_proj, self.v_proj, self.out_proj))
        seen = min(context, self.config.window or context)
        return 2 * projections + 4 * self.nheads * self.head_dim * seen

    def _project(self, x: Float[Tensor, "b l d"], positions: Int[Tensor, "b l"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values per head, with norm and rotation."""
        split = (-1, self.head_dim)
        q, k, v = (linear(x).unflatten(-1, split) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        theta, interleaved = self.config.rope_theta, self.config.rope_interleaved
        if theta is not None:
            both = torch.cat([q, k], 2)
            both = rotary(both, positions, theta=theta, interleaved=interleaved, rotary_dim=self.rotary_dim)
            q, k = both.split([self.nheads, self.nheads_kv], 2)
        return q, k, v


def _default_nheads(d_model: int, head_dim: int | None) -> int:
    """Heads of `head_dim`, or the most heads of 64 numbers or more that divide d_model; a narrow model has one."""
    if head_dim is not None:
        return divide("d_model", d_model, "head_dim", head_dim)
    return max(n for n in range(1, max(d_model // 64, 1) + 1) if d_model % n == 0)
