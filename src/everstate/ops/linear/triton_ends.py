"""What stands around a product on a GPU: the division of a norm, factors and offsets of the outputs, and an activation
with or without a gate, or one token of a short convolution, or a residual stream with the norm behind it."""

from typing import NamedTuple

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.state import Slots
from everstate.ops.conv1d.triton_step import move_on, window_of
from everstate.ops.triton_activations import act
from everstate.ops.triton_launch import power_of_2
from everstate.ops.triton_rows import rstd, silu


class Convolution(NamedTuple):
    """One token of a short convolution over the outputs from `start` on."""

    taps: Float[Tensor, "d taps"]
    bias: Float[Tensor, " d"] | None
    state: Float[Tensor, "slots d taps1"]
    slots: Slots
    start: int
    activated: bool


class Residual(NamedTuple):
    """A residual stream that takes the outputs and an addend in, `multiplier` times, and the weight of the norm behind
    it."""

    stream: Float[Tensor, "b n"]
    addend: Float[Tensor, "b n"] | None
    norm: Float[Tensor, " n"]
    multiplier: float


class Written(NamedTuple):
    """What a kernel writes: its outputs; with a residual stream the rows of its norm, the new stream, and sums of the
    squares of each row, one for a block of outputs."""

    y: Float[Tensor, "b n"]
    stream: Float[Tensor, "b n"] | None = None
    squares: Float[Tensor, "b blocks"] | None = None


class Ends(NamedTuple):
    """What stands around the product x with weights."""

    squares: Float[Tensor, "b parts"] | None
    eps: float
    bias: Float[Tensor, " n"] | None
    scale: Float[Tensor, " n"] | None
    conv: Convolution | None = None
    residual: Residual | None = None
    activation: str = ""
    gated: bool = False

    def arguments(self, written: Written) -> tuple[tuple[object, ...], dict[str, int | str]]:
        """Those of a kernel for it, in their order, and its constants."""
        conv, residual = self.conv, self.residual
        parts = 0 if self.squares is None else self.squares.shape[-1]
        convolved: tuple[object, ...] = (None,) * 4 + (0,) * 5
        channels, taps = (0, 0) if conv is None else conv.taps.shape
        if conv is not None:
            convolved = (conv.taps, conv.bias, conv.state, conv.slots, *conv.state.stride(), conv.start, channels)
        added = (None, None, None, 1.0) if residual is None else residual
        values = (self.bias, self.scale, self.squares, parts, self.eps, *convolved, *added, *written, *written.y.shape)
        constants: dict[str, int | str] = {
            "TAPS": taps, "SILU": conv is not None and conv.activated, "PARTS": power_of_2(max(parts, 1)),
            "ACTIVATION": self.activation,
        }  # fmt: skip
        return values, constants


@triton.jit
def _affine(bias, scale, n, inside):
    """What outputs are multiplied by, and what is added."""
    factor, offset = tl.full((n.shape[0],), 1.0, tl.float32), tl.zeros((n.shape[0],), tl.float32)
    if scale is not None:
        factor = tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    return factor, offset


