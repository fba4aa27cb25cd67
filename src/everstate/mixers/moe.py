"""A mixture of experts: many MLPs, of which each token goes through a few.

Sources: Shazeer et al. 2017 (arXiv 1701.06538); Dai et al. 2024, "DeepSeekMoE" (shared expert, arXiv 2401.06066).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import linear

from everstate.core.config import Config
from everstate.core.dtypes import state_dtype
from everstate.core.errors import ConfigError
from everstate.mixers.base import ChannelMixer, init_linear_, uniform_
from everstate.mixers.mlp import MLP, MLPConfig, default_d_hidden
from everstate.ops import experts, route
from everstate.ops.activations import Activation
from everstate.ops.experts import Score


class MoEConfig(Config):
    """Settings of one mixture of experts."""

    title = "moe"

    nexperts: PositiveInt = 8
    top_k: PositiveInt = 2
    """Experts that a token goes through."""
    d_hidden: PositiveInt | None = None
    """Width of each expert; default: that of an `mlp`."""
    activation: Activation = "silu"
    gated: bool = True
    score: Score = "softmax_topk"
    """See `everstate.ops.route`."""
    normalise: bool = True
    """Divide the weights of a token by their sum."""
    routed_scale: PositiveFloat = 1.0
    """Of the weights, last."""
    correction_bias: bool = False
    """Add a bias to the scores to select with. It comes with a checkpoint; gradients do not reach it."""
    d_shared: PositiveInt | None = None
    """Width of a shared expert, which sees every token (several are one of their total width); default: none."""


class Stacked(nn.Module):
    """The weights of one linear map per expert."""

    def __init__(self, nexperts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nexperts, d_out, d_in))

    def init_(self, generator: torch.Generator) -> None:
        """Uniform in +-1 / sqrt(fan_in)."""
        uniform_(self.weight, self.weight.shape[2] ** -0.5, generator)


class MoE(ChannelMixer):
    """`router`, the chosen experts, and a shared one. It looks at one token alone: elapsed time has no effect on it."""

    Config = MoEConfig
    router_bias: Tensor | None

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        if config.top_k > config.nexperts:
            raise ConfigError(f"moe: top_k {config.top_k} is more than nexperts {config.nexperts}; choose at most that")
        if config.top_k == 1 and config.nexperts > 1 and (config.normalise or config.score == "topk_softmax"):
            raise ConfigError(
                "moe: the normalised weight of a single expert is always 1, so that the router could not learn; "
                'for top_k = 1 set normalise = false and score = "softmax_topk" or "sigmoid"'
            )
        d_hidden = config.d_hidden or default_d_hidden(d_model, config.gated)
        self.router = nn.Linear(d_model, config.nexperts, bias=False)
        self.register_buffer("router_bias", torch.empty(config.nexperts) if config.correction_bias else None)
        self.in_proj = Stacked(config.nexperts, d_model, (1 + config.gated) * d_hidden)
        self.out_proj = Stacked(config.nexperts, d_hidden, d_model)
        self.shared = None
        if config.d_shared is not None:
            shared = MLPConfig(d_hidden=config.d_shared, activation=config.activation, gated=config.gated)
            self.shared = MLP(d_model, shared)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        init_linear_(self.router, generator)
        self.in_proj.init_(generator)
        self.out_proj.init_(generator)
        if self.router_bias is not None:
            nn.init.zeros_(self.router_bias)
        if self.shared is not None:
            self.shared.init_(generator)

    def read(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        config, dtype = self.config, state_dtype(x.dtype)
        # In float32, because a rounded logit sends a token to another expert.
        logits = linear(x.to(dtype), self.router.weight.to(dtype))
        weights, indices = route(
            logits, top_k=config.top_k, score=config.score, bias=self.router_bias, normalise=config.normalise,
            scale=config.routed_scale,
        )  # fmt: skip
        y = experts(
            x, weights, indices, self.in_proj.weight, self.out_proj.weight,
            activation=config.activation, gated=config.gated,
        )  # fmt: skip
        return y if self.shared is None else y + self.shared.read(x)

    def flops_per_token(self, context: int) -> int:
        config = self.config
        stacks = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        active = self.router.weight.numel() + stacks // config.nexperts * config.top_k
        return 2 * active + (0 if self.shared is None else self.shared.flops_per_token(context))
