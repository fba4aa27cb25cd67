"""The short convolution on a GPU: each input is read once, by a program that walks along time.

A program has a block of channels and a *chunk* of tokens of one sequence, and the last k inputs in registers. Backward,
it makes the outputs before the activation again instead of having kept them, and sums the gradients of the weight and
the bias over its chunks; the sums of the programs are added at the end, always in the same order.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.packing import Packing
from everstate.ops.triton_common import LOG2E, reciprocal
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_rows import dense
from everstate.ops.triton_sums import total

CHUNK, GROUP = 64, 8
"""Tokens of a program, and those whose loads it starts together."""

BACKWARD_CHUNK, BACKWARD_GROUP = 128, 16
"""Backward, tokens of one turn of a program, and those whose loads it starts together."""

BLOCK_D, WARPS = 256, 4
"""Channels of a program, and its warps."""

PROGRAMS = 32
"""Programs per multiprocessor up to which the chunks have backward programs of their own."""


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "seqs d k1"],
    *,
    activation: str | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d k1"]]:
    """See `everstate.ops.causal_conv1d`."""
    if packing is not None:
        packing.check(x.shape[0], x.shape[1], state.shape[0])
    ends = [] if packing is None else list(packing.cu_seqlens)
    return _conv(x, weight, bias, state, ends, activation == "silu")


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, ends: Sequence[int], activated: bool
) -> tuple[Tensor, Tensor]:
    """Outputs, and the last inputs of each sequence, `(seqs, d, k1)`."""
    x, weight = dense(x), weight.contiguous()
    y, final = _outputs(x, weight, state)
    (batch, length, channels), width = x.shape, weight.shape[1]
    chunks, count = _chunks(ends, batch, length, CHUNK, x.device)
    launch(
        _conv_kernel, (count * cdiv(channels, BLOCK_D),),
        x, weight, bias, state, y, final, chunks, x.stride(0), *state.stride(), length,
        **_sizes(width, activated, GROUP), CHUNK=CHUNK, X_TOKEN=x.stride(1), CHANNELS=channels,
    )  # fmt: skip
    return y, final


_conv = kernel_op("causal_conv1d")(replayed(convolve))


@_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, ends: Sequence[int], activated: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(x, weight, state)


def _outputs(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    shape = (state.shape[0], x.shape[2], weight.shape[1] - 1)
    after = torch.empty(shape, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format), after


@kernel_op("causal_conv1d_backward")
@replayed
def _backward(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
    ends: Sequence[int], activated: bool, wanted: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x and the weight, of the bias where there is one, and of the state, `(seqs, k1, d)`, if wanted."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [dx, *differentiate(dy, dfinal, x, weight, bias, state, ends, activated, wanted, dx)]


def differentiate(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
    ends: Sequence[int], activated: bool, wanted: bool, dx: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Write the gradient of x into `dx`, whose channels lie side by side, and return the others of `_backward`."""
    (batch, length, channels), width = x.shape, weight.shape[1]
    dstate = state.new_empty(len(state), width - 1, channels) if wanted else None
    x, weight = dense(x), weight.contiguous()
    dy = None if dy is None else dense(dy)
    chunk = BACKWARD_CHUNK - (width - 1)
    chunks, count = _chunks(ends, batch, length, chunk, x.device)
    blocks = cdiv(channels, BLOCK_D)
    turns = cdiv(count * blocks, PROGRAMS * processors(x.device))
    programs = cdiv(count, turns)
    sums = x.new_empty(programs, width + 1, channels, dtype=torch.float32)
    launch(
        _conv_backward_kernel, (programs * blocks,),
        dy, dfinal, x, weight, bias, state, dx, dstate, sums, chunks,
        0 if dy is None else dy.stride(0), *((0, 0, 0) if dfinal is None else dfinal.transpose(1, 2).stride()),
        x.stride(0), *state.stride(), dx.stride(0), length, count, **_sizes(width, activated, BACKWARD_GROUP),
        CHUNK=chunk, X_TOKEN=x.stride(1), DY_TOKEN=0 if dy is None else dy.stride(1), DX_TOKEN=dx.stride(1),
        CHANNELS=channels,
    )  # fmt: skip
    summed = total(sums, torch.float32)
    dweight = summed[:width].T.contiguous().to(weight.dtype)
    dbias = None if bias is None else summed[width].to(bias.dtype, copy=True)
    return [t for t in (dweight, dbias, dstate) if t is not None]


