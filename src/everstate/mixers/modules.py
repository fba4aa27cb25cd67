"""The modules that mixers are made of: linear maps and norms, with their multipliers and first values."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeAlias, TypeGuard

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from everstate.core.dtypes import state_dtype
from everstate.core.kernels import kept
from everstate.ops import Normed, add_rms_norm, linear, linear_add_rms_norm, rms_norm
from everstate.ops.norm.normed import divided


class Special(nn.Module):
    """A module that marks which of its own parameters want special treatment, by name and only here.

    no_decay: never decayed by an optimizer (`train/optim.py` reads it).
    in_float32: kept in float32 whatever the dtype of the model (`cast_` reads it).
    """

    no_decay: ClassVar[frozenset[str]] = frozenset()
    in_float32: ClassVar[frozenset[str]] = frozenset()


Multiplier = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""A constant by which something is multiplied, 1 being without."""


def scaled(x: Float[Tensor, "*b"], multiplier: float) -> Float[Tensor, "*b"]:
    """`multiplier * x`, and x itself where the multiplier is 1."""
    return x if multiplier == 1.0 else x * multiplier


Multipliers: TypeAlias = tuple[tuple[int, float], ...]
"""Of the outputs of a linear map: so many times this, the next times that."""


class Linear(Special):
    """A linear map. `scale` is None, or belongs to weights of 8 bits: one factor for each output."""

    scale: Float[Tensor, " n"] | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("scale", None)
        self._dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of what it reads and gives: that of the weights, or the one they had before they were 8 bits wide."""
        return self._dtype or self.weight.dtype

    def matrix(self) -> Float[Tensor, "n k"]:
        """The weights as the numbers that they stand for."""
        return self.weight if self.scale is None else (self.weight * self.scale[:, None]).to(self.dtype)

    @torch.no_grad()
    def quantize_(self) -> None:
        """Round the weights to 8 bits: whole numbers from -127 to 127, times the `scale` of their output."""
        if self.scale is not None:
            return
        self._dtype, wide = self.weight.dtype, self.weight.to(state_dtype(self.weight.dtype))
        largest = wide.abs().amax(1)
        scale = torch.where(largest > 0, largest, 127.0) / 127
        self.weight = nn.Parameter((wide / scale[:, None]).round().to(torch.int8), requires_grad=False)
        self.scale = scale

    def forward(self, x: Float[Tensor, "*b k"] | Normed) -> Float[Tensor, "*b n"]:
        """See `everstate.ops.linear`."""
        return linear(x, self.weight, self.bias, scale=self.scale)

    def step(
        self, x: Float[Tensor, "b k"] | Normed, *, before: float = 1.0, behind: float | Multipliers = 1.0
    ) -> Float[Tensor, "b n"]:
        """`behind * forward(before * x)` for one token, on a GPU of few rows in one launch; see `folded`."""
        scale, bias = self.folded(before, behind)
        return linear(x, self.weight, bias, scale=scale)

    def folded(
        self, before: float, behind: float | Multipliers
    ) -> tuple[Float[Tensor, " n"] | None, Float[Tensor, " n"] | None]:
        """The scale and the bias of `behind * (W (before * x) + bias)`."""
        each = behind if isinstance(behind, tuple) else ((self.out_features, behind),)
        if before == 1.0 and all(multiplier == 1.0 for _, multiplier in each):
            return self.scale, self.bias
        scale = kept(("scale", self, before, each), lambda: self._multiplied(self.scale, before, each))
        if self.bias is None:
            return scale, None
        return scale, kept(("bias", self, each), lambda: self._multiplied(self.bias, 1.0, each))

    def _multiplied(self, given: Tensor | None, before: float, each: Multipliers) -> Float[Tensor, " n"]:
        """A number of each output, 1 if none is given, times its multipliers."""
        dtype, counts = state_dtype(self.dtype), [count for count, _ in each]
        numbers = self.weight.new_ones(self.out_features, dtype=dtype) if given is None else given.to(dtype)
        parts = zip(numbers.split(counts), each, strict=True)
        return torch.cat([before * multiplier * part for part, (_, multiplier) in parts])


class RMSNorm(Special):
    """The learned scale of `ops.rms_norm`; with `one_plus` the weight is how far the scale is from 1 (as in Gemma)."""

    no_decay = frozenset({"weight"})

    def __init__(self, width: int, eps: float, *, one_plus: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.one_plus = one_plus
        self.weight = nn.Parameter(torch.empty(width))

    def init_(self) -> None:
        """A scale of one."""
        nn.init.constant_(self.weight, 0.0 if self.one_plus else 1.0)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """See `everstate.ops.rms_norm`."""
        return rms_norm(x, self.factor(), eps=self.eps)

    def add(self, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"], multiplier: float) -> tuple[Tensor, Tensor]:
        """`x + multiplier y`, and its norm in the dtype of y."""
        return add_rms_norm(x, y, self.factor(), eps=self.eps, multiplier=multiplier)

    def factor(self) -> Float[Tensor, " d"]:
        """What the normalised numbers are multiplied by."""
        if not self.one_plus:
            return self.weight
        # Added in float32: next to 1, half precision would lose most of a small weight.
        return kept(self, lambda: 1 + self.weight.to(state_dtype(self.weight.dtype)))


class LayerNorm(Special):
    """Zero mean and unit variance, then a learned scale and shift; computed in float32 (Ba et al. 2016, 1607.06450)."""

    no_decay = frozenset({"weight", "bias"})

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def init_(self) -> None:
        """A scale of one, no shift."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """`(x - mean) / sqrt(variance + eps) * weight + bias`."""
        dtype = state_dtype(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return nn.functional.layer_norm(x.to(dtype), weight.shape, weight, bias, self.eps).to(x.dtype)

    def add(self, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"], multiplier: float) -> tuple[Tensor, Tensor]:
        """`x + multiplier y`, and its norm in the dtype of y."""
        x = torch.add(x, y, alpha=multiplier)
        return x, self(x).to(y.dtype)


def is_untouched(part: nn.Module, own: type[nn.Module], *methods: str) -> bool:
    """Whether these methods are those of `own`: neither a class nor an instance has others in their place."""
    kind, instead = type(part), vars(part)
    return all(name not in instead and getattr(kind, name) is getattr(own, name) for name in methods)


def has_hooks(part: nn.Module) -> bool:
    """Whether somebody else sees what a part of a model is given, or what it gives."""
    return bool(part._forward_hooks or part._forward_pre_hooks or _global_forward_hooks or _global_forward_pre_hooks)


def is_plain(part: nn.Module | None) -> TypeGuard[Linear]:
    """Whether a part is a `Linear` and nothing else: it may have been replaced, or somebody looks at its calls."""
    return type(part) is Linear and is_untouched(part, Linear, "forward", "step", "folded") and not has_hooks(part)


class Unmade(ABC):
    """What a layer gives to one token, not made yet: a residual stream may take it in where it is made."""

    @abstractmethod
    def value(self) -> Float[Tensor, "b n"]:
        """What it is when it is made."""

    @abstractmethod
    def add_to(
        self, residual: Float[Tensor, "b n"], norm: RMSNorm, multiplier: float
    ) -> tuple[Float[Tensor, "b n"], Normed]:
        """`residual + multiplier value()`, and its norm in the dtype of what was read; see `ops.add_rms_norm`."""


@dataclass(frozen=True)
class Product(Unmade):
    """`behind * linear(x) + addend`."""

    linear: nn.Module
    """A `Linear`, or what somebody put in its place."""
    x: Float[Tensor, "b k"] | Normed
    behind: float = 1.0
    addend: Float[Tensor, "b n"] | None = None

    def value(self) -> Float[Tensor, "b n"]:
        linear, x = self.linear, self.x
        y = linear.step(x, behind=self.behind) if is_plain(linear) else scaled(linear(divided(x)), self.behind)
        return y if self.addend is None else self.addend + y

    def add_to(
        self, residual: Float[Tensor, "b n"], norm: RMSNorm, multiplier: float
    ) -> tuple[Float[Tensor, "b n"], Normed]:
        assert is_plain(self.linear)
        scale, bias = self.linear.folded(1.0, self.behind)
        return linear_add_rms_norm(
            self.x, self.linear.weight, bias, residual, norm.factor(), scale=scale, addend=self.addend, eps=norm.eps,
            multiplier=multiplier,
        )  # fmt: skip


def made(y: Float[Tensor, "b n"] | Unmade) -> Float[Tensor, "b n"]:
    """What a layer gives, be it made yet or not."""
    return y.value() if isinstance(y, Unmade) else y


def plus(before: Float[Tensor, "b n"], y: Float[Tensor, "b n"] | Unmade) -> Float[Tensor, "b n"] | Product:
    """The sum of what one layer gives and what another beside it gives."""
    if not isinstance(y, Product):
        return before + made(y)
    return replace(y, addend=before if y.addend is None else before + y.addend)


NormKind = Literal["rms", "rms1p", "layer"]
"""Root mean square; the same with a weight that is added to 1; or mean and variance, with a bias."""


Norm: TypeAlias = RMSNorm | LayerNorm


def build_norm(kind: NormKind, width: int, eps: float) -> Norm:
    """A norm over the last dimension."""
    return LayerNorm(width, eps) if kind == "layer" else RMSNorm(width, eps, one_plus=kind == "rms1p")


def nothing_convolved(
    batch: int, channels: int, kept: int, like: Tensor, dtype: torch.dtype | None = None
) -> Float[Tensor, "b d k1"]:
    """What a short convolution keeps of its inputs, before the first, in the dtype of a tensor or another.

    On a GPU neighbouring channels lie side by side: kernels of one token read many at once.
    """
    if like.is_cuda:
        return like.new_zeros(batch, kept, channels, dtype=dtype).transpose(1, 2)
    return like.new_zeros(batch, channels, kept, dtype=dtype)


def init_linear_(linear: Linear, generator: torch.Generator) -> None:
    """Uniform in +-1 / sqrt(fan_in), bias zero."""
    uniform_(linear.weight, linear.in_features**-0.5, generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with uniform values in +-bound; drawn on the CPU, so that a seed gives one model on every device."""
    with torch.no_grad():
        tensor.copy_((torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound)


def log_uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Float[Tensor, ...]:
    """Values whose logarithm is uniform in [log low, log high), float64."""
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.exp(u * (math.log(high) - math.log(low)) + math.log(low))


def inverse_softplus(y: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The x with softplus(x) = y."""
    return y + torch.log(-torch.expm1(-y))
