"""What stands behind a product on a GPU: factors and offsets of its outputs, and one token of a short convolution."""

import triton
import triton.language as tl

from everstate.ops.triton_rows import silu


@triton.jit
def constants(bias, scale, taps, conv_bias, n, outputs, start, channels, TAPS: tl.constexpr):
    """What outputs are multiplied by and what is added, before the convolution and in it."""
    inside, d = n < outputs, n - start
    convolved = (d >= 0) & (d < channels)
    factor, offset = tl.full((n.shape[0],), 1.0, tl.float32), tl.zeros((n.shape[0],), tl.float32)
    conv_offset, factors = offset, ()
    if scale is not None:
        factor = tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if conv_bias is not None:
        conv_offset = tl.load(conv_bias + d, mask=convolved, other=0.0).to(tl.float32)
    for j in tl.static_range(TAPS):
        tap = tl.load(taps + d * TAPS + j, mask=convolved, other=0.0).to(tl.float32)
        factors = factors + (tap,)  # type: ignore[assignment]
    return factor, offset, conv_offset, factors


@triton.jit
def window_of(pool, slots, d, b, pool_slot, pool_d, pool_k, rows, channels, TAPS: tl.constexpr):
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
def finish(
    sums, y, conv_offset, factors, past, mine, window, n, b, pool_k, rows, outputs,
    TAPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolution and activation of a block of outputs, and their place in memory."""
    out = sums.to(y.dtype.element_ty)
    if TAPS > 0:
        # The convolution reads outputs as they are rounded, here as where it is an op of its own.
        sums = out.to(tl.float32) * factors[TAPS - 1][:, None] + conv_offset[:, None]
        for j in tl.static_range(TAPS - 1):
            sums += window[j].to(tl.float32) * factors[j][:, None]
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
