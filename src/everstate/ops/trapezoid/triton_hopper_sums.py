"""Sums over the 64 rows of a product on a Hopper GPU, of which each of four warps has 16.

Every warp leaves its own sums in shared memory, and then all read those of all: one barrier, where `gl.sum` over warps
has several, one after the other.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl

from everstate.ops.triton_hopper import ROW, recast

SWAP_ROWS = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 4, 0x1f, 0xffffffff;")
SWAP_PAIRS = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 8, 0x1f, 0xffffffff;")
SWAP_FOURS = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 16, 0x1f, 0xffffffff;")
"""Exchanges of a number with the thread that has the next row of a product, the one after that, or the fourth: four
threads of a warp share a row."""


@gluon.jit
def _swapped(t, HOW: gl.constexpr):
    """What another thread of the warp has in the place of `t`."""
    return gl.inline_asm_elementwise(HOW, "=f,f", [t], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _halved(t, BIT: gl.constexpr, HOW: gl.constexpr):
    """Sums of two rows `[warp, row, n..., 2]` whose numbers differ in a bit: one of them keeps the first half of the
    last dimension, the other the second."""
    first, second = gl.split(t)
    odd = _rows_like(first) // BIT % 2 == 1
    return gl.where(odd, second, first) + _swapped(gl.where(odd, first, second), HOW)


@gluon.jit
def _rows_like(t):
    """The number of the row of each element of `[warp, row, n...]`."""
    layout: gl.constexpr = t.type.layout
    if len(t.shape) == 3:
        r = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    else:
        r = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[None, :, None, None]
    return r + gl.zeros(t.shape, gl.int32, layout)


@gluon.jit
def halves(t, HALF: gl.constexpr, narrow: gl.constexpr):
    """The first half of the columns, and the second."""
    first, second = gl.split(t.reshape([t.shape[0], 2, HALF]).permute((0, 2, 1)))
    return gl.convert_layout(first, narrow), gl.convert_layout(second, narrow)


@gluon.jit
def by_warp(t):
    """Sums over the rows of each warp of 64 x 32 numbers, `[warp, column]`; of 64 x 16, over every other four of them.
    Each step halves what is left to add, where `gl.sum` would exchange all numbers at each step."""
    HALF: gl.constexpr = t.shape[1]
    t = gl.sum(t.reshape([4, 2, 8, HALF]), 1)
    t = _halved(t.reshape([4, 8, 2, HALF // 2]).permute((0, 1, 3, 2)), 1, SWAP_ROWS)
    # The bits of a row and a place, in the order of those of a column.
    if HALF == 32:
        t = _halved(t.reshape([4, 8, 2, 8]).permute((0, 1, 3, 2)), 2, SWAP_PAIRS)
        t = _halved(t.reshape([4, 8, 4, 2]), 4, SWAP_FOURS).reshape([4, 2, 2, 2, 4])
        t = t.permute((0, 3, 2, 4, 1)).reshape([4, 32])
    else:
        t = _halved(t.reshape([4, 8, 4, 2]), 2, SWAP_PAIRS).reshape([4, 2, 2, 2, 4])
        t = t.permute((0, 1, 3, 4, 2)).reshape([8, 16])
    return t


@gluon.jit
def room_for_columns(COUNT: gl.constexpr, HALF: gl.constexpr):
    """Room for what `by_warp` makes of so many tiles, `[tile, part of the rows, column]`."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    return gl.allocate_shared_memory(gl.float32, [COUNT, 128 // HALF, HALF], plain)


@gluon.jit
def columns_of(room):
    """Sums of the columns over all rows, `[tile, column]`."""
    HALF: gl.constexpr = room.shape[2]
    line: gl.constexpr = gl.BlockedLayout([1, room.shape[1], 1], [32 // HALF, 1, HALF], [4, 1, 1], [2, 1, 0])
    return gl.sum(room.load(line), 1)


@gluon.jit
def room_for_square():
    """Room for sums of the columns of 64 x 64 numbers, `[warp, column]`."""
    return gl.allocate_shared_memory(gl.float32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def leave_square(room, t):
    """Leave the sums of each warp."""
    first, second = halves(t, 32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
    both = gl.join(by_warp(first), by_warp(second)).permute((0, 2, 1)).reshape([4, 64])
    recast(room, gl.float32, [1, 4, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).index(0).store(both)


@gluon.jit
def square_of(room):
    """Sums of the columns over all rows, as rows have them."""
    total = room.index(0).load(ROW)
    for warp in gl.static_range(1, 4):
        total += room.index(warp).load(ROW)
    return total


@gluon.jit
def room_for_totals(COUNT: gl.constexpr):
    """Room for so many sums of 64 numbers, `[sum, warp]`."""
    return gl.allocate_shared_memory(gl.float32, [COUNT, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def leave_total(room, t):
    """Leave the sum of the numbers that each warp has of 64."""
    room.store(gl.sum(t.reshape([4, 16]), 1))


@gluon.jit
def total_of(room):
    """The sum of all."""
    return gl.sum(room.load(gl.BlockedLayout([4], [32], [4], [0])), 0)
