"""What a Mamba-2 layer does to what `in_proj` gives before its scan, and to what that gives before `out_proj`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from everstate.core.dtypes import state_dtype


class Mamba2Layer(NamedTuple):
    """A Mamba-2 layer without its projections: parameters, then settings.

    dt_bias, A_log: of each head; D: of each head, or of each channel of one; norm: scale of the norm of the output.
    """

    conv_weight: Float[Tensor, "d k"]
    conv_bias: Float[Tensor, " d"] | None
    dt_bias: Float[Tensor, " h"]
    A_log: Float[Tensor, " h"]
    D: Float[Tensor, " h"] | Float[Tensor, "h p"]
    norm: Float[Tensor, " e"] | None = None
    ngroups: int = 1
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)


class Mamba2State(NamedTuple):
    """conv: the last d_conv - 1 inputs of the convolution; ssm: the state of each head."""

    conv: Float[Tensor, "b channels k1"]
    ssm: Float[Tensor, "b h p n"]


def parts(
    projected: Float[Tensor, "*b w"], layer: Mamba2Layer
) -> tuple[Float[Tensor, "*b e"], Float[Tensor, "*b d"], Float[Tensor, "*b h"]]:
    """The gate z, the inputs of the convolution, and dt."""
    channels, heads = len(layer.conv_weight), len(layer.A_log)
    z, xBC, dt = projected.split([projected.shape[-1] - channels - heads, channels, heads], -1)
    return z, xBC, dt


def inputs(
    xBC: Float[Tensor, "*b d"], layer: Mamba2Layer, ssm: Float[Tensor, "*slots h p n"]
) -> tuple[Float[Tensor, "*b h p"], Float[Tensor, "*b g n"], Float[Tensor, "*b g n"]]:
    """The output of the convolution as x per head and B, C per group."""
    heads, headdim, d_state = ssm.shape[1:]
    width = layer.ngroups * d_state
    x, B, C = xBC.split([heads * headdim, width, width], -1)
    B, C = (m.unflatten(-1, (layer.ngroups, d_state)) for m in (B, C))
    return x.unflatten(-1, (heads, headdim)), B, C


def decay(
    dt: Float[Tensor, "*b h"], delta_t: Float[Tensor, "*b"] | None, layer: Mamba2Layer
) -> tuple[Float[Tensor, "*b h"], Float[Tensor, "*b h"]]:
    """The log decay `dt A` and the step `dt` of each head."""
    dtype = state_dtype(dt.dtype)
    dt = softplus(dt.to(dtype) + layer.dt_bias.to(dtype))
    if layer.dt_limit != (0.0, math.inf):
        dt = dt.clamp(*layer.dt_limit)
    if delta_t is not None:
        dt = dt * delta_t.unsqueeze(-1)
    return dt * -torch.exp(layer.A_log.to(dtype)), dt


def leave(
    y: Float[Tensor, "*b h p"], z: Float[Tensor, "*b e"], layer: Mamba2Layer, gate: Callable[..., Tensor],
    gated_norm: Callable[..., Tensor],
) -> Float[Tensor, "*b e"]:  # fmt: skip
    """Gate and norm; `gate` is `gated`, and `gated_norm` is `gated_rms_norm`."""
    if layer.norm is None:
        return gate(y.flatten(-2), z)
    return gated_norm(
        y.flatten(-2), z, layer.norm, eps=layer.norm_eps, groups=layer.ngroups, norm_before_gate=layer.norm_before_gate
    )