@_backward.register_fake
def _(
    dy: Tensor | None, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor,
    ends: Sequence[int], activated: bool, wanted: bool,
) -> list[Tensor]:  # fmt: skip
    given = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias) if t is not None]
    return [*given, state.new_empty(len(state), weight.shape[1] - 1, x.shape[2])] if wanted else given


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]
    ctx.set_materialize_grads(False)  # the final state rarely has one


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    biased, wanted = ctx.saved_tensors[2] is not None, ctx.needs_input_grad[3]
    dx, dweight, *rest = _backward(dy, dfinal, *ctx.saved_tensors, *ctx.settings, wanted)
    return dx, dweight, rest[0] if biased else None, rest[-1].transpose(1, 2) if wanted else None, None, None


_conv.register_autograd(_differentiate, setup_context=_save)


def _sizes(width: int, activated: bool, group: int) -> dict[str, Any]:
    """Per thread, 2 channels of up to 4 taps, fewer of more: all of them are in registers."""
    taps = power_of_2(width)
    return {
        "K": width, "SILU": activated, "BLOCK_D": BLOCK_D, "BLOCK_K": taps, "GROUP": group if taps <= 4 else 1,
        "num_warps": WARPS if taps <= 4 else taps // 4,
    }  # fmt: skip


def _chunks(
    ends: Sequence[int], batch: int, length: int, chunk: int, device: torch.device
) -> tuple[Int[Tensor, "chunks 4"] | None, int]:
    """Where the chunks of packed sequences lie (None where rows are sequences), and how many there are."""
    if not ends:
        return None, batch * cdiv(length, chunk)
    table = _table(tuple(ends), chunk, device)
    return table, len(table)


# Cached by value: every layer of a model asks for the same table, which a captured graph could not copy to the GPU.
@lru_cache(maxsize=64)
def _table(ends: tuple[int, ...], chunk: int, device: torch.device) -> Int[Tensor, "chunks 4"]:
    """Of each chunk, its sequence, the first token of that, its own first token, and the end of the sequence."""
    rows = [
        (i, begin, at, end) for i, (begin, end) in enumerate(pairwise(ends)) for at in range(begin, end, chunk)
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.int32, device=device)


@triton.jit
def _place(chunks, index, length, CHUNK: tl.constexpr):
    """Row, sequence, its first token, the chunk's own first token, and the end of the sequence."""
    if chunks is not None:
        own = chunks + 4 * index
        sequence = tl.load(own)
        row = sequence * 0
        begin, start, end = tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    else:
        each = tl.cdiv(length, CHUNK)
        row, sequence = index // each, index // each
        begin, start, end = index * 0, index % each * CHUNK, length + index * 0
    return row.to(tl.int64), sequence.to(tl.int64), begin, start, end


@triton.jit
def _entry(x, past, t, before, x_token, state_k, inside, K: tl.constexpr):
    """The input t tokens from the chunk's first; before the sequence, which began at `before`, it is the state's."""
    now = tl.load(x + t * x_token, mask=inside & (t >= before), other=0.0).to(tl.float32)
    then = tl.load(past + (K - 1 + t - before) * state_k, mask=inside & (t < before), other=0.0).to(tl.float32)
    return tl.where(t >= before, now, then)


@triton.jit
def _past(x, past, before, x_token, state_k, inside, K: tl.constexpr):
    """The k - 1 inputs before the chunk, oldest first."""
    entries = ()
    for i in tl.static_range(K - 1):
        entries = entries + (_entry(x, past, i - (K - 1), before, x_token, state_k, inside, K),)
    return entries


