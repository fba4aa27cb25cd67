"""One token of the short convolution on a GPU: product, shift, bias and activation in one launch."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.core.state import Slots
from everstate.ops.triton_launch import cdiv, launch
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
        K=weight.shape[1], SILU=activated, BLOCK_D=CHANNELS, EARLY=reads_early(slots, batch),
        num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return y


@_step.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor | None, activated: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton.jit
def _step_kernel(
    x, weight, bias, state, slots, y, x_row, state_slot, state_d, state_k, channels,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row and block of channels."""
    start_next(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside, sums, taps = d < channels, d * 0.0, ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(weight + d * K + j, mask=inside, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    if bias is not None:
        sums = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if not EARLY:
        wait_for_last(OVERLAP)
    past = state + slot_of(slots, row) * state_slot + d * state_d
    window = window_of(past, state_k, inside, K)
    if EARLY:
        wait_for_last(OVERLAP)
    now = tl.load(x + row * x_row + d, mask=inside, other=0.0)
    sums += now.to(tl.float32) * taps[K - 1]
    for j in tl.static_range(K - 1):
        sums += window[j].to(tl.float32) * taps[j]
    if SILU:
        sums = silu(sums)
    move_on(past, state_k, window, now, inside, K)
    tl.store(y + row * channels + d, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def window_of(past, apart, inside, TAPS: tl.constexpr):
    """What a convolution of so many taps has kept, oldest first."""
    window = ()
    for j in tl.static_range(TAPS - 1):
        window = window + (tl.load(past + j * apart, mask=inside, other=0.0),)  # type: ignore[assignment]
    return window


@triton.jit
def move_on(past, apart, window, now, inside, TAPS: tl.constexpr):
    """Keep an input in the place of the oldest: every one moves one place on."""
    # All of them were loaded before the first is overwritten.
    tl.debug_barrier()
    for j in tl.static_range(TAPS - 1):
        if j < TAPS - 2:
            tl.store(past + j * apart, window[j + 1], mask=inside)
        else:
            tl.store(past + j * apart, now, mask=inside)
