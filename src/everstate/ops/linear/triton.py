"""Linear maps of a few rows on a GPU, where reading the weights takes all the time: once, 16 bytes at a time.

A program owns some outputs and multiplies number by number: matrix units would wait for memory just as long. The norm
needs no pass of its own: `W (x * norm)` and the sum of the squares of x grow together, and the one is divided at the
end.
"""

import triton
import triton.language as tl
from jaxtyping import Float, Int8
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.core.state import Slots
from everstate.ops.linear.composed import convolve_
from everstate.ops.linear.limits import FEW, norm_is_apart
from everstate.ops.linear.triton_ends import constants, finish, window_of
from everstate.ops.linear.triton_tiles import run_tiles
from everstate.ops.norm import rms_norm
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import dense, dense_rows, launch_options, start_next, wait_for_last

HELD = 4096
"""Bytes of weights of a warp: many programs, each with all that it reads in flight, fill a GPU best."""
MOST = 8192
"""Bytes of weights that a warp asks for at once, where a row is longer than that: what registers hold."""
CONVOLVED = 32
"""Rows up to which a convolution behind a product costs less in its launch than in its own."""


def linear(
    x: Float[Tensor, "*b k"],
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
    norm: Float[Tensor, " k"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*b n"]:
    """See `everstate.ops.linear`."""
    if norm is not None and norm_is_apart(x):
        x, norm = rms_norm(x, norm, eps=eps), None
    return _linear(x, weight, bias, scale, norm, eps)


def linear_conv_step_(
    x: Float[Tensor, "b k"],
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None,
    conv_weight: Float[Tensor, "d taps"],
    conv_bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "slots d taps1"],
    slots: Slots = None,
    *,
    start: int = 0,
    activation: str | None = None,
    scale: Float[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "b before"], Float[Tensor, "b d"], Float[Tensor, "b after"]]:
    """See `everstate.ops.linear_conv_step_`. The pool may be of lower precision: what enters it is rounded."""
    if len(x) > CONVOLVED:
        y = _linear(x, weight, bias, scale, None, 0.0)
        return convolve_(y, conv_weight, conv_bias, state, slots, start, activation)
    y = _linear_conv(x, weight, bias, scale, conv_weight, conv_bias, state, slots, start, activation == "silu")
    stop = start + len(conv_weight)
    return y[:, :start], y[:, start:stop], y[:, stop:]


@kernel_op("linear")
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Tensor | None, eps: float
) -> Tensor:
    rows = dense_rows(x)
    y = _run(rows, weight, bias, scale, norm, eps, None, None, None, None, 0, False)
    return y.view(*x.shape[:-1], len(weight))


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@kernel_op("linear_conv_step_", mutates={"state"})
def _linear_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, conv_weight: Tensor,
    conv_bias: Tensor | None, state: Tensor, slots: Tensor | None, start: int, activated: bool,
) -> Tensor:  # fmt: skip
    taps = conv_weight.contiguous()
    return _run(dense(x), weight, bias, scale, None, 0.0, taps, conv_bias, state, slots, start, activated)


@_linear_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, conv_weight: Tensor,
    conv_bias: Tensor | None, state: Tensor, slots: Tensor | None, start: int, activated: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(len(x), len(weight))


def _run(
    x: Float[Tensor, "b k"], weight: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Tensor | None,
    eps: float, taps: Tensor | None, conv_bias: Tensor | None, state: Tensor | None, slots: Tensor | None,
    start: int, activated: bool,
) -> Float[Tensor, "b n"]:  # fmt: skip
    """Launch the kernel for so many rows."""
    (rows, width), outputs = x.shape, len(weight)
    if rows > FEW:
        return run_tiles(x, weight, bias, scale, norm, eps, taps, conv_bias, state, slots, start, activated)
    y = x.new_empty(rows, outputs)
    channels, count = (0, 0) if taps is None else taps.shape
    strides = (0, 0, 0) if state is None else state.stride()
    sizes, options = _sizes(rows, width, weight)
    launch(
        _linear_kernel, (cdiv(outputs, sizes["BLOCK_N"]),),
        x, weight, bias, scale, norm, y, taps, conv_bias, state, slots, x.stride(0), *strides, eps, rows, outputs,
        start, channels,
        K=width, TAPS=count, SILU=activated, **sizes, **options, **launch_options(x.device),
    )  # fmt: skip
    return y


