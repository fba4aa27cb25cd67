"""The multilayer perceptron between the mixers of time: SwiGLU, squared ReLU, GELU.

Sources: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202); So et al. 2021, "Primer" (squared ReLU,
arXiv 2109.08668).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from everstate.core.config import Config
from everstate.core.errors import ConfigError
from everstate.core.state import Slots
from everstate.mixers.base import ChannelMixer, Empty, LinearEnds
from everstate.mixers.modules import Linear, Multiplier, Product, init_linear_, is_untouched, scaled
from everstate.ops import Normed, linear_activate
from everstate.ops.activations import Activation
from everstate.ops.glu import activated
from everstate.ops.norm.normed import divided


class MLPConfig(Config):
    """Settings of one MLP; the default is SwiGLU."""

    title = "mlp"

    d_hidden: PositiveInt | None = None
    """Default: 4 d_model, or 8/3 d_model with a gate (as many parameters), rounded up to a multiple of 8."""
    activation: Activation = "silu"
    gated: bool = True
    """`act(gate) * up` instead of `act(up)`; `in_proj` makes [gate | up]."""
    bias: bool = False
    gate_multiplier: Multiplier = 1.0
    """Of the gate, before its activation."""
    out_multiplier: Multiplier = 1.0
    """Of the output."""


class MLP(ChannelMixer, LinearEnds):
    """`in_proj`, activation, `out_proj`. It looks at one token alone, so elapsed time has no effect on it."""

    Config = MLPConfig

    def __init__(self, d_model: int, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        if config.gate_multiplier != 1.0 and not config.gated:
            raise ConfigError("mlp: gate_multiplier was given and gated is false; leave one of them out")
        d_hidden = config.d_hidden or default_d_hidden(d_model, config.gated)
        self.in_proj = Linear(d_model, (1 + config.gated) * d_hidden, bias=config.bias)
        self.out_proj = Linear(d_hidden, d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        init_linear_(self.in_proj, generator)
        init_linear_(self.out_proj, generator)

    def read(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        config, h = self.config, self.in_proj(x)
        if config.gate_multiplier != 1.0:
            gate, up = h.chunk(2, -1)
            h = torch.cat([gate * config.gate_multiplier, up], -1)
        return scaled(self.out_proj(activated(h, config.activation, config.gated)), config.out_multiplier)

    def product_step_(
        self,
        x: Float[Tensor, "b d"] | Normed,
        state: Empty,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Product | Float[Tensor, "b d"]:
        if not is_untouched(self, MLP, "read"):
            return self.read(divided(x))
        config, width = self.config, self.out_proj.in_features
        scale, bias = self.in_proj.folded(1.0, ((width, config.gate_multiplier), (width, 1.0)) if config.gated else 1.0)
        h = linear_activate(x, self.in_proj.weight, bias, scale=scale, activation=config.activation, gated=config.gated)
        return Product(self.out_proj, h, config.out_multiplier)

    def parts(self) -> tuple[nn.Module, ...]:
        return self.in_proj, self.out_proj

    def flops_per_token(self, context: int) -> int:
        return 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())


def default_d_hidden(d_model: int, gated: bool) -> int:
    """4 d_model, or 8/3 d_model with a gate, rounded up to a multiple of 8."""
    width = -(-8 * d_model // 3) if gated else 4 * d_model
    return -(-width // 8) * 8
