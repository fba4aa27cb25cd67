"""Rotation of pairs of numbers: by given angles, and by angles that grow with the position (rotary embedding)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from everstate.core.dtypes import state_dtype
from everstate.core.errors import RequestError
from everstate.core.op import anywhere, op
from everstate.ops.rotary.limits import accepts_rotary, accepts_rotate, refusal_of_width, width_of


@op
def rotate(
    x: Float[Tensor, "*#b p"], cos: Float[Tensor, "*#b s"], sin: Float[Tensor, "*#b s"], *, interleaved: bool = False
) -> Float[Tensor, "*#b p"]:
    """Turn the first s of the p / 2 pairs of x: `(a, b) -> (a cos - b sin, a sin + b cos)`; the others stay.

    Pair j is `(x[j], x[j + p/2])`, or `(x[2j], x[2j + 1])` when `interleaved`. `cos` and `sin` broadcast against x.
    """
    dtype, pairs = state_dtype(x.dtype), x.shape[-1] // 2
    shape, within = ((pairs, 2), -1) if interleaved else ((2, pairs), -2)
    a, b = x.to(dtype).unflatten(-1, shape).unbind(within)
    still = (0, pairs - cos.shape[-1])
    cos, sin = pad(cos.to(dtype), still, value=1.0), pad(sin.to(dtype), still)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], within).flatten(-2).to(x.dtype)


@op
def rotary(
    x: Float[Tensor, "b l h p"],
    positions: Int[Tensor, "#b l"],
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Float[Tensor, "b l h p"]:
    """Turn pair j of the first r = `rotary_dim` numbers (default all) by the angle `position * theta^(-2j / r)`.

    Pairs are half-split, (j, j + r/2), or adjacent, (2j, 2j + 1), when `interleaved`; see `rotate`. Angles are float64
    until cos and sin are taken: in float32 the frequency alone errs by 6e-8 of itself, which is 0.05 rad at position
    1,000,000, while in float64 the angle is right to 1e-9 there.

    Raises `RequestError` if r is odd, below 2 or above p.

    Source: Su et al. 2021, "RoFormer" (arXiv 2104.09864), section 3.2.
    """
    return by_position(rotate.reference, x, positions, theta, interleaved, rotary_dim)


def by_position(
    rotate: Callable[..., Tensor], x: Float[Tensor, "b l h p"], positions: Int[Tensor, "#b l"], theta: float,
    interleaved: bool, rotary_dim: int | None,
) -> Float[Tensor, "b l h p"]:  # fmt: skip
    """`rotary` by an implementation of `rotate`."""
    refused = refusal_of_width(x.shape[-1], rotary_dim)
    if refused is not None:
        raise RequestError(f"rotary {refused}; rotary_dim says how many")
    width = width_of(x.shape[-1], rotary_dim)
    exponents = torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width
    angles = (positions.to(torch.float64).unsqueeze(-1) * theta**-exponents).unsqueeze(2)
    dtype = state_dtype(x.dtype)
    cos, sin = torch.cos(angles).to(dtype), torch.sin(angles).to(dtype)
    turned = rotate(x[..., :width], cos, sin, interleaved=interleaved)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


rotate.add("triton", "everstate.ops.rotary.triton:rotate", accepts_rotate)
rotate.add("torch", "everstate.ops.rotary.halves:rotate", anywhere)
rotary.add("triton", "everstate.ops.rotary.triton:rotary", accepts_rotary)
rotary.add("torch", "everstate.ops.rotary.halves:rotary", anywhere)