@triton.jit
def constants(
    bias, scale, taps, conv_bias, norm, n, outputs, start, channels, TAPS: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """What belongs to the layer: what outputs are multiplied by and what is added, before the convolution and in it,
    and their weight in the norm behind; and `of_up`, factor and offset of the up projection, with a gate."""
    inside, d = n < outputs, n - start
    convolved = (d >= 0) & (d < channels)
    factor, offset = _affine(bias, scale, n, inside)
    conv_offset, factors, weigh, of_up = tl.zeros((n.shape[0],), tl.float32), (), factor, (factor, offset)
    if GATED:
        of_up = _affine(bias, scale, outputs + n, inside)
    if conv_bias is not None:
        conv_offset = tl.load(conv_bias + d, mask=convolved, other=0.0).to(tl.float32)
    for j in tl.static_range(TAPS):
        tap = tl.load(taps + d * TAPS + j, mask=convolved, other=0.0).to(tl.float32)
        factors = factors + (tap,)  # type: ignore[assignment]
    if norm is not None:
        weigh = tl.load(norm + n, mask=inside, other=0.0).to(tl.float32)
    return factor, offset, conv_offset, factors, weigh, of_up


@triton.jit
def given(
    squares, parts, stream, addend, pool, slots, pool_slot, pool_d, pool_k, n, b, start, channels, rows, outputs,
    TAPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What belongs to the token: sums of squares, the residual stream and its addend, and what `_window` gives; n where
    there is none.

    Only asked for: it is added up where it is needed.
    """
    sums, before, more, past, mine, window = n, n, n, n, n, ()
    at = tl.arange(0, PARTS)
    if squares is not None:
        inside = (b < rows)[:, None] & (at < parts)[None, :]
        sums = tl.load(squares + b[:, None] * parts + at[None, :], mask=inside, other=0.0).to(tl.float32)
    if stream is not None:
        inside = (n < outputs)[:, None] & (b < rows)[None, :]
        at_output = b.to(tl.int64)[None, :] * outputs + n[:, None]
        before = tl.load(stream + at_output, mask=inside, other=0.0)
        if addend is not None:
            more = tl.load(addend + at_output, mask=inside, other=0.0)
    if TAPS > 0:
        past, mine, window = _window(pool, slots, n - start, b, pool_slot, pool_d, pool_k, rows, channels, TAPS)
    return sums, before, more, past, mine, window


@triton.jit
def _window(pool, slots, d, b, pool_slot, pool_d, pool_k, rows, channels, TAPS: tl.constexpr):
    """Where the past of these outputs lies, which of it there is, and what the convolution has kept, oldest first."""
    mine = ((d >= 0) & (d < channels))[:, None] & (b < rows)[None, :]
    slot = b.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + b, mask=b < rows, other=0).to(tl.int64)
    past = pool + (slot * pool_slot)[None, :] + d[:, None] * pool_d
    return past, mine, window_of(past, pool_k, mine, TAPS)


@triton.jit
def finish(
    sums, ups, of_layer, of_token, squares, eps, pool_k, stream, addend, multiplier, y, summed, block_squares,
    n, b, rows, outputs, block, blocks, K: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """All that stands behind a block of a product; `constants` and `given` gave what it takes. With GATED, `sums` are
    gates and `ups` up projections."""
    factor, offset, conv_offset, factors, weigh, of_up = of_layer
    parts, before, more, past, mine, window = of_token
    if squares is not None:
        factors_of_rows = rstd(tl.sum(parts, 1), eps, K)[None, :]
        sums = sums * factors_of_rows
        if GATED:
            ups = ups * factors_of_rows
    sums = sums * factor[:, None] + offset[:, None]
    if ACTIVATION != "":
        sums = act(sums, ACTIVATION)
    if GATED:
        sums = sums * (ups * of_up[0][:, None] + of_up[1][:, None])
    inside = (n < outputs)[:, None] & (b < rows)[None, :]
    at = b.to(tl.int64)[None, :] * outputs + n[:, None]
    if stream is not None:
        if addend is not None:
            sums += more.to(tl.float32)
        total = (before.to(tl.float32) + sums * multiplier).to(summed.dtype.element_ty)
        tl.store(summed + at, total, mask=inside)
        total = tl.where(inside, total.to(tl.float32), 0.0)
        tl.store(block_squares + b * blocks + block, tl.sum(total * total, 0), mask=b < rows)
        out = (total * weigh[:, None]).to(y.dtype.element_ty)
    else:
        out = sums.to(y.dtype.element_ty)
    if TAPS > 0:
        if b.shape[0] < 16:
            # Sums of rows are known to every thread, and Triton 3.6 may let each load all that the convolution has kept
            # of them. What is stored as it is, is first shared out as stores want it. Products of matrices, which have
            # 16 rows or more, are already.
            tl.store(y + at, out, mask=inside & ~mine)
            inside = mine
        out = _convolve(out, conv_offset, factors, past, mine, window, pool_k, TAPS, SILU)
    tl.store(y + at, out, mask=inside)


@triton.jit
def _convolve(
    out, conv_offset, factors, past, mine, window, pool_k, TAPS: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Convolution and activation of a block of outputs, of which some are not convolved."""
    # The convolution reads outputs as they are rounded, here as where it is an op of its own.
    sums = out.to(tl.float32) * factors[TAPS - 1][:, None] + conv_offset[:, None]
    for j in tl.static_range(TAPS - 1):
        sums += window[j].to(tl.float32) * factors[j][:, None]
    if SILU:
        sums = silu(sums)
    move_on(past, pool_k, window, out, mine, TAPS)
    return tl.where(mine, sums.to(out.dtype), out)
