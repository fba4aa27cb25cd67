"""Linear maps of more rows than a few on a GPU: products of matrices that read each weight once.

A program owns a block of outputs of all rows. The copy engine brings tiles of weights (and of x, which stays in the
cache) into shared memory ahead of the matrix units; 8-bit weights are widened on the way from there. Where there are
fewer such blocks than multiprocessors, the sum over K is split among several programs, and the last to end adds their
parts, always in the same order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import counters, processors, shared_memory
from everstate.ops.linear.limits import BLOCK_K
from everstate.ops.linear.triton_ends import constants, finish, window_of
from everstate.ops.triton_common import INTERPRETED, dot
from everstate.ops.triton_launch import Tiles, cdiv, form, launch, power_of_2
from everstate.ops.triton_rows import launch_options, start_next, wait_for_last

BLOCK_N = 64
"""Outputs of a program: what the matrix units of Hopper take at once."""
SPLITS, SHORT = 4, 1024
"""Most programs among which a sum is split, and of up to how many numbers one makes it sooner than parts are joined."""
STAGES, SHORTER, LONGER, LONGER_OF_8_BITS = 5, 6, 3, 4
"""Most tiles in flight: of the usual length, of half of it, and of twice that where a sum is split (two counts)."""


class Sizes(NamedTuple):
    """Outputs, numbers of a sum and rows of a program; among how many a sum is split; how many tiles are in flight."""

    n: int
    k: int
    b: int
    splits: int
    stages: int


def run_tiles(
    x: Float[Tensor, "b k"], weight: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Tensor | None,
    eps: float, taps: Tensor | None, conv_bias: Tensor | None, state: Tensor | None, slots: Tensor | None,
    start: int, activated: bool,
) -> Float[Tensor, "b n"]:  # fmt: skip
    """Launch the kernel."""
    (rows, width), outputs = x.shape, len(weight)
    y = x.new_empty(rows, outputs)
    channels, count = (0, 0) if taps is None else taps.shape
    strides = (0, 0, 0) if state is None else state.stride()
    sizes = _sizes(rows, weight, norm is not None)
    blocks = cdiv(outputs, sizes.n)
    parts = arrived = None
    if sizes.splits > 1:
        parts = x.new_empty(blocks * sizes.splits * (sizes.n + 1) * sizes.b, dtype=torch.float32)
        arrived = counters(x.device, blocks)
    launch(
        _tiles_kernel, (blocks * sizes.splits,),
        _tiles(x, sizes.b, sizes.k), _tiles(weight, sizes.n, sizes.k), weight, bias, scale, norm, y, parts, arrived,
        taps, conv_bias, state, slots, *strides, eps, rows, outputs, start, channels,
        K=width, TAPS=count, SILU=activated, BLOCK_N=sizes.n, BLOCK_K=sizes.k, BLOCK_B=sizes.b, SPLITS=sizes.splits,
        num_warps=4, num_stages=sizes.stages, **launch_options(x.device),
    )  # fmt: skip
    return y


def _sizes(rows: int, weight: Tensor, normed: bool) -> Sizes:
    """What was fastest: longer tiles where each costs a step through registers, for a norm or to widen its weights, and
    shorter ones, which are on their way sooner, where 64 rows of x come with each."""
    (outputs, width), block, size = weight.shape, max(power_of_2(rows), 16), weight.element_size()
    splits = splits_of(width, cdiv(outputs, BLOCK_N), weight.device)
    can_be_longer = width // splits % (2 * BLOCK_K) == 0
    narrow = size == 1 and splits == 1 and block == 16 and can_be_longer
    n, k, most = BLOCK_N // 2 if narrow else BLOCK_N, BLOCK_K, STAGES
    if narrow or (normed and can_be_longer):
        k = 2 * BLOCK_K
        most = STAGES if splits == 1 else LONGER_OF_8_BITS if size == 1 else LONGER
    elif size == 2 and splits == 1 and block == 64:
        k, most = BLOCK_K // 2, SHORTER
    # Where sums are split, there is one program for each multiprocessor; otherwise two should fit.
    room, tile = shared_memory(weight.device) // (2 if splits == 1 else 1), k * (n * size + 2 * block)
    return Sizes(n, k, block, splits, max(min(most, room // tile), 2))


def splits_of(width: int, blocks: int, device: torch.device) -> int:
    """Among how many programs a sum over `width` is split: 1 if it is short, or as many as find a processor each."""
    splits, most = 1, SPLITS if width > SHORT else 1
    while splits < most and 2 * splits * blocks <= processors(device) and width % (2 * splits * BLOCK_K) == 0:
        splits *= 2
    return splits


def _tiles(t: Float[Tensor, "rows k"], rows: int, columns: int) -> Tiles:
    """What the copy engine wants to know; it starts on multiples of 16 bytes."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(1) == 1
    t = t if aligned else t.clone(memory_format=torch.contiguous_format)
    return Tiles(t, t.shape, t.stride(), form(rows, columns))


