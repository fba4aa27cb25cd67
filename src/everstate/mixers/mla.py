"""Multi-head latent attention without positions: all heads read keys and values out of one small vector per token.

Sources: DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434), section 2.1; Kimi Team 2025, "Kimi Linear" (arXiv
2510.26692), section 4, which leaves the rotation out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from everstate.core.config import Config
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import Mixer, refuse_delta_t
from everstate.mixers.modules import Linear, RMSNorm, init_linear_
from everstate.ops import AttentionState, attention, attention_step_


class MLAConfig(Config):
    """Settings of one latent attention layer."""

    title = "mla"

    nheads: PositiveInt = 16
    d_latent: PositiveInt = 512
    """Width of the vector from which each head reads its keys and values."""
    d_nope: PositiveInt = 128
    """Part of a key that each head reads from the latent vector."""
    d_shared: PositiveInt = 64
    """Part of a key that all heads share."""
    d_value: PositiveInt = 128
    q_rank: PositiveInt | None = None
    """Width of a normed vector in front of the queries; default: queries straight from the input."""
    norm_eps: PositiveFloat = 1e-6
    bias: bool = False
    """Of the first projections and the last; the expansions have none."""
    context: NonNegativeInt = 4096
    """Tokens that a state holds when `init_state` is not told."""


class MLA(Mixer):
    """`kv_a_proj -> [latent | k_shared]`, `k = [W_k norm(latent) | k_shared]`, `v = W_v norm(latent)`, attention.

    Computed in the space of the latent vectors: `q . W_k c = (W_k^T q) . c` and `sum w W_v c = W_v sum w c`. That is
    attention with one key head `[latent | k_shared]` whose first part is the value too, so no key or value is ever
    expanded and every mode is one path through the same op. The price are wider products in a long prefill.
    """

    Config = MLAConfig

    def __init__(self, d_model: int, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        self.d_key = config.d_nope + config.d_shared
        width, rank = config.nheads * self.d_key, config.q_rank
        self.q_proj = Linear(d_model, width, bias=False) if rank is None else None
        self.q_a_proj = None if rank is None else Linear(d_model, rank, bias=config.bias)
        self.q_a_norm = None if rank is None else RMSNorm(rank, config.norm_eps)
        self.q_b_proj = None if rank is None else Linear(rank, width, bias=False)
        self.kv_a_proj = Linear(d_model, config.d_latent + config.d_shared, bias=config.bias)
        self.kv_a_norm = RMSNorm(config.d_latent, config.norm_eps)
        self.kv_b_proj = Linear(config.d_latent, config.nheads * (config.d_nope + config.d_value), bias=False)
        self.out_proj = Linear(config.nheads * config.d_value, d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        for linear in (self.q_proj, self.q_a_proj, self.q_b_proj, self.kv_a_proj, self.kv_b_proj, self.out_proj):
            if linear is not None:
                init_linear_(linear, generator)
        for norm in (self.q_a_norm, self.kv_a_norm):
            if norm is not None:
                norm.init_()

    def init_state(self, batch: int, *, context: int | None = None) -> AttentionState:
        """Room for `context` tokens (None: `config.context`); with 0 forward is attention within its segment.

        `k` holds `[latent | k_shared]` of each token and `v` nothing, since the values are in `k`.
        """
        config, make = self.config, self.kv_a_proj.weight.new_zeros
        capacity = config.context if context is None else context
        return AttentionState(
            k=make(batch, capacity, 1, config.d_latent + config.d_shared),
            v=make(batch, capacity, 1, 0),
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
        q, k = self._project(x)
        y, after = attention(q, k, k, _both(state), scale=self.d_key**-0.5, packing=packing)
        return self._finish(y), after._replace(v=state.v)

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: AttentionState,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        refuse_delta_t(self, delta_t)
        q, k = self._project(x)
        return self._finish(attention_step_(q, k, k, _both(state), slots, scale=self.d_key**-0.5))

    def flops_per_token(self, context: int) -> int:
        linears = self.q_proj, self.q_a_proj, self.q_b_proj, self.kv_a_proj, self.kv_b_proj, self.out_proj
        projections = sum(m.weight.numel() for m in linears if m is not None)
        return 2 * projections + 4 * self.config.nheads * (self.config.d_latent + self.config.d_shared) * context

    def _project(self, x: Float[Tensor, "*b d"]) -> tuple[Float[Tensor, "*b h p"], Float[Tensor, "*b 1 p"]]:
        """The query of each head and the one key, in the space of `[latent | k_shared]`."""
        config = self.config
        latent, k_shared = self.kv_a_proj(x).split([config.d_latent, config.d_shared], -1)
        nope, q_shared = self._queries(x).unflatten(-1, (-1, self.d_key)).split([config.d_nope, config.d_shared], -1)
        q = torch.einsum("...hn,hnc->...hc", nope, self._expansions()[0])
        return torch.cat([q, q_shared], -1), torch.cat([self.kv_a_norm(latent), k_shared], -1).unsqueeze(-2)

    def _queries(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b hp"]:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None and self.q_a_norm is not None and self.q_b_proj is not None
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))

    def _finish(self, y: Float[Tensor, "*b h p"]) -> Float[Tensor, "*b d"]:
        """The values of each head from its mean of latent vectors, and the last projection."""
        latent = y[..., : self.config.d_latent]
        return self.out_proj(torch.einsum("...hc,hvc->...hv", latent, self._expansions()[1]).flatten(-2))

    def _expansions(self) -> tuple[Float[Tensor, "h n c"], Float[Tensor, "h v c"]]:
        """The matrices of each head from a latent vector to its part of the key and to its value."""
        config = self.config
        heads = self.kv_b_proj.matrix().unflatten(0, (config.nheads, -1))
        keys, values = heads.split([config.d_nope, config.d_value], 1)
        return keys, values


def _both(state: AttentionState) -> AttentionState:
    """The same ring as keys and values: what the op writes twice is the same, and lies in memory once."""
    return state._replace(v=state.k)
