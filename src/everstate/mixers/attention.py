"""Causal attention: grouped queries, sliding window, rotary positions, soft cap, norms on queries and keys.

Source: Vaswani et al. 2017 (arXiv 1706.03762); see `everstate.ops.attention` and `everstate.ops.rotary`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import sigmoid

from everstate.core.config import Config
from everstate.core.dtypes import state_dtype
from everstate.core.errors import ConfigError
from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import LinearEnds, divide, refuse_delta_t
from everstate.mixers.modules import (
    Linear,
    Multiplier,
    Product,
    RMSNorm,
    init_linear_,
    nothing_convolved,
    scaled,
    uniform_,
)
from everstate.ops import (
    AttentionState,
    Normed,
    Rope,
    attention,
    attention_step_,
    causal_conv1d,
    causal_conv1d_step_,
)


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
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm of queries and keys before the rotation: of each head alone, or of all heads together."""
    qk_norm_kind: Literal["rms", "rms1p"] = "rms"
    norm_eps: PositiveFloat = 1e-5
    bias: bool = False
    out_bias: bool | None = None
    """Of `out_proj`; default: as `bias`."""
    output_gate: bool = False
    """Multiply what was attended to by the sigmoid of a projection of the token (as in Qwen3-Next)."""
    d_conv: PositiveInt | None = None
    """Width of a causal convolution over queries, keys and values (as in Mamba-2 with attention); default: none."""
    in_multiplier: Multiplier = 1.0
    """Of the input."""
    key_multiplier: Multiplier = 1.0
    """Of the keys, before norm and rotation."""
    out_multiplier: Multiplier = 1.0
    """Of the output."""
    context: NonNegativeInt = 4096
    """Tokens that a state holds when `init_state` is not told; a window needs none beyond itself."""


class ConvAttentionState(NamedTuple):
    """conv: the last d_conv - 1 inputs of the convolution; cache: keys and values."""

    conv: Float[Tensor, "b channels k1"]
    cache: AttentionState