@triton.jit
def _tiles_kernel(
    x, w, weight, bias, scale, norm, y, parts, arrived, taps, conv_bias, pool, slots,
    pool_slot, pool_d, pool_k, eps, rows, outputs, start, channels,
    K: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs and part of the sum, for all rows, which are filled up to BLOCK_B with zeros."""
    start_next(OVERLAP)
    block, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    n, b = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    factor, offset, conv_offset, factors = constants(bias, scale, taps, conv_bias, n, outputs, start, channels, TAPS)
    wait_for_last(OVERLAP)
    past, mine, window = n, n, ()
    # The past is on its way during the product; of a split sum the last program alone needs it.
    if TAPS > 0 and SPLITS == 1:
        past, mine, window = window_of(pool, slots, n - start, b, pool_slot, pool_d, pool_k, rows, channels, TAPS)
    sums, squares = tl.zeros((BLOCK_N, BLOCK_B), tl.float32), tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for first in tl.range(0, K // SPLITS, BLOCK_K):
        at = split * (K // SPLITS) + first
        tile, u = w.load([block * BLOCK_N, at]), x.load([0, at])
        if norm is not None:
            wide = u.to(tl.float32)
            squares += wide * wide
            u = (wide * tl.load(norm + at + tl.arange(0, BLOCK_K)).to(tl.float32)[None, :]).to(u.dtype)
        if weight.dtype.element_ty == tl.int8:
            if INTERPRETED:
                tile = tile.to(tl.float32)
            tile = tile.to(u.dtype)
        sums = dot(tile, u.T, sums, "tf32")
    square = tl.sum(squares, 1)
    if SPLITS > 1:
        if _is_last(sums, square, parts, arrived, block, split, BLOCK_N, BLOCK_B, SPLITS):
            sums, square = _join(parts, block, BLOCK_N, BLOCK_B, SPLITS)
            _end(
                sums, square, norm, factor, offset, y, conv_offset, factors, past, mine, window, pool, slots, n, b,
                pool_slot, pool_d, pool_k, eps, rows, outputs, start, channels, K, TAPS, SILU, SPLITS,
            )  # fmt: skip
    else:
        _end(
            sums, square, norm, factor, offset, y, conv_offset, factors, past, mine, window, pool, slots, n, b,
            pool_slot, pool_d, pool_k, eps, rows, outputs, start, channels, K, TAPS, SILU, SPLITS,
        )  # fmt: skip


@triton.jit
def _is_last(
    sums, square, parts, arrived, block, split,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Leave a part of a sum; whether all other parts of this block of outputs are there."""
    n, b = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    own = parts + (block * SPLITS + split) * ((BLOCK_N + 1) * BLOCK_B)
    tl.store(own + n[:, None] * BLOCK_B + b[None, :], sums)
    tl.store(own + BLOCK_N * BLOCK_B + b, square)
    tl.debug_barrier()
    last = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(arrived + block, 0)  # as the next kernel wants to find it
    return last


@triton.jit
def _join(parts, block, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, SPLITS: tl.constexpr):
    """The sum of all parts, in their order."""
    n, b = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    sums, square = tl.zeros((BLOCK_N, BLOCK_B), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    for split in tl.static_range(SPLITS):
        theirs = parts + (block * SPLITS + split) * ((BLOCK_N + 1) * BLOCK_B)
        # Past the cache of a multiprocessor, which knows nothing of what others write.
        sums += tl.load(theirs + n[:, None] * BLOCK_B + b[None, :], cache_modifier=".cg")
        square += tl.load(theirs + BLOCK_N * BLOCK_B + b, cache_modifier=".cg")
    return sums, square


@triton.jit
def _end(
    sums, square, norm, factor, offset, y, conv_offset, factors, past, mine, window, pool, slots, n, b,
    pool_slot, pool_d, pool_k, eps, rows, outputs, start, channels,
    K: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Norm, factors, and what `finish` does."""
    if norm is not None:
        sums = sums * tl.rsqrt(square / K + eps)[None, :]
    sums = sums * factor[:, None] + offset[:, None]
    if TAPS > 0 and SPLITS > 1:
        past, mine, window = window_of(pool, slots, n - start, b, pool_slot, pool_d, pool_k, rows, channels, TAPS)
    finish(sums, y, conv_offset, factors, past, mine, window, n, b, pool_k, rows, outputs, TAPS, SILU)
