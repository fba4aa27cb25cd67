"""A mixture of experts: many MLPs, of which each token goes through a few.

Sources: Shazeer et al. 2017 (arXiv 1701.06538); Dai et al. 2024, "DeepSeekMoE" (shared expert, arXiv 2401.06066).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import sigmoid

from everstate.core.config import Config
from everstate.core.errors import ConfigError
from everstate.core.state import Slots
from everstate.mixers.base import ChannelMixer, Empty, LinearEnds, divide, has_linear_ends
from everstate.mixers.mlp import MLP, MLPConfig, default_d_hidden
from everstate.mixers.modules import (
    Linear,
    Product,
    RMSNorm,
    Special,
    Unmade,
    init_linear_,
    is_untouched,
    made,
    plus,
    uniform_,
)
from everstate.ops import Normed, experts, experts_add_rms_norm, topk_router
from everstate.ops.activations import Activation
from everstate.ops.experts import Score
from everstate.ops.norm.normed import divided


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
    normalise_eps: NonNegativeFloat = 0.0
    """Added to that sum."""
    routed_scale: PositiveFloat = 1.0
    """Of the weights, last."""
    correction_bias: bool = False
    """Add a bias to the scores to select with. It comes with a checkpoint; gradients do not reach it."""
    ngroups: PositiveInt = 1
    topk_groups: PositiveInt = 1
    """Of `ngroups` groups of experts a token chooses from this many."""
    d_latent: PositiveInt | None = None
    """Width to which tokens are projected for the routed experts (as in Nemotron 3); default: d_model, unprojected."""
    d_shared: PositiveInt | None = None
    """Width of a shared expert, which sees every token (several are one of their total width); default: none."""
    shared_gate: bool = False
    """Weigh the shared expert by the sigmoid of a number that the token chooses (as in Qwen)."""


class Stacked(nn.Module):
    """The weights of one linear map per expert."""

    def __init__(self, nexperts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nexperts, d_out, d_in))

    def init_(self, generator: torch.Generator) -> None:
        """Uniform in +-1 / sqrt(fan_in)."""
        uniform_(self.weight, self.weight.shape[2] ** -0.5, generator)


class Router(Special):
    """What makes a logit for each expert, in float32: a rounded logit sends a token to another expert."""

    in_float32 = frozenset({"weight"})

    def __init__(self, d_model: int, nexperts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nexperts, d_model))

    def init_(self, generator: torch.Generator) -> None:
        """Uniform in +-1 / sqrt(fan_in)."""
        uniform_(self.weight, self.weight.shape[1] ** -0.5, generator)


class MoE(ChannelMixer, LinearEnds):
    """`router`, the chosen experts, and a shared one. It looks at one token alone: elapsed time has no effect on it."""

    Config = MoEConfig
    router_bias: Tensor | None

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        _check_groups(config)
        if config.top_k == 1 and config.nexperts > 1 and (config.normalise or config.score == "topk_softmax"):
            raise ConfigError(
                "moe: the normalised weight of a single expert is always 1, so that the router could not learn; "
                'for top_k = 1 set normalise = false and score = "softmax_topk" or "sigmoid"'
            )
        d_hidden = config.d_hidden or default_d_hidden(d_model, config.gated)
        width = config.d_latent or d_model
        self.router = Router(d_model, config.nexperts)
        self.register_buffer("router_bias", torch.empty(config.nexperts) if config.correction_bias else None)
        self.latent_in = None if config.d_latent is None else Linear(d_model, width, bias=False)
        self.in_proj = Stacked(config.nexperts, width, (1 + config.gated) * d_hidden)
        self.out_proj = Stacked(config.nexperts, d_hidden, width)
        self.latent_out = None if config.d_latent is None else Linear(width, d_model, bias=False)
        self.shared, self.shared_gate = None, None
        if config.shared_gate and config.d_shared is None:
            raise ConfigError("moe: shared_gate was given and there is no shared expert; give d_shared")
        if config.d_shared is not None:
            shared = MLPConfig(d_hidden=config.d_shared, activation=config.activation, gated=config.gated)
            self.shared = MLP(d_model, shared)
            self.shared_gate = Linear(d_model, 1, bias=False) if config.shared_gate else None

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        self.router.init_(generator)
        for projection in (self.latent_in, self.latent_out, self.shared_gate):
            if projection is not None:
                init_linear_(projection, generator)
        self.in_proj.init_(generator)
        self.out_proj.init_(generator)
        if self.router_bias is not None:
            nn.init.zeros_(self.router_bias)
        if self.shared is not None:
            self.shared.init_(generator)

    def read(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        y = self._experts(x, *self._choose(x))
        y = y if self.latent_out is None else self.latent_out(y)
        if self.shared is None:
            return y
        shared = self.shared.read(x)
        return y + (shared if self.shared_gate is None else shared * sigmoid(self.shared_gate(x)))

    def product_step_(
        self,
        x: Float[Tensor, "b d"] | Normed,
        state: Empty,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Unmade | Float[Tensor, "b d"]:
        if not is_untouched(self, MoE, "read"):
            return self.read(divided(x))
        chosen = self._choose(x)
        return Mixture(self, x, *chosen) if self._is_plain_sum() else self.joined(x, *chosen)

    def joined(
        self, x: Float[Tensor, "b d"] | Normed, weights: Float[Tensor, "b k"], indices: Int[Tensor, "b k"]
    ) -> Product | Float[Tensor, "b d"]:
        """What these experts and the shared one give, for one token."""
        routed = self._experts(x, weights, indices)
        y = routed if self.latent_out is None else Product(self.latent_out, routed)
        if self.shared is None:
            return y
        plain = has_linear_ends(self.shared)
        shared = self.shared.product_step_(x, Empty()) if plain else self.shared.read(divided(x))
        if self.shared_gate is not None:
            shared = made(shared) * sigmoid(self.shared_gate(x))
        return plus(made(y), shared)

    def parts(self) -> tuple[nn.Module | None, ...]:
        return self.latent_in, self.latent_out, self.shared_gate, self.shared

    def flops_per_token(self, context: int) -> int:
        config = self.config
        stacks = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        dense = [self.router, self.latent_in, self.latent_out, self.shared_gate]
        always = sum(part.weight.numel() for part in dense if part is not None)
        active = always + stacks // config.nexperts * config.top_k
        return 2 * active + (0 if self.shared is None else self.shared.flops_per_token(context))

    def _choose(self, x: Float[Tensor, "*b d"] | Normed) -> tuple[Float[Tensor, "*b k"], Int[Tensor, "*b k"]]:
        """Weights and indices of the experts of each token."""
        config = self.config
        return topk_router(
            x, self.router.weight, top_k=config.top_k, score=config.score, bias=self.router_bias,
            normalise=config.normalise, eps=config.normalise_eps, scale=config.routed_scale,
            ngroups=config.ngroups, topk_groups=config.topk_groups,
        )  # fmt: skip

    def _is_plain_sum(self) -> bool:
        """Whether what is given is the sum of what experts give, each by its own weights and nothing else."""
        if self.latent_in is not None or self.shared_gate is not None:
            return False
        if self.shared is None:
            return True
        if type(self.shared) is not MLP:
            return False
        ours, its = self.config, self.shared.config
        if (its.activation, its.gated) != (ours.activation, ours.gated):
            return False
        if (its.gate_multiplier, its.out_multiplier) != (1.0, 1.0):
            return False
        ends = self.shared.in_proj, self.shared.out_proj
        bare = all(type(part) is Linear and part.scale is None and part.bias is None for part in ends)
        return bare and has_linear_ends(self.shared)

    def _experts(
        self, x: Float[Tensor, "*b d"] | Normed, weights: Float[Tensor, "*b k"], indices: Int[Tensor, "*b k"]
    ) -> Float[Tensor, "*b w"]:
        """What these experts give, before `latent_out`."""
        return experts(
            x if self.latent_in is None else self.latent_in(x), weights, indices,
            self.in_proj.weight, self.out_proj.weight, activation=self.config.activation, gated=self.config.gated,
        )  # fmt: skip


@dataclass(frozen=True)
class Mixture(Unmade):
    """What experts that are chosen, and a shared one, give to one token."""

    moe: MoE
    x: Float[Tensor, "b d"] | Normed
    weights: Float[Tensor, "b k"]
    indices: Int[Tensor, "b k"]

    def value(self) -> Float[Tensor, "b d"]:
        return made(self.moe.joined(self.x, self.weights, self.indices))

    def add_to(
        self, residual: Float[Tensor, "b d"], norm: RMSNorm, multiplier: float
    ) -> tuple[Float[Tensor, "b d"], Normed]:
        moe, shared = self.moe, self.moe.shared
        return experts_add_rms_norm(
            self.x, self.weights, self.indices, moe.in_proj.weight, moe.out_proj.weight, residual, norm.factor(),
            shared=None if shared is None else (shared.in_proj.weight, shared.out_proj.weight),
            activation=moe.config.activation, gated=moe.config.gated, eps=norm.eps, multiplier=multiplier,
        )  # fmt: skip


def _check_groups(config: MoEConfig) -> None:
    """Refuse a choice that cannot be made."""
    size = divide("nexperts", config.nexperts, "ngroups", config.ngroups)
    if config.topk_groups > config.ngroups:
        raise ConfigError(
            f"moe: topk_groups {config.topk_groups} is more than ngroups {config.ngroups}; choose at most that"
        )
    if config.top_k > config.topk_groups * size:
        of = (
            "" if config.topk_groups == config.ngroups else f", of which {config.topk_groups * size} can be chosen from"
        )
        raise ConfigError(f"moe: top_k {config.top_k} is more than nexperts {config.nexperts}{of}; choose at most that")
