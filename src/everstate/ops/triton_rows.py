"""What kernels of rows share: dense rows; and of one token: rows of a pool, sizes of tiles, silu, norms that are not
divided yet, when they start."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import overlaps, processors
from everstate.core.state import Slots
from everstate.ops.linear.limits import ROWS
from everstate.ops.triton_launch import cdiv, power_of_2

WAVES = 8
"""Programs per multiprocessor below which a tile is halved: enough loads in flight to keep the memory busy."""


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if the entries of its last dimension lie side by side, as in a view cut out of a projection."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dense_rows(tensor: Tensor) -> Float[Tensor, "rows d"]:
    """All rows of a tensor in one dimension: a view where it can be one, as of a part of a wider projection."""
    return dense(tensor.reshape(-1, tensor.shape[-1]))


def tile_of(size: int, width: int, programs: int, device: torch.device, numbers: int = 4096, least: int = 4) -> int:
    """How many rows, each `width` numbers long, one program takes of `size`: enough for `numbers`, or to fill the GPU.

    `programs` is how many there are of one tile each.
    """
    tile = min(power_of_2(size), max(numbers // width, 1))
    return halved(tile, size, programs, WAVES * processors(device), least)


def halved(tile: int, size: int, programs: int, wanted: int, least: int) -> int:
    """The tile, halved as often as it takes to have `wanted` programs, but not below `least`: `size` is cut into tiles,
    and there are `programs` of each."""
    while tile > least and programs * cdiv(size, tile) < wanted:
        tile //= 2
    return tile


def piece_of(size: int, most: int, *, least: int, part: int) -> int:
    """In pieces of how much a row of this size is read: the longest, up to `most`, that fill it up by no more than one
    `part`-th of it; or `least`."""
    piece = min(power_of_2(size), most)
    while piece > least and part * cdiv(size, piece) * piece > (part + 1) * size:
        piece //= 2
    return piece


def warps_of(numbers: int) -> int:
    """Warps of a program whose tile has so many numbers: up to 32 numbers per thread, in loads of 16 bytes."""
    return min(max(numbers // 1024, 1), 8)


@triton.jit
def slot_of(slots, row):
    """The row of the pool that belongs to a row of the batch; offsets in a pool can exceed 2^31."""
    slot = row.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    return slot


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def rstd(sum_of_squares, eps, WIDTH: tl.constexpr):
    """What a row of so many numbers is multiplied by in a norm: one over its root mean square."""
    return tl.rsqrt(sum_of_squares / WIDTH + eps)


@triton.jit
def rstd_of(squares, row, parts, eps, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """That of a row that is not divided yet; see `Normed`."""
    at = tl.arange(0, PARTS)
    return rstd(tl.sum(tl.load(squares + row * parts + at, mask=at < parts, other=0.0), 0), eps, WIDTH)


@triton.jit
def rstds_of(squares, rows, parts, eps, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """That of each of many rows."""
    at = tl.arange(0, PARTS)
    own = squares + rows.to(tl.int64)[:, None] * parts + at[None, :]
    return rstd(tl.sum(tl.load(own, mask=(at < parts)[None, :], other=0.0), 1), eps, WIDTH)


def launch_options(device: torch.device) -> dict[str, bool]:
    """What a kernel with `start_next` and `wait_for_last` is launched with; see `core.kernels.overlapping`."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}


def reads_early(slots: Slots, rows: int) -> bool:
    """Whether states are read, as weights are, while the kernel before still runs: it would slow down one of cuBLAS,
    which serves linear maps of more rows."""
    return slots is None and rows <= ROWS


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """From here on the next kernel may start, as soon as every program of this one has come here and there is room."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(OVERLAP: tl.constexpr):
    """Wait until the kernel before this one, and with it all before that, has ended.

    Only weights, and states of the own layer, are read earlier.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def follow_last(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait for the last: for one that has nothing to read before."""
    start_next(OVERLAP)
    wait_for_last(OVERLAP)
