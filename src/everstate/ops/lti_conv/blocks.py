"""A time-invariant system in blocks of time: a convolution inside each block, its state from block to block.

With q tokens per block and x the state that enters it, in real coordinates of width s,

    y[t] = sum_{j <= t} kernel[t - j] u[j]  +  observe[t] . x        x_out = dA^q x  +  sum_j write[q - 1 - j] u[j]

so memory grows with the length and not with its product with the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from everstate.ops.lti_conv import lti_conv

# Tokens per block: the tables grow with it, the states that are kept shrink with it. On a CPU 64 was the fastest of 64,
# 128, 256 and 512 for S4 and S4D of 64 states, and with it the states take as much memory as the inputs.
BLOCK = 64

Advance = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""`(written (b c g m s), state (b g m s), q) -> (what is observed of the state that enters each block, the last)`."""


class Tables(NamedTuple):
    """What a block does with its inputs and with the state that enters it; m channels share each of g systems.

    The first r rows of each are the tables of a block of r tokens.
    """

    kernel: Float[Tensor, "g q"]
    write: Float[Tensor, "g q s"]
    observe: Float[Tensor, "g q s"]


def real(z: Complex[Tensor, "*b n"]) -> Float[Tensor, "*b s"]:
    """Real coordinates, in which `2 Re(C x)` is the inner product of those of `2 conj(C)` and x."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def halves(x: Float[Tensor, "*b s"]) -> Complex[Tensor, "*b n"]:
    """The inverse of `real`: one half of each conjugate pair."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def run_blocks(
    u: Float[Tensor, "b l d"], state: Float[Tensor, "b d s"], tables: Tables, advance: Advance
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d s"]]:
    """Outputs and last state: all whole blocks at once, then the rest of the segment as one shorter block."""
    length, block = u.shape[1], tables.kernel.shape[1]
    rest, ys = length % block, []
    if length >= block:
        y, state = _blocks(u[:, : length - rest], state, tables, advance)
        ys.append(y)
    if rest:
        shorter = Tables(*(table[:, :rest] for table in tables))
        y, state = _blocks(u[:, length - rest :], state, shorter, advance)
        ys.append(y)
    return torch.cat(ys, 1) if len(ys) > 1 else ys[0], state


def _blocks(u: Tensor, state: Tensor, tables: Tables, advance: Advance) -> tuple[Tensor, Tensor]:
    groups, block = tables.kernel.shape
    parts = u.unflatten(1, (-1, block))
    grouped = parts.unflatten(3, (groups, -1))
    written = torch.einsum("bcqgm,gqs->bcgms", grouped.flip(2), tables.write)
    observed, after = advance(written, state.unflatten(1, (groups, -1)), block)
    y = torch.einsum("bcgms,gqs->bcqgm", observed, tables.observe).flatten(3)
    rows = parts.flatten(0, 1)
    kernel = tables.kernel.repeat_interleave(grouped.shape[4], 0)
    forced, _ = lti_conv(rows, kernel, rows.new_zeros(rows.shape[0], rows.shape[2], block - 1))
    return (y + forced.view_as(y)).flatten(1, 2), after.flatten(1, 2)
