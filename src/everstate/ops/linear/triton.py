"""Linear maps of a few rows on a GPU, where reading the weights takes all the time: once, in pieces of 16 bytes.

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
from everstate.ops.linear.limits import FEW
from everstate.ops.linear.triton_ends import constants, finish, window_of
from everstate.ops.linear.triton_tiles import run_tiles
from everstate.ops.triton_rows import dense, launch_options, start_next, wait_for_last

WIDEST = 4096
"""Numbers of a row of weights that a program holds at once."""
HELD = 16_384
"""Bytes of weights of a program: many programs, each with all that it reads in flight, fill a GPU best."""


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
    y = _linear_conv(x, weight, bias, scale, conv_weight, conv_bias, state, slots, start, activation == "silu")
    stop = start + len(conv_weight)
    return y[:, :start], y[:, start:stop], y[:, stop:]


@kernel_op("linear")
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Tensor | None, eps: float
) -> Tensor:
    rows = dense(x.reshape(-1, x.shape[-1]))
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
    sizes, launch = _sizes(rows, width, weight)
    _linear_kernel[(triton.cdiv(outputs, sizes["BLOCK_N"]),)](
        x, weight, bias, scale, norm, y, taps, conv_bias, state, slots, x.stride(0), *strides, eps, rows, outputs,
        start, channels,
        K=width, TAPS=count, SILU=activated, **sizes, **launch, **launch_options(x.device),
    )  # fmt: skip
    return y


def _sizes(rows: int, width: int, weight: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Tiles and warps: what a program asks for at once is 16 KB of weights, 32 KB where rows are long."""
    block = min(triton.next_power_of_2(width), WIDEST)
    held = (HELD if block < WIDEST else 2 * HELD) // weight.element_size()
    sizes = {"BLOCK_N": max(held // block, 1), "BLOCK_K": block, "ROWS": rows, "BLOCK_B": triton.next_power_of_2(rows)}
    return sizes, {"num_warps": 4 if block < WIDEST else 8}


@triton.jit
def _linear_kernel(
    x, weight, bias, scale, norm, y, taps, conv_bias, pool, slots,
    x_row, pool_slot, pool_d, pool_k, eps, rows, outputs, start, channels,
    K: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs, for all rows."""
    start_next(OVERLAP)
    n, k, b = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_B)
    own = weight + tl.program_id(0).to(tl.int64) * BLOCK_N * K + tl.arange(0, BLOCK_N)[:, None] * K + k[None, :]
    inside = (n < outputs)[:, None] & (k < K)[None, :]
    w = tl.load(own, mask=inside, other=0.0, eviction_policy="evict_first")
    g = tl.full((BLOCK_K,), 1.0, tl.float32)
    if norm is not None:
        g = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    factor, offset, conv_offset, factors = constants(bias, scale, taps, conv_bias, n, outputs, start, channels, TAPS)
    wait_for_last(OVERLAP)
    past, mine, window = n, n, ()
    if TAPS > 0:
        past, mine, window = window_of(pool, slots, n - start, b, pool_slot, pool_d, pool_k, rows, channels, TAPS)
    sums, squares = tl.zeros((BLOCK_N, BLOCK_B), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    for block in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        at = block * BLOCK_K + k
        if block > 0:
            inside = (n < outputs)[:, None] & (at < K)[None, :]
            w = tl.load(own + block * BLOCK_K, mask=inside, other=0.0, eviction_policy="evict_first")
            if norm is not None:
                g = tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)
        wide = w.to(tl.float32)
        for row in tl.static_range(ROWS):
            u = tl.load(x + row * x_row + at, mask=at < K, other=0.0).to(tl.float32)
            if norm is not None:
                squares += tl.where(b == row, tl.sum(u * u, 0), 0.0)
                u = u * g
            sums += tl.where((b == row)[None, :], tl.sum(wide * u[None, :], 1)[:, None], 0.0)
    if norm is not None:
        sums = sums * tl.rsqrt(squares / K + eps)[None, :]
    sums = sums * factor[:, None] + offset[:, None]
    finish(sums, y, conv_offset, factors, past, mine, window, n, b, pool_k, rows, outputs, TAPS, SILU)
