"""Triton kernels that are given heads or channels which lie farther from each other than 32 bits can say.

So they do where a long tensor has its heads, or its channels, before its tokens in memory. Here few numbers do: what
lies between them is never touched, and without a GPU takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from everstate.ops import TrapezoidState, attention, linear_scan, ssd_scan, trapezoid_scan, use
from everstate.ops.attention import AttentionState


def apart(t: Tensor, dim: int) -> Tensor:
    """The same numbers, the last along a dimension more than 2^31 numbers behind the first."""
    one, others = t.select(dim, 0).contiguous(), t.shape[dim] - 1
    step = 2**31 // others + 64
    strides = [*one.stride()[:dim], step, *one.stride()[dim:]]
    return t.new_empty(step * others + one.numel()).as_strided(t.shape, strides).copy_(t)


def scanned(a: Tensor, b: Tensor) -> Tensor:
    return linear_scan(a, b, b.new_zeros(1, 3, dtype=torch.float32))[0]


def attended(q: Tensor, k: Tensor) -> Tensor:
    ring = k.new_zeros(1, 8, 3, 16)
    return attention(q, k, k, AttentionState(ring, ring.clone(), k.new_zeros(1, dtype=torch.int64)))[0]


def by_states(x: Tensor, B: Tensor) -> Tensor:
    scale = x.new_full(x.shape[:3], 0.5, dtype=torch.float32)
    return ssd_scan(x, -scale, scale, B, B, x.new_zeros(1, 3, 16, 16, dtype=torch.float32))[0]


def by_turning_states(x: Tensor, B: Tensor, C: Tensor) -> Tensor:
    given = [x.new_full(x.shape[:3], 0.5, dtype=torch.float32) for _ in range(3)]
    shapes = [(3, 16, 16), (2, 3, 16), (3, 16), (3, 4)]
    state = TrapezoidState(*(x.new_zeros(1, *shape, dtype=torch.float32) for shape in shapes))
    return trapezoid_scan(x, given[0], -given[1], given[2], x.new_ones(1, x.shape[1], 4), B, C, state)[0]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (scanned, [(1, 40, 3), (1, 40, 3)]),
        (attended, [(1, 40, 6, 16), (1, 40, 3, 16)]),
        (by_states, [(1, 70, 3, 16), (1, 70, 3, 16)]),
        (by_turning_states, [(1, 70, 3, 16), (1, 70, 2, 3, 16), (1, 70, 2, 3, 16)]),
    ],
)
def test_offsets_of_heads_and_channels(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], kernel_device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.rand(shape, generator=generator).to(kernel_device, torch.bfloat16) for shape in shapes]
    results = []
    for inputs in (given, [apart(t, 2) for t in given]):
        leaves = [t.detach().requires_grad_() for t in inputs]
        with use("triton"):
            y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert all(torch.equal(near, far) for near, far in zip(*results, strict=True))
