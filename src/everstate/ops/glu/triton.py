"""The gated activation on a GPU: each number read and written once, forward and backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.ops.activations import Activation
from everstate.ops.triton_activations import act, act_slope
from everstate.ops.triton_launch import cdiv, launch
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_rows import dense, follow_last, launch_options

BLOCK = 1024
"""Numbers of one program."""


def glu(h: Float[Tensor, "*b f2"], activation: Activation = "silu") -> Float[Tensor, "*b f"]:
    """See `everstate.ops.glu`."""
    return _glu(h, activation)


def gated(y: Float[Tensor, "*b f"], z: Float[Tensor, "*b f"]) -> Float[Tensor, "*b f"]:
    """See `everstate.ops.gated`."""
    return _gated(y, z)


@kernel_op("glu")
@replayed
def _glu(h: Tensor, activation: str) -> Tensor:
    gate, up = dense(h.flatten(0, -2)).chunk(2, -1)
    return apply(gate, up, activation).view(*h.shape[:-1], -1)


@_glu.register_fake
def _(h: Tensor, activation: str) -> Tensor:
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


@kernel_op("glu_backward")
@replayed
def _glu_backward(dy: Tensor, h: Tensor, activation: str) -> Tensor:
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    gate, up = dense(h.flatten(0, -2)).chunk(2, -1)
    dgate, dup = dh.flatten(0, -2).chunk(2, -1)
    differentiate(dy, gate, up, dgate, dup, activation)
    return dh


@_glu_backward.register_fake
def _(dy: Tensor, h: Tensor, activation: str) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@kernel_op("gated")
@replayed
def _gated(y: Tensor, z: Tensor) -> Tensor:
    return apply(dense(z.flatten(0, -2)), dense(y.flatten(0, -2)), "silu").view(y.shape)


@_gated.register_fake
def _(y: Tensor, z: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@kernel_op("gated_backward")
@replayed
def _gated_backward(dout: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    dy, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, z))
    gate, up = dense(z.flatten(0, -2)), dense(y.flatten(0, -2))
    differentiate(dout, gate, up, dz.flatten(0, -2), dy.flatten(0, -2), "silu")
    return dy, dz


@_gated_backward.register_fake
def _(dout: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    dy, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, z))
    return dy, dz


def _save_glu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.activation = inputs[1]


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_glu(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _glu_backward(dy, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(_differentiate_glu, setup_context=_save_glu)
_gated.register_autograd(lambda ctx, dout: _gated_backward(dout, *ctx.saved_tensors), setup_context=_save_gated)


def apply(gate: Float[Tensor, "rows f"], up: Float[Tensor, "rows f"], activation: str) -> Float[Tensor, "rows f"]:
    y = torch.empty_like(up, memory_format=torch.contiguous_format)
    rows, width = up.shape
    launch(
        _forward_kernel, (rows, cdiv(width, BLOCK)),
        gate, up, y, gate.stride(0), up.stride(0), width, ACTIVATION=activation, BLOCK=BLOCK,
        **launch_options(y.device),
    )  # fmt: skip
    return y


def differentiate(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str) -> None:
    """Write the gradients into `dgate` and `dup`, whose rows may lie in one tensor."""
    upstream = dense(dy.flatten(0, -2))
    rows, width = up.shape
    launch(
        _backward_kernel, (rows, cdiv(width, BLOCK)),
        upstream, gate, up, dgate, dup, upstream.stride(0), gate.stride(0), up.stride(0), dgate.stride(0),
        dup.stride(0), width, ACTIVATION=activation, BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit
def _load(base, row, stride, column, inside):
    return tl.load(base + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    gate, up, y, gate_row, up_row, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """One program per row and block of columns."""
    follow_last(OVERLAP)
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up = _load(gate, row, gate_row, at, inside), _load(up, row, up_row, at, inside)
    tl.store(y + row * width + at, (act(gate, ACTIVATION) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy, gate, up, dgate, dup, dy_row, gate_row, up_row, dgate_row, dup_row, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block of columns, which holds both gradients."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up = _load(gate, row, gate_row, at, inside), _load(up, row, up_row, at, inside)
    upstream = _load(dy, row, dy_row, at, inside)
    dgate_at, dup_at = upstream * up * act_slope(gate, ACTIVATION), upstream * act(gate, ACTIVATION)
    tl.store(dgate + row * dgate_row + at, dgate_at.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * dup_row + at, dup_at.to(dup.dtype.element_ty), mask=inside)
