"""Linear maps of a few rows on a GPU, where reading the weights takes all the time: once, 16 bytes at a time.

Here a program owns some outputs and multiplies number by number; `triton_tiles.py` multiplies matrices.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.state import Slots
from everstate.ops.activations import Activation
from everstate.ops.glu import glu
from everstate.ops.linear.composed import add_and_norm, convolve_
from everstate.ops.linear.limits import FEW, divides, refusal_of_tiles
from everstate.ops.linear.triton_ends import Convolution, Ends, Residual, Written, constants, finish, given
from everstate.ops.linear.triton_tiles import blocks_of_tiles, run_tiles
from everstate.ops.norm.normed import Normed, as_normed
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import dense, dense_rows, halved, launch_options, piece_of, start_next, wait_for_last

HELD = 4096
"""Bytes of weights of a warp: many programs, each with all that it reads in flight, fill a GPU best."""
LONG = 8192
"""Bytes of a row of weights from which a warp has twice as many: fewer programs then read x."""
MOST = 8192
"""Bytes of weights that a warp asks for at once, where a row is longer than that: what registers hold."""
WIDE = 2048
"""Width of x from which matrices are multiplied from 2 rows on, or from 3 on where weights have 8 bits."""
CONVOLVED = 32
"""Rows up to which a convolution behind a product costs less in its launch than in its own."""


def linear(
    x: Float[Tensor, "*b k"] | Normed,
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*b n"]:
    """See `everstate.ops.linear`."""
    return _linear(*as_normed(x), weight, bias, scale)


def linear_activate(
    x: Float[Tensor, "*b k"] | Normed,
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale: Float[Tensor, " n"] | None = None,
    activation: Activation = "silu",
    gated: bool = False,
) -> Float[Tensor, "*b f"]:
    """See `everstate.ops.linear_activate`."""
    whole = as_normed(x)
    if gated and not _one_by_one(dense_rows(whole.x), weight):  # a tile of matrix products would be half gates
        return glu(_linear(*whole, weight, bias, scale), activation)
    return _linear_activate(*whole, weight, bias, scale, activation, gated)


def linear_conv_step_(
    x: Float[Tensor, "b k"] | Normed,
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
    whole = as_normed(x)
    if len(whole.x) > CONVOLVED:
        y = _linear(*whole, weight, bias, scale)
        return convolve_(y, conv_weight, conv_bias, state, slots, start, activation)
    y = _linear_conv(*whole, weight, bias, scale, conv_weight, conv_bias, state, slots, start, activation == "silu")
    stop = start + len(conv_weight)
    return y[:, :start], y[:, start:stop], y[:, stop:]


def linear_add_rms_norm(
    x: Float[Tensor, "b k"] | Normed,
    weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None,
    residual: Float[Tensor, "b n"],
    norm: Float[Tensor, " n"],
    *,
    scale: Float[Tensor, " n"] | None = None,
    addend: Float[Tensor, "b n"] | None = None,
    eps: float = 1e-5,
    multiplier: float = 1.0,
) -> tuple[Float[Tensor, "b n"], Normed]:
    """See `everstate.ops.linear_add_rms_norm`. What the norm divides by is known when all programs have ended."""
    whole = as_normed(x)
    rows = whole.x
    if not divides(len(rows), len(weight), _blocks(rows, weight), rows.dtype, rows.device):
        return add_and_norm(_linear(*whole, weight, bias, scale), addend, residual, norm, eps, multiplier)
    y, summed, squares = _linear_add(*whole, weight, bias, scale, addend, residual, norm, multiplier)
    return summed, Normed(y, squares, eps)


@kernel_op("linear")
def _linear(
    x: Tensor, squares: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    y = _run(dense_rows(x), weight, Ends(squares, eps, bias, scale)).y
    return y.view(*x.shape[:-1], len(weight))


@_linear.register_fake
def _(
    x: Tensor, squares: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@kernel_op("linear_activate")
def _linear_activate(
    x: Tensor, squares: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    ends = Ends(squares, eps, bias, scale, activation=activation, gated=gated)
    return _run(dense_rows(x), weight, ends).y.view(*x.shape[:-1], -1)


@_linear_activate.register_fake
def _(
    x: Tensor, squares: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], len(weight) // (1 + gated))


@kernel_op("linear_conv_step_", mutates={"state"})
def _linear_conv(
    x: Tensor, squares: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    conv_weight: Tensor, conv_bias: Tensor | None, state: Tensor, slots: Tensor | None, start: int, activated: bool,
) -> Tensor:  # fmt: skip
    conv = Convolution(conv_weight, conv_bias, state, slots, start, activated)
    return _run(dense(x), weight, Ends(squares, eps, bias, scale, conv=conv)).y


@_linear_conv.register_fake
def _(
    x: Tensor, squares: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    conv_weight: Tensor, conv_bias: Tensor | None, state: Tensor, slots: Tensor | None, start: int, activated: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], len(weight))


@kernel_op("linear_add_rms_norm")
def _linear_add(
    x: Tensor, squares: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    addend: Tensor | None, residual: Tensor, norm: Tensor, multiplier: float,
) -> list[Tensor]:  # fmt: skip
    stream = Residual(residual.contiguous(), None if addend is None else addend.contiguous(), norm, multiplier)
    ends = Ends(squares, eps, bias, scale, residual=stream)
    return [t for t in _run(dense(x), weight, ends) if t is not None]


@_linear_add.register_fake
def _(
    x: Tensor, squares: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    addend: Tensor | None, residual: Tensor, norm: Tensor, multiplier: float,
) -> list[Tensor]:  # fmt: skip
    return [t for t in _written(x, weight, stream=residual) if t is not None]


def _run(x: Float[Tensor, "b k"], weight: Float[Tensor, "n k"] | Int8[Tensor, "n k"], ends: Ends) -> Written:
    """Launch the kernel for so many rows."""
    stream = None if ends.residual is None else ends.residual.stream
    written = _written(x, weight, stream=stream, gated=ends.gated)
    arguments, settings = ends.arguments(written)
    if not _one_by_one(x, weight):
        assert not ends.gated, "the kernel of matrix products has no gates"
        run_tiles(x, weight, arguments, settings)
        return written
    sizes, options = _sizes(weight, ends.gated)
    launch(
        _linear_kernel, (cdiv(len(weight), sizes["BLOCK_N"]),),
        x, weight, x.stride(0), *arguments, K=weight.shape[1], **settings, GATED=ends.gated, ROWS=len(x),
        BLOCK_B=power_of_2(len(x)), **sizes, **options, **launch_options(x.device),
    )  # fmt: skip
    return written


def _written(
    x: Float[Tensor, "b k"], weight: Tensor, *, stream: Float[Tensor, "b n"] | None = None, gated: bool = False
) -> Written:
    """Memory for what a kernel writes."""
    rows = x.shape[0]  # `len(x)` would be a number, and a compiler should serve any
    y = x.new_empty(rows, len(weight) // (1 + gated))
    if stream is None:
        return Written(y)
    summed = stream.new_empty(stream.shape, dtype=torch.promote_types(stream.dtype, y.dtype))
    return Written(y, summed, x.new_empty(rows, _blocks(x, weight), dtype=torch.float32))


def _blocks(x: Float[Tensor, "b k"], weight: Tensor) -> int:
    """Among how many blocks the outputs are shared out."""
    if not _one_by_one(x, weight):
        return blocks_of_tiles(x.shape[0], weight)
    return cdiv(len(weight), _sizes(weight)[0]["BLOCK_N"])


def _one_by_one(x: Float[Tensor, "b k"], weight: Tensor) -> bool:
    """Whether numbers are multiplied one by one, and not by a kernel of matrix products."""
    rows, width = x.shape
    few = FEW if width < WIDE else 2 if weight.dtype == torch.int8 else 1
    return rows <= few or (rows <= FEW and refusal_of_tiles(x.dtype, width, x.device) is not None)


def _sizes(weight: Tensor, gated: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """Tiles and warps, as they were fastest.

    All warps of a program share its rows, one for each 1 to 3 KB, and so read x once; a program has at most 2 of few
    outputs. Of 8 bits a thread takes 16 weights at once, but 8 numbers of x: these are read again for each row, so that
    threads need not exchange them.
    """
    size, row = weight.element_size(), weight.shape[1] * weight.element_size()
    if size == 1:
        warps, n = 4, 4 if row < HELD else 2
        piece = piece_of(row, 2048 // n, least=512, part=8)
    else:
        piece = piece_of(row, HELD, least=512, part=8)
        warps = max(min(power_of_2(row + 1) // 2048, piece // 512, 8), 1)
        n = power_of_2(cdiv((HELD if row < LONG else 2 * HELD) * warps, row))
        n = halved(n, len(weight), 1, processors(weight.device), least=2)  # of few outputs, as of Mamba-1's `x_proj`
    n = max(n, 1 + gated)
    pieces, most = cdiv(row, piece), max(MOST * warps // (n * piece), 1)
    ahead = cdiv(pieces, cdiv(pieces, most))
    tile = {"BLOCK_N": n, "BLOCK_K": piece // size, "AHEAD": ahead, "LINES": n if size == 1 else 1}
    return tile, {"num_warps": warps}


@triton.jit
def _linear_kernel(
    x, weight, x_row, bias, scale, squares, parts, eps,
    taps, conv_bias, pool, slots, pool_slot, pool_d, pool_k, start, channels,
    stream, addend, norm, multiplier, y, summed, block_squares, rows, outputs,
    K: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, LINES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_B: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs, for all rows; AHEAD pieces of its weights are on their way at any time."""
    start_next(OVERLAP)
    PIECES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    first = tl.program_id(0) * OUTPUTS
    n, k, b = first + tl.arange(0, OUTPUTS), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_B)
    i = tl.arange(0, BLOCK_N)
    mine, line = first + i, i
    if GATED:  # rows alternate: a gate, then its up projection, `outputs` rows further on
        mine, line = first + i // 2, i // 2 + (i % 2).to(tl.int64) * outputs
    own = weight + first.to(tl.int64) * K + line[:, None] * K
    held = ()
    for piece in tl.static_range(AHEAD):
        held = held + (_weights(own, mine, piece * BLOCK_K + k, outputs, K, BLOCK_K),)  # type: ignore[assignment]
    of_layer = constants(bias, scale, taps, conv_bias, norm, n, outputs, start, channels, TAPS, GATED)
    wait_for_last(OVERLAP)
    of_token = given(
        squares, parts, stream, addend, pool, slots, pool_slot, pool_d, pool_k, n, b, start, channels, rows, outputs,
        TAPS, PARTS,
    )  # fmt: skip
    sums = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for done in tl.static_range(0, PIECES, AHEAD):
        coming = ()
        for row in tl.static_range(ROWS):
            part = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for turn in tl.static_range(min(AHEAD, PIECES - done)):
                at = (done + turn) * BLOCK_K + k
                part += held[turn].to(tl.float32) * _numbers(x + row * x_row, at, LINES, K, BLOCK_K).to(tl.float32)
                if row == ROWS - 1 and done + turn + AHEAD < PIECES:  # what takes the place of these weights
                    later = _weights(own, mine, at + AHEAD * BLOCK_K, outputs, K, BLOCK_K)
                    coming = coming + (later,)
            sums += tl.where((b == row)[None, :], tl.sum(part, 1)[:, None], 0.0)
        held = coming
    ups = sums
    if GATED:
        sums, ups = tl.split(tl.trans(tl.reshape(sums, (OUTPUTS, 2, BLOCK_B)), (0, 2, 1)))
    finish(
        sums, ups, of_layer, of_token, squares, eps, pool_k, stream, addend, multiplier, y, summed, block_squares,
        n, b, rows, outputs, tl.program_id(0), tl.num_programs(0), K, TAPS, SILU, ACTIVATION, GATED,
    )  # fmt: skip


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
