"""The diagonal system as a convolution, in blocks of time between which its state is passed."""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from everstate.ops.linear_scan import linear_scan
from everstate.ops.lti_conv.blocks import BLOCK, Tables, halves, real, run_blocks
from everstate.ops.lti_diagonal import lti_kernel_diagonal as kernel_op
from everstate.ops.lti_diagonal.discretize import Rule, discretize


def lti_kernel_diagonal(
    A: Complex[Tensor, "g n"],
    B: Complex[Tensor, "g n"],
    C: Complex[Tensor, "g n"],
    dt: Float[Tensor, " g"],
    *,
    length: int,
    discretization: Rule = "zoh",
) -> Float[Tensor, "g l"]:
    """See `everstate.ops.lti_kernel_diagonal`.

    With j = i q + r and q about the root of the length, `dA^j = (dA^q)^i dA^r`, so that the Vandermonde matrix, as
    large as length x state, never exists: two tables of powers meet in one matrix product.
    """
    dA, gain = discretize(A, dt, discretization)
    stride = math.isqrt(length - 1) + 1
    small = _powers(dA, stride)
    large = _powers(small[:, -1] * dA, -(-length // stride)) * (2 * C * gain * B).unsqueeze(1)
    return torch.einsum("gis,grs->gir", real(large.conj()), real(small)).flatten(1)[:, :length]


def _powers(z: Complex[Tensor, "g n"], count: int) -> Complex[Tensor, "g count n"]:
    """`z^0 ... z^(count - 1)` by doubling, which rounds less than count multiplications."""
    table, factor = torch.ones_like(z).unsqueeze(1), z.unsqueeze(1)
    while table.shape[1] < count:
        table = torch.cat([table, table * factor], 1)
        factor = factor * factor
    return table[:, :count]


def convolution(
    u: Float[Tensor, "b l d"],
    A: Complex[Tensor, "g n"],
    B: Complex[Tensor, "g n"],
    C: Complex[Tensor, "g n"],
    dt: Float[Tensor, " g"],
    state: Complex[Tensor, "b d n"],
    discretization: Rule,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "b d n"]]:
    """`lti_diagonal` in mode "convolution"; all arguments in the dtypes of the computation."""
    block = min(BLOCK, u.shape[1])
    dA, gain = discretize(A, dt, discretization)
    powers = _powers(dA, block + 1)
    kernel = kernel_op(A, B, C, dt, length=block, discretization=discretization)
    tables = Tables(kernel, write=real(powers[:, :-1]), observe=real(powers[:, 1:]))
    dB, C = (gain * B).unsqueeze(1), 2 * C.unsqueeze(1)

    def advance(written: Tensor, state: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        # B and C scale the states, of which there are few, and not the tables.
        added, first = dB * halves(written), halves(state)
        leaving, last = linear_scan(powers[:, steps].unsqueeze(1).expand(added.shape), added, first)
        entering = torch.cat([first.unsqueeze(1), leaving[:, :-1]], 1)
        return real((C * entering).conj()), real(last)

    y, after = run_blocks(u, real(state), tables, advance)
    return y, halves(after)
