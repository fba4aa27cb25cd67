"""What kernels for Hopper GPUs share: how tiles lie, what the copy engine wants to know, barriers, and where to begin.

These kernels are written in Gluon (`triton_segments.hopper_kernels` says where they serve): a program is shared by
groups of four warps, each with registers of its own (`gl.warp_specialize`; `maxnreg` times the threads is what they
share out), and by one warp that moves tiles into shared memory ahead of time. They tell each other by barriers: a tile
is `full` when it has arrived and `empty` when all have read it. So every tile is read from memory once.
"""

from __future__ import annotations

from functools import cache

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from everstate.ops.triton_launch import Form, Tiles
from everstate.ops.triton_segments import CHUNK

# How tiles lie in shared memory: 16-bit numbers as products want to read them.
ROWS, STATES, VECTOR = (
    gl.NVMMASharedLayout(128, 16, 3),
    gl.NVMMASharedLayout(128, 16, 2),
    gl.NVMMASharedLayout(0, 32, 1),
)

_SQUARE = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
SQUARE, ROW, COLUMN = (
    gl.constexpr(_SQUARE),
    gl.constexpr(gl.SliceLayout(1, _SQUARE)),
    gl.constexpr(gl.SliceLayout(0, _SQUARE)),
)
"""How four warps hold a matrix with a column for each entry of a chunk; a number for each row; and for each column."""

# Names that changed: of the copies of the copy engine with Triton 3.8, of memory seen as other tiles with 3.9.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
recast = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

WIDEN = gl.constexpr("""{
    .reg .b32 low, high;
    shl.b32 low, $2, 16;
    and.b32 high, $2, 0xffff0000;
    mov.b32 $0, low;
    mov.b32 $1, high;
}""")
"""Two bfloat16 to float32: the compiler takes three instructions."""

_VECTORS = Form(CHUNK, layout=VECTOR)


@cache
def _form_of_rows(tokens: int, width: int) -> Form:
    return Form(1, tokens, width, layout=ROWS)


def rows_of(t: Float[Tensor, "*b h p"], batch: int, length: int, tokens: int = CHUNK) -> Tiles:
    """Tiles of the tokens of a chunk and one head of `t`, whose rows are `batch` sequences of a length.

    Sequences are a dimension of their own: beyond the end of one zeros are read and nothing is written.
    """
    (heads, width), step = t.shape[-2:], t.stride(-3)
    return Tiles(t, (batch, length, heads * width), (length * step, step, 1), _form_of_rows(tokens, width))


@cache
def _form_of_tile(columns: int) -> Form:
    return Form(CHUNK, columns, layout=gl.NVMMASharedLayout(2 * columns, 16, 2))


def tiles_of(t: Float[Tensor, "*rows w"], parts: int = 1) -> Tiles:
    """64 rows of one of the parts of the columns of dense keys, states or angles, of 16-bit numbers."""
    width = t.shape[-1]
    return Tiles(t, (t.numel() // width, width), (width, 1), _form_of_tile(width // parts))


@cache
def _form_of_halves(columns: int) -> Form:
    return Form(2, CHUNK, columns, layout=gl.NVMMASharedLayout(2 * columns, 16, 3))


def halves_of(t: Tensor) -> Tiles:
    """As `tiles_of`, the tiles of both halves of the columns in one copy: two tiles that follow each other."""
    width = t.shape[-1]
    return Tiles(t, (2, t.numel() // width, width // 2), (width // 2, width, 1), _form_of_halves(width // 2))


def vectors_of(t: Tensor) -> Tiles:
    """The numbers of a chunk and head, one for each token."""
    return Tiles(t, (t.numel(),), (1,), _VECTORS)


@gluon.jit
def barriers_of(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, each of which waits for so many to arrive."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(COUNT):
        mbarrier.init(bars.index(at), count=ARRIVALS)
    return bars


@gluon.jit
def widened(t):
    """Numbers of 16 bits as float32."""
    if t.dtype == gl.bfloat16:
        numbers = gl.inline_asm_elementwise(WIDEN, "=f,=f,r", [t], gl.float32, is_pure=True, pack=2)
    else:
        numbers = t.to(gl.float32)
    return numbers


@gluon.jit
def in_parts(t, dtype: gl.constexpr):
    """Float32 as a sum of two numbers of 16 bits."""
    coarse = t.to(dtype)
    return coarse, (t - widened(coarse)).to(dtype)


@gluon.jit
def inner(a, tile):
    """Inner products of rows."""
    return gl.sum(a.to(gl.float32) * tile.load(SQUARE).to(gl.float32), 1)


@gluon.jit
def trace(products):
    """The diagonal of a matrix, by row."""
    j, i = gl.arange(0, products.shape[0], ROW), gl.arange(0, products.shape[1], COLUMN)
    return gl.sum(gl.where(j[:, None] == i[None, :], products, 0.0), 1)


@gluon.jit
def place_of(segments, chunks, length, segment):
    """First chunk of a segment and their number, its sequence and first token."""
    first = gl.load(segments + 5 * segment)
    start = gl.load(chunks + 2 * first)
    return first, gl.load(segments + 5 * segment + 1), start // length, start % length
