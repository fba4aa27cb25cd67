"""Linear maps of a few rows on a GPU, where reading the weights takes all the time: once, in pieces of 16 bytes.

Up to 8 rows are multiplied number by number, more as a product of matrices. A program owns some outputs. The norm needs
no pass of its own: `W (x * norm)` and the sum of the squares of x grow together, and the one is divided at the end.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8
from torch import Tensor

from everstate.core.state import Slots
from everstate.ops.linear.limits import EXACT_ROWS
from everstate.ops.triton_common import dot
from everstate.ops.triton_rows import dense, fetch, launch_options, silu, start_next, wait_for_last

WIDEST = 4096
"""Numbers of a row of weights that a program holds at once."""
HELD = 8192
"""Numbers of weights that a program holds: 16 KB of bfloat16, in 64 registers of each of 128 threads."""


AHEAD = 4096
"""Numbers of each row of weights that a program asks for before the kernel before it has ended."""


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


@torch.library.custom_op("everstate::linear", mutates_args=())
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Tensor | None, eps: float
) -> Tensor:
    rows = dense(x.reshape(-1, x.shape[-1]))
    y = _run(rows, weight, bias, scale, norm, eps, None, None, None, None, 0, False)
    return y.view(*x.shape[:-1], len(weight))


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, norm: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("everstate::linear_conv_step_", mutates_args={"state"})
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
    y = x.new_empty(rows, outputs)
    channels, count = (0, 0) if taps is None else taps.shape
    strides = (0, 0, 0) if state is None else state.stride()
    few = rows <= EXACT_ROWS
    tile, launch = _few(rows, width, weight) if few else _many(rows, outputs, width)
    kernel = _few_kernel if few else _many_kernel
    kernel[(triton.cdiv(outputs, tile["BLOCK_N"]),)](
        x, weight, bias, scale, norm, y, taps, conv_bias, state, slots, x.stride(0), *strides, eps, rows, outputs,
        start, channels,
        K=width, TAPS=count, SILU=activated,
        **tile, **launch, **launch_options(x.device),
    )  # fmt: skip
    return y


def _few(rows: int, width: int, weight: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the kernel without matrix products."""
    block = min(triton.next_power_of_2(width), WIDEST)
    held = HELD * 2 // weight.element_size() if weight.element_size() < 4 else HELD // 2
    sizes = {"BLOCK_N": max(held // block, 1), "BLOCK_K": block, "ROWS": rows, "BLOCK_B": triton.next_power_of_2(rows)}
    return sizes, {"num_warps": 4 if block < 4096 else 8}


def _many(rows: int, outputs: int, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the kernel of matrix products."""
    block = 32 if rows <= 32 else 64
    while block > 16 and triton.cdiv(outputs, block) < 128:
        block //= 2
    sizes = {"BLOCK_N": block, "BLOCK_K": 128, "BLOCK_B": max(triton.next_power_of_2(rows), 16), "AHEAD": AHEAD}
    return sizes, {"num_warps": 4, "num_stages": 4}


@triton.jit
def _few_kernel(
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
    wait_for_last(OVERLAP)
    past, mine, window = n, n, ()
    if TAPS > 0:
        past, mine, window = _window(pool, slots, n - start, b, pool_slot, pool_d, pool_k, rows, channels, TAPS)
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
    _finish(
        sums, bias, scale, y, taps, conv_bias, past, mine, window, n, b, pool_k, rows, outputs, start, TAPS, SILU,
    )  # fmt: skip


@triton.jit
def _many_kernel(
    x, weight, bias, scale, norm, y, taps, conv_bias, pool, slots,
    x_row, pool_slot, pool_d, pool_k, eps, rows, outputs, start, channels,
    K: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs, for all rows, which are filled up to BLOCK_B."""
    start_next(OVERLAP)
    n, k, b = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_B)
    own = weight + tl.program_id(0).to(tl.int64) * BLOCK_N * K + tl.arange(0, BLOCK_N)[:, None] * K + k[None, :]
    theirs = x + b[None, :] * x_row + k[:, None]
    if OVERLAP and AHEAD > 0:
        # While the kernel before still runs, the weights come as far as the cache.
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
        line = tl.arange(0, BLOCK_K // LINE) * LINE
        for first in range(0, min(K, AHEAD), BLOCK_K):
            at = (weight + tl.program_id(0).to(tl.int64) * BLOCK_N * K + first) + tl.arange(0, BLOCK_N)[:, None] * K
            fetch(at + line[None, :], (n < outputs)[:, None] & (first + line < K)[None, :])
    wait_for_last(OVERLAP)
    sums, squares = tl.zeros((BLOCK_N, BLOCK_B), tl.float32), tl.zeros((BLOCK_B,), tl.float32)
    for first in tl.range(0, K, BLOCK_K):
        at = first + k
        w = tl.load(own + first, mask=(n < outputs)[:, None] & (at < K)[None, :], other=0.0)
        u = tl.load(theirs + first, mask=(b < rows)[None, :] & (at < K)[:, None], other=0.0)
        if norm is not None:
            wide = u.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            u = (wide * tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)[:, None]).to(u.dtype)
        if weight.dtype.element_ty == tl.int8:
            w = w.to(tl.float32).to(u.dtype)
        sums = dot(w, u, sums, "tf32")
    if norm is not None:
        sums = sums * tl.rsqrt(squares / K + eps)[None, :]
    past, mine, window = n, n, ()
    if TAPS > 0:
        past, mine, window = _window(pool, slots, n - start, b, pool_slot, pool_d, pool_k, rows, channels, TAPS)
    _finish(
        sums, bias, scale, y, taps, conv_bias, past, mine, window, n, b, pool_k, rows, outputs, start, TAPS, SILU,
    )  # fmt: skip


@triton.jit
def _window(pool, slots, d, b, pool_slot, pool_d, pool_k, rows, channels, TAPS: tl.constexpr):
    """Where the past of these outputs lies, which of it there is, and what the convolution has kept, oldest first."""
    mine = ((d >= 0) & (d < channels))[:, None] & (b < rows)[None, :]
    slot = b.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + b, mask=b < rows, other=0).to(tl.int64)
    past = pool + (slot * pool_slot)[None, :] + d[:, None] * pool_d
    window = ()
    for j in tl.static_range(TAPS - 1):
        window = window + (tl.load(past + j * pool_k, mask=mine, other=0.0),)  # type: ignore[assignment]
    return past, mine, window


@triton.jit
def _finish(
    sums, bias, scale, y, taps, conv_bias, past, mine, window, n, b, pool_k, rows, outputs, start,
    TAPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Scale, bias, convolution and activation of a block of outputs, and their place in memory."""
    if scale is not None:
        sums = sums * tl.load(scale + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        sums += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    out = sums.to(y.dtype.element_ty)
    if TAPS > 0:
        d, convolved = n - start, (tl.sum(mine.to(tl.int32), 1) > 0)
        # The convolution reads outputs as they are rounded, here as where it is an op of its own.
        now = out.to(tl.float32)
        sums = now * tl.load(taps + d * TAPS + TAPS - 1, mask=convolved, other=0.0).to(tl.float32)[:, None]
        for j in tl.static_range(TAPS - 1):
            factor = tl.load(taps + d * TAPS + j, mask=convolved, other=0.0).to(tl.float32)
            sums += window[j].to(tl.float32) * factor[:, None]
        if conv_bias is not None:
            sums += tl.load(conv_bias + d, mask=convolved, other=0.0).to(tl.float32)[:, None]
        if SILU:
            sums = silu(sums)
        # Every column moves one place to the left; all of them were loaded before the first is overwritten.
        tl.debug_barrier()
        for j in tl.static_range(TAPS - 1):
            if j < TAPS - 2:
                tl.store(past + j * pool_k, window[j + 1], mask=mine)
            else:
                tl.store(past + j * pool_k, out, mask=mine)
        out = tl.where(mine, sums.to(out.dtype), out)
    at = y + b.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(at, out, mask=(n < outputs)[:, None] & (b < rows)[None, :])
