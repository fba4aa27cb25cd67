"""Linear maps of up to 64 rows on a GPU as products of matrices that read each weight once.

A program owns a block of outputs of all rows. The copy engine brings tiles of weights (and of x, which stays in the
cache) into shared memory ahead of the matrix units; 8-bit weights are widened on the way from there. Where there are
fewer such blocks than multiprocessors, the sum over K is split among several programs, and the last to end adds their
parts, always in the same order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8
from torch import Tensor

from everstate.core.kernels import counters, processors, shared_memory
from everstate.ops.linear.limits import BLOCK_K
from everstate.ops.linear.triton_ends import constants, finish, given
from everstate.ops.triton_common import INTERPRETED, dot
from everstate.ops.triton_launch import Tiles, cdiv, form, launch, power_of_2
from everstate.ops.triton_rows import launch_options, start_next, wait_for_last

BLOCK_N = 64
"""Outputs of a program: what the matrix units of Hopper take at once."""
SPLITS, SHORT = 4, 1536
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
    x: Float[Tensor, "b k"], weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"], arguments: tuple[Any, ...],
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Launch the kernel with what `Ends` says."""
    (outputs, width), sizes = weight.shape, _sizes(len(x), weight)
    blocks = cdiv(outputs, sizes.n)
    parts = arrived = None
    if sizes.splits > 1:
        parts = x.new_empty(blocks * sizes.splits * sizes.n * sizes.b, dtype=torch.float32)
        arrived = counters(x.device, blocks)
    launch(
        _tiles_kernel, (blocks * sizes.splits,),
        _tiles(x, sizes.b, sizes.k), _tiles(weight, sizes.n, sizes.k), weight, parts, arrived, *arguments,
        K=width, **settings, BLOCK_N=sizes.n, BLOCK_K=sizes.k, BLOCK_B=sizes.b, SPLITS=sizes.splits,
        num_warps=4, num_stages=sizes.stages, **launch_options(x.device),
    )  # fmt: skip


def blocks_of_tiles(rows: int, weight: Tensor) -> int:
    """Among how many blocks the outputs are shared out."""
    return cdiv(len(weight), BLOCK_N // 2 if _is_narrow(rows, weight) else BLOCK_N)


def _is_narrow(rows: int, weight: Tensor) -> bool:
    """Whether a program has half as many outputs, of which each step takes twice as many numbers: few rows, 8 bits."""
    outputs, width = weight.shape
    splits = splits_of(width, cdiv(outputs, BLOCK_N), weight.device)
    return weight.element_size() == 1 and splits == 1 and rows <= 16 and width % (2 * BLOCK_K) == 0


def _sizes(rows: int, weight: Tensor) -> Sizes:
    """What was fastest: longer tiles where weights of 8 bits are widened, or where a sum is split; shorter ones, which
    are on their way sooner, where 64 rows of x come with each."""
    (outputs, width), block, size = weight.shape, max(power_of_2(rows), 16), weight.element_size()
    splits = splits_of(width, cdiv(outputs, BLOCK_N), weight.device)
    n, k, most = BLOCK_N, BLOCK_K, STAGES
    if _is_narrow(rows, weight):
        n, k = BLOCK_N // 2, 2 * BLOCK_K
    elif splits > 1 and block == 16 and width // splits % (2 * BLOCK_K) == 0:
        k, most = 2 * BLOCK_K, LONGER_OF_8_BITS if size == 1 else LONGER
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
    x, w, weight, split_sums, arrived, bias, scale, squares, parts, eps,
    taps, conv_bias, pool, slots, pool_slot, pool_d, pool_k, start, channels,
    stream, addend, norm, multiplier, y, summed, block_squares, rows, outputs,
    K: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs and part of the sum, for all rows, which are filled up to BLOCK_B with zeros."""
    start_next(OVERLAP)
    block, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    n, b = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    of_layer = constants(bias, scale, taps, conv_bias, norm, n, outputs, start, channels, TAPS, False)
    wait_for_last(OVERLAP)
    # What the end needs is on its way during the product; of a split sum the last program alone needs it.
    if SPLITS == 1:
        of_token = given(
            squares, parts, stream, addend, pool, slots, pool_slot, pool_d, pool_k, n, b, start, channels, rows,
            outputs, TAPS, PARTS,
        )  # fmt: skip
    sums = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for first in tl.range(0, K // SPLITS, BLOCK_K):
        at = split * (K // SPLITS) + first
        tile, u = w.load([block * BLOCK_N, at]), x.load([0, at])
        if weight.dtype.element_ty == tl.int8:
            if INTERPRETED:
                tile = tile.to(tl.float32)
            tile = tile.to(u.dtype)
        sums = dot(tile, u.T, sums, "tf32")
    if SPLITS == 1:
        finish(
            sums, sums, of_layer, of_token, squares, eps, pool_k, stream, addend, multiplier, y, summed, block_squares,
            n, b, rows, outputs, block, tl.num_programs(0), K, TAPS, SILU, ACTIVATION, False,
        )  # fmt: skip
    elif _is_last(sums, split_sums, arrived, block, split, BLOCK_N, BLOCK_B, SPLITS):
        of_token = given(
            squares, parts, stream, addend, pool, slots, pool_slot, pool_d, pool_k, n, b, start, channels, rows,
            outputs, TAPS, PARTS,
        )  # fmt: skip
        sums = _join(split_sums, block, BLOCK_N, BLOCK_B, SPLITS)
        finish(
            sums, sums, of_layer, of_token, squares, eps, pool_k, stream, addend, multiplier, y, summed, block_squares,
            n, b, rows, outputs, block, tl.num_programs(0) // SPLITS, K, TAPS, SILU, ACTIVATION, False,
        )  # fmt: skip


@triton.jit
def _is_last(
    sums, split_sums, arrived, block, split, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, SPLITS: tl.constexpr
):
    """Leave a part of a sum; whether all other parts of this block of outputs are there."""
    n, b = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    own = split_sums + (block * SPLITS + split) * (BLOCK_N * BLOCK_B)
    tl.store(own + n[:, None] * BLOCK_B + b[None, :], sums)
    tl.debug_barrier()
    last = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(arrived + block, 0)  # as the next kernel wants to find it
    return last


@triton.jit
def _join(split_sums, block, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, SPLITS: tl.constexpr):
    """The sum of all parts, in their order."""
    n, b = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    sums = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for split in tl.static_range(SPLITS):
        theirs = split_sums + (block * SPLITS + split) * (BLOCK_N * BLOCK_B)
        # Past the cache of a multiprocessor, which knows nothing of what others write.
        sums += tl.load(theirs + n[:, None] * BLOCK_B + b[None, :], cache_modifier=".cg")
    return sums
