"""The gated activation on a GPU: each number read and written once, forward and backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.ops.activations import Activation
from everstate.ops.triton_rows import dense

BLOCK = 1024
"""Numbers of one program."""


def glu(h: Float[Tensor, "*b f2"], activation: Activation = "silu") -> Float[Tensor, "*b f"]:
    """See `everstate.ops.glu`."""
    return _glu(h, activation == "silu")


@kernel_op("glu")
def _glu(h: Tensor, silu: bool) -> Tensor:
    rows = dense(h.flatten(0, -2))
    y = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
    width = y.shape[-1]
    _glu_kernel[(len(rows), triton.cdiv(width, BLOCK))](rows, y, rows.stride(0), width, SILU=silu, BLOCK=BLOCK)
    return y


@_glu.register_fake
def _(h: Tensor, silu: bool) -> Tensor:
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


@kernel_op("glu_backward")
def _backward(dy: Tensor, h: Tensor, silu: bool) -> Tensor:
    rows, upstream = dense(h.flatten(0, -2)), dense(dy.flatten(0, -2))
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    width = dy.shape[-1]
    _backward_kernel[(len(rows), triton.cdiv(width, BLOCK))](
        upstream, rows, dh, upstream.stride(0), rows.stride(0), width, SILU=silu, BLOCK=BLOCK
    )
    return dh


@_backward.register_fake
def _(dy: Tensor, h: Tensor, silu: bool) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.silu = inputs[1]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _backward(dy, *ctx.saved_tensors, ctx.silu), None


_glu.register_autograd(_differentiate, setup_context=_save)


@triton.jit
def _load(base, row, stride, column, inside):
    return tl.load(base + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _glu_kernel(h, y, h_row, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and block of columns."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up = _load(h, row, h_row, at, inside), _load(h, row, h_row, width + at, inside)
    act = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0)
    if SILU:
        act = gate * tl.sigmoid(gate)
    tl.store(y + row * width + at, (act * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dy, h, dh, dy_row, h_row, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and block of columns, which holds both gradients."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up = _load(h, row, h_row, at, inside), _load(h, row, h_row, width + at, inside)
    upstream = _load(dy, row, dy_row, at, inside)
    if SILU:
        open_part = tl.sigmoid(gate)
        act = gate * open_part
        slope = open_part * (1.0 + gate * (1.0 - open_part))
    else:
        positive = tl.maximum(gate, 0.0)
        act = positive * positive
        slope = 2.0 * positive
    out = dh + row * 2 * width + at
    tl.store(out, (upstream * up * slope).to(dh.dtype.element_ty), mask=inside)
    tl.store(out + width, (upstream * act).to(dh.dtype.element_ty), mask=inside)