def _sizes(rows: int, width: int, weight: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Tiles and warps, as they were fastest.

    All warps of a program share its rows, one for each 1 to 3 KB, and so read x once. Of 8 bits a thread takes 16
    weights at once, but 8 numbers of x: these are read again for each row, so that threads need not exchange them.
    """
    size, row = weight.element_size(), width * weight.element_size()
    if size == 1:
        warps, n = 4, 4 if row < HELD else 2
        piece = _piece(row, 2048 // n)
    else:
        piece = _piece(row, HELD)
        warps = max(min(power_of_2(row + 1) // 2048, piece // 512, 8), 1)
        n = power_of_2(cdiv(HELD * warps, row))
    pieces, ahead = cdiv(row, piece), max(MOST * warps // (n * piece), 1)
    tile = {"BLOCK_N": n, "BLOCK_K": piece // size, "AHEAD": min(pieces, ahead), "LINES": n if size == 1 else 1}
    return {**tile, "ROWS": rows, "BLOCK_B": power_of_2(rows)}, {"num_warps": warps}


def _piece(row: int, most: int) -> int:
    """Bytes in which a row is read: from 512 to `most`, the longest that fill it up by no more than an eighth."""
    piece = min(power_of_2(row), most)
    while piece > 512 and 8 * cdiv(row, piece) * piece > 9 * row:
        piece //= 2
    return piece


@triton.jit
def _linear_kernel(
    x, weight, bias, scale, norm, y, taps, conv_bias, pool, slots,
    x_row, pool_slot, pool_d, pool_k, eps, rows, outputs, start, channels,
    K: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs, for all rows; the first AHEAD pieces of its weights are asked for at once."""
    start_next(OVERLAP)
    PIECES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    n, k, b = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_B)
    own = weight + tl.program_id(0).to(tl.int64) * BLOCK_N * K + tl.arange(0, BLOCK_N)[:, None] * K
    held, norms = (), ()
    for piece in tl.static_range(AHEAD):
        held = held + (_weights(own, n, piece * BLOCK_K + k, outputs, K, BLOCK_K),)  # type: ignore[assignment]
    if norm is not None:
        for piece in tl.static_range(AHEAD):
            norms = norms + (_numbers(norm, piece * BLOCK_K + k, LINES, K, BLOCK_K),)  # type: ignore[assignment]
    factor, offset, conv_offset, factors = constants(bias, scale, taps, conv_bias, n, outputs, start, channels, TAPS)
    wait_for_last(OVERLAP)
    past, mine, window = n, n, ()
    if TAPS > 0:
        past, mine, window = window_of(pool, slots, n - start, b, pool_slot, pool_d, pool_k, rows, channels, TAPS)
    sums, squares = tl.zeros((BLOCK_N, BLOCK_B), tl.float32), tl.zeros((LINES, BLOCK_B), tl.float32)
    for row in tl.static_range(ROWS):
        part, square = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((LINES, BLOCK_K), tl.float32)
        for piece in tl.static_range(AHEAD):
            u = _numbers(x + row * x_row, piece * BLOCK_K + k, LINES, K, BLOCK_K).to(tl.float32)
            if norm is not None:
                square += u * u
                u = u * norms[piece].to(tl.float32)
            part += held[piece].to(tl.float32) * u
        sums += tl.where((b == row)[None, :], tl.sum(part, 1)[:, None], 0.0)
        if norm is not None:
            squares += tl.where((b == row)[None, :], tl.sum(square, 1)[:, None], 0.0)
    for piece in tl.static_range(AHEAD, PIECES):
        w = _weights(own, n, piece * BLOCK_K + k, outputs, K, BLOCK_K).to(tl.float32)
        for row in tl.static_range(ROWS):
            u = _numbers(x + row * x_row, piece * BLOCK_K + k, LINES, K, BLOCK_K).to(tl.float32)
            if norm is not None:
                squares += tl.where((b == row)[None, :], tl.sum(u * u, 1)[:, None], 0.0)
                u = u * _numbers(norm, piece * BLOCK_K + k, LINES, K, BLOCK_K).to(tl.float32)
            sums += tl.where((b == row)[None, :], tl.sum(w * u, 1)[:, None], 0.0)
    if norm is not None:
        sums = sums * tl.rsqrt(squares / K + eps)
    sums = sums * factor[:, None] + offset[:, None]
    finish(sums, y, conv_offset, factors, past, mine, window, n, b, pool_k, rows, outputs, TAPS, SILU)


@triton.jit
def _weights(own, n, at, outputs, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A piece of some rows; each weight is read once, and stays in no cache."""
    inside = (n < outputs)[:, None]
    if K % BLOCK_K != 0:
        inside = inside & (at < K)[None, :]
    return tl.load(own + at[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _numbers(x, at, LINES: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A piece of a vector as one row or more, so that a thread reads what it multiplies."""
    inside = tl.arange(0, LINES)[:, None] >= 0
    if K % BLOCK_K != 0:
        inside = inside & (at < K)[None, :]
    return tl.load(x + at[None, :] + tl.arange(0, LINES)[:, None] * 0, mask=inside, other=0.0)