class Attention(LinearEnds):
    """`q_proj k_proj v_proj`, optional convolution, norm and rotation, attention, optional gate, `out_proj`."""

    Config = AttentionConfig
    no_decay = frozenset({"conv_bias"})

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
        self.q_proj = Linear(d_model, width, bias=config.bias)
        self.k_proj = Linear(d_model, width_kv, bias=config.bias)
        self.v_proj = Linear(d_model, width_kv, bias=config.bias)
        self.gate_proj = Linear(d_model, width, bias=config.bias) if config.output_gate else None
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            whole, one_plus = config.qk_norm == "full", config.qk_norm_kind == "rms1p"
            self.q_norm = RMSNorm(width if whole else self.head_dim, config.norm_eps, one_plus=one_plus)
            self.k_norm = RMSNorm(width_kv if whole else self.head_dim, config.norm_eps, one_plus=one_plus)
        self.widths, self.conv_weight, self.conv_bias = [width, width_kv, width_kv], None, None
        if config.d_conv is not None:
            self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), config.d_conv))
            self.conv_bias = nn.Parameter(torch.empty(sum(self.widths)))
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.out_proj = Linear(width, d_model, bias=out_bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.out_proj):
            if linear is not None:
                init_linear_(linear, generator)
        if self.conv_weight is not None and self.conv_bias is not None:
            uniform_(self.conv_weight, self.conv_weight.shape[1] ** -0.5, generator)
            uniform_(self.conv_bias, self.conv_weight.shape[1] ** -0.5, generator)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.init_()

    def init_state(self, batch: int, *, context: int | None = None) -> AttentionState | ConvAttentionState:
        """Room for `context` tokens (None: for the window, or for `config.context`), and never more than the window.

        With `context=0` nothing is remembered: forward is attention within its segment, which is the fast way to train.
        """
        window = self.config.window
        capacity = (window or self.config.context) if context is None else min(context, window or context)
        make, dtype = self.k_proj.weight.new_zeros, self.k_proj.dtype
        cache = AttentionState(
            k=make(batch, capacity, self.nheads_kv, self.head_dim, dtype=dtype),
            v=make(batch, capacity, self.nheads_kv, self.head_dim, dtype=dtype),
            pos=make(batch, dtype=torch.int64),
        )
        if self.conv_weight is None:
            return cache
        channels, width = self.conv_weight.shape
        dtype = state_dtype(self.conv_weight.dtype)
        return ConvAttentionState(nothing_convolved(batch, channels, width - 1, self.conv_weight, dtype), cache)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: AttentionState | ConvAttentionState,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], AttentionState | ConvAttentionState]:
        refuse_delta_t(self, delta_t)
        x, config = scaled(x, self.config.in_multiplier), self.config
        q, k, v = self.q_proj(x), scaled(self.k_proj(x), config.key_multiplier), self.v_proj(x)
        conv = None
        if isinstance(state, ConvAttentionState):
            assert self.conv_weight is not None
            qkv = torch.cat([q, k, v], -1)
            qkv, conv = causal_conv1d(qkv, self.conv_weight, self.conv_bias, state.conv, packing=packing)
            (q, k, v), state = qkv.split(self.widths, -1), state.cache
        q, k, v = self._heads(q, k, v)
        y, cache = attention(q, k, v, state, **self._settings, packing=packing)
        return self._finish(y, x), cache if conv is None else ConvAttentionState(conv, cache)

    def product_step_(
        self,
        x: Float[Tensor, "b d"] | Normed,
        state: AttentionState | ConvAttentionState,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Product:
        refuse_delta_t(self, delta_t)
        config, before = self.config, self.config.in_multiplier
        q, v = (linear.step(x, before=before) for linear in (self.q_proj, self.v_proj))
        k = self.k_proj.step(x, before=before, behind=config.key_multiplier)
        if isinstance(state, ConvAttentionState):
            assert self.conv_weight is not None
            qkv = causal_conv1d_step_(torch.cat([q, k, v], -1), self.conv_weight, self.conv_bias, state.conv, slots)
            (q, k, v), state = qkv.split(self.widths, -1), state.cache
        y = attention_step_(*self._heads(q, k, v), state, slots, **self._settings).flatten(-2)
        if self.gate_proj is not None:
            y = y * sigmoid(self.gate_proj.step(x, before=before))
        return Product(self.out_proj, y, config.out_multiplier)

    def parts(self) -> tuple[nn.Module | None, ...]:
        return self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.out_proj

    def flops_per_token(self, context: int) -> int:
        linears = (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.out_proj)
        projections = sum(linear.weight.numel() for linear in linears if linear is not None)
        projections += 0 if self.conv_weight is None else self.conv_weight.numel()
        seen = min(context, self.config.window or context)
        return 2 * projections + 4 * self.nheads * self.head_dim * seen

    @property
    def _settings(self) -> dict[str, Any]:
        """What `attention` and `attention_step_` are called with beside tensors."""
        config, rope = self.config, None
        if config.rope_theta is not None:
            rope = Rope(config.rope_theta, config.rope_interleaved, self.rotary_dim)
        return {"window": config.window, "scale": config.scale, "softcap": config.softcap, "rope": rope}

    def _heads(
        self, q: Float[Tensor, "*b q"], k: Float[Tensor, "*b k"], v: Float[Tensor, "*b k"]
    ) -> tuple[Float[Tensor, "*b h p"], Float[Tensor, "*b g p"], Float[Tensor, "*b g p"]]:
        """Queries, keys and values per head, with norms."""
        whole = self.config.qk_norm == "full"
        if whole:
            q, k = self._norms(q, k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if not whole:
            q, k = self._norms(q, k)
        return q, k, v

    def _norms(self, q: Float[Tensor, "*q n"], k: Float[Tensor, "*k m"]) -> tuple[Tensor, Tensor]:
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def _finish(self, y: Float[Tensor, "*b h p"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Gate and last projection of what was attended to."""
        y = y.flatten(-2)
        if self.gate_proj is not None:
            y = y * sigmoid(self.gate_proj(x))
        return scaled(self.out_proj(y), self.config.out_multiplier)


def _default_nheads(d_model: int, head_dim: int | None) -> int:
    """Heads of `head_dim`, or the most heads of 64 numbers or more that divide d_model; a narrow model has one."""
    if head_dim is not None:
        return divide("d_model", d_model, "head_dim", head_dim)
    return max(n for n in range(1, max(d_model // 64, 1) + 1) if d_model % n == 0)
