"""One token of the short convolution on a GPU: product, shift, bias and activation in one launch."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.core.state import Slots
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import (
    dense,
    launch_options,
    reads_early,
    silu,
    slot_of,
    start_next,
    wait_for_last,
)

CHANNELS = 128
"""Channels of one program."""


def causal_conv1d_step_(
    x: Float[Tensor, "b d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "slots d k1"],
    slots: Slots = None,
    *,
    activation: str | None = None,
) -> Float[Tensor, "b d"]:
    """See `everstate.ops.causal_conv1d_step_`. The pool may be of lower precision: what enters it is rounded."""
    return _step(x, weight, bias, state, slots, activation == "silu")


@kernel_op("causal_conv1d_step_", mutates={"state"})
def _step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor | None, activated: bool
) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, channels = x.shape
    launch(
        _step_kernel, (batch, cdiv(channels, CHANNELS)),
        x, weight, bias, state, slots, y, x.stride(0), *state.stride(), channels,
        K=weight.shape[1], SILU=activated, BLOCK_D=CHANNELS, BLOCK_K=power_of_2(weight.shape[1]),
        EARLY=reads_early(slots, batch),
        num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return y


@_step.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor | None, activated: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton.jit
def _step_kernel(
    x, weight, bias, state, slots, y, x_row, state_slot, state_d, state_k, channels,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row and block of channels: the window is the past and, as its last column, the new input."""
    start_next(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    d, k = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    inside, offset = d < channels, d * 0.0
    taps = tl.load(weight + d[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
    if bias is not None:
        offset = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if not EARLY:
        wait_for_last(OVERLAP)
    past = state + slot_of(slots, row) * state_slot + d[:, None] * state_d + k[None, :] * state_k
    window = tl.load(past, mask=inside[:, None] & (k < K - 1)[None, :], other=0.0).to(tl.float32)
    if EARLY:
        wait_for_last(OVERLAP)
    now = tl.load(x + row * x_row + d, mask=inside, other=0.0).to(tl.float32)
    window = tl.where((k == K - 1)[None, :], now[:, None], window)
    # Every column moves one place to the left; all of them were loaded before the first is overwritten.
    tl.debug_barrier()
    shifted = past - state_k
    tl.store(shifted, window.to(state.dtype.element_ty), mask=inside[:, None] & ((k > 0) & (k < K))[None, :])
    out = tl.sum(window * taps.to(tl.float32), 1) + offset
    if SILU:
        out = silu(out)
    tl.store(y + row * channels + d, out.to(y.dtype.element_ty), mask=inside)
