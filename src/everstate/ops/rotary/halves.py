"""Rotation in few passes over memory: half of all pairs at a time, each in two products."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.dtypes import state_dtype
from everstate.ops.rotary import by_position


def rotate(
    x: Float[Tensor, "*#b p"], cos: Float[Tensor, "*#b s"], sin: Float[Tensor, "*#b s"], *, interleaved: bool = False
) -> Float[Tensor, "*#b p"]:
    """See `everstate.ops.rotary.rotate`."""
    dtype, pairs, half = state_dtype(x.dtype), cos.shape[-1], x.shape[-1] // 2
    halves = deinterleave(x) if interleaved else x
    a, b = (t.to(dtype) for t in (halves[..., :pairs], halves[..., half : half + pairs]))
    cos, sin = cos.to(dtype), sin.to(dtype)
    turned_a, turned_b = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    still = halves.expand(*turned_a.shape[:-1], -1)
    still_a, still_b = still[..., pairs:half], still[..., half + pairs :]
    y = torch.cat([turned_a.to(x.dtype), still_a, turned_b.to(x.dtype), still_b], -1)
    return interleave(y) if interleaved else y


def rotary(
    x: Float[Tensor, "b l h p"],
    positions: Int[Tensor, "#b l"],
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Float[Tensor, "b l h p"]:
    """See `everstate.ops.rotary`."""
    return by_position(rotate, x, positions, theta, interleaved, rotary_dim)


def deinterleave(x: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    """Move pairs from `(2j, 2j + 1)` to `(j, j + p / 2)`."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def interleave(x: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    """The inverse of `deinterleave`."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