@triton.jit
def _group(x, first, end, x_token, inside, GROUP: tl.constexpr):
    """Some tokens, with zeros for those from `end` on; or zeros where there is nothing to read."""
    tokens = ()
    for i in tl.static_range(GROUP):
        if x is not None:
            tokens = tokens + (tl.load(x + (first + i) * x_token, mask=inside & (first + i < end), other=0.0),)
        else:
            tokens = tokens + (tl.zeros(inside.shape, tl.float32),)
    return tokens


@triton.jit
def _taps(weight, d, inside, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of the weight."""
    k = tl.arange(0, BLOCK_K)
    own = tl.load(weight + d[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
    columns = ()
    for i in tl.static_range(K):
        columns = columns + (tl.sum(tl.where((k == i)[None, :], own.to(tl.float32), 0.0), 1),)
    return columns


@triton.jit
def _product(window, taps, added, K: tl.constexpr):
    for i in tl.static_range(K):
        added += window[i] * taps[i]
    return added


@triton.jit
def _sigmoid(u):
    return reciprocal(1.0 + tl.exp2(u * -LOG2E))


@triton.jit
def _conv_kernel(
    x, weight, bias, state, y, final, chunks, x_row, state_sequence, state_d, state_k, length,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, X_TOKEN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program per chunk and block of channels."""
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < CHANNELS
    row, sequence, begin, start, end = _place(chunks, tl.program_id(0) // blocks, length, CHUNK)
    count, before = tl.minimum(end - start, CHUNK), begin - start
    x += row * x_row + start.to(tl.int64) * X_TOKEN + d
    y += (row * length + start) * CHANNELS + d
    past = state + sequence * state_sequence + d.to(tl.int64) * state_d
    taps = _taps(weight, d, inside, K, BLOCK_K)
    constant = tl.zeros((BLOCK_D,), tl.float32)
    if bias is not None:
        constant += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    window = _past(x, past, before, X_TOKEN, state_k, inside, K)
    for first in range(0, count, GROUP):
        # All loads before the first store, behind which the compiler would not move them.
        inputs = _group(x, first, count, X_TOKEN, inside, GROUP)
        for i in tl.static_range(GROUP):
            window = window + (inputs[i].to(tl.float32),)
            out = _product(window, taps, constant, K)
            window = window[1:]
            if SILU:
                out = out * _sigmoid(out)
            tl.store(y + (first + i) * CHANNELS, out.to(y.dtype.element_ty), mask=inside & (first + i < count))
    if start + count == end:
        for i in tl.static_range(K - 1):
            last = _entry(x, past, count - (K - 1) + i, before, X_TOKEN, state_k, inside, K)
            tl.store(final + (sequence * CHANNELS + d) * (K - 1) + i, last, mask=inside)


@triton.jit
def _slope(upstream, window, taps, constant, K: tl.constexpr, SILU: tl.constexpr):
    """The gradient of an output before its activation."""
    slope = upstream.to(tl.float32)
    if SILU:
        u = _product(window, taps, constant, K)
        share = _sigmoid(u)
        slope = slope * (share + u * share * (1.0 - share))
    return slope


@triton.jit
def _add(sums, slope, window, own, K: tl.constexpr):
    """The gradients of the taps and, as the last, of the bias, with those of one more token if it is the chunk's."""
    slope = tl.where(own, slope, 0.0)
    added = ()
    for i in tl.static_range(K):
        added = added + (sums[i] + slope * window[i],)
    return added + (sums[K] + slope,)


@triton.jit
def _conv_backward_kernel(
    dy, dfinal, x, weight, bias, state, dx, dstate, sums, chunks,
    dy_row, dfinal_sequence, dfinal_k, dfinal_d, x_row, state_sequence, state_d, state_k, dx_row, length, total,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, DX_TOKEN: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program per block of channels and every so many chunks."""
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < CHANNELS
    taps = _taps(weight, d, inside, K, BLOCK_K)
    constant = tl.zeros((BLOCK_D,), tl.float32)
    if bias is not None:
        constant += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    summed = ()
    for _ in tl.static_range(K + 1):
        summed = summed + (tl.zeros((BLOCK_D,), tl.float32),)
    for index in range(tl.program_id(0) // blocks, total, tl.num_programs(0) // blocks):
        summed = _chunk_gradients(
            dy, dfinal, x, state, dx, dstate, chunks, dy_row, dfinal_sequence, dfinal_k, dfinal_d,
            x_row, state_sequence, state_d, state_k, dx_row, length, index, d, inside, taps, constant, summed,
            K, SILU, CHUNK, GROUP, X_TOKEN, DY_TOKEN, DX_TOKEN, CHANNELS,
        )  # fmt: skip
    own = sums + (tl.program_id(0) // blocks * (K + 1)).to(tl.int64) * CHANNELS + d
    for i in tl.static_range(K + 1):
        tl.store(own + i * CHANNELS, summed[i], mask=inside)


@triton.jit
def _chunk_gradients(
    dy, dfinal, x, state, dx, dstate, chunks, dy_row, dfinal_sequence, dfinal_k, dfinal_d,
    x_row, state_sequence, state_d, state_k, dx_row, length, index, d, inside, taps, constant, summed,
    K: tl.constexpr, SILU: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, X_TOKEN: tl.constexpr,
    DY_TOKEN: tl.constexpr, DX_TOKEN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk's inputs, and add to those of the taps.

    An input has its gradient when the slope of the output k - 1 tokens later is known. So the walk ends k - 1 tokens
    beyond the chunk, and begins with k - 1 inputs that lie before it: those of the state, or of the chunk before.
    """
    row, sequence, begin, start, end = _place(chunks, index, length, CHUNK)
    count, rest, before = tl.minimum(end - start, CHUNK), end - start, begin - start
    x += row * x_row + start.to(tl.int64) * X_TOKEN + d
    if dy is not None:
        dy += row * dy_row + start.to(tl.int64) * DY_TOKEN + d
    if dfinal is not None:
        dfinal += sequence * dfinal_sequence + d.to(tl.int64) * dfinal_d
    dx += row * dx_row + start.to(tl.int64) * DX_TOKEN + d
    past = state + sequence * state_sequence + d.to(tl.int64) * state_d
    window, slopes = _past(x, past, before, X_TOKEN, state_k, inside, K), ()
    for _ in tl.static_range(K - 1):
        slopes = slopes + (tl.zeros(inside.shape, tl.float32),)
    for first in range(0, count + K - 1, GROUP):
        inputs = _group(x, first, rest, X_TOKEN, inside, GROUP)
        upstream = _group(dy, first, rest, DY_TOKEN, inside, GROUP)
        for i in tl.static_range(GROUP):
            window = window + (inputs[i].to(tl.float32),)
            slope = _slope(upstream[i], window, taps, constant, K, SILU)
            summed = _add(summed, slope, window, first + i < count, K)
            slopes, window = slopes + (slope,), window[1:]
            given = tl.zeros(inside.shape, tl.float32)
            for j in tl.static_range(K):
                given += taps[K - 1 - j] * slopes[j]
            slopes, t = slopes[1:], first + i - (K - 1)
            if dfinal is not None:
                column = t - rest + K - 1
                kept = inside & (column >= 0) & (t < count)
                given += tl.load(dfinal + column * dfinal_k, mask=kept, other=0.0).to(tl.float32)
            tl.store(dx + t * DX_TOKEN, given.to(dx.dtype.element_ty), mask=inside & (t >= 0) & (t < count))
            if dstate is not None:
                own = dstate + (sequence * (K - 1) + K - 1 + t) * CHANNELS + d
                tl.store(own, given, mask=inside & (t < 0) & (before == 0))
    return summed
