"""A Mamba-2 layer between its projections on a GPU: the kernels of its parts, as one operator.

What `in_proj` and the scan gave is kept for the gradients. The convolution is made again, and so is what `out_proj`
reads, by the kernel that finds the gradients of the norm. All gradients of `[z | x | B | C | dt]` are written where
they belong in one tensor, which nobody has to join.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.core.packing import Packing
from everstate.ops.conv1d import triton as conv1d
from everstate.ops.mamba2.ends import Mamba2Layer, Mamba2State
from everstate.ops.ssd.triton import BLOCK_H, Call
from everstate.ops.triton_common import LOG2E, softplus
from everstate.ops.triton_ends import leave, leave_gradients
from everstate.ops.triton_launch import cdiv, launch
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_rows import dense
from everstate.ops.triton_segments import CHUNK
from everstate.ops.triton_sums import total


def mamba2_scan(
    projected: Float[Tensor, "b l w"],
    state: Mamba2State,
    delta_t: None = None,
    *,
    layer: Mamba2Layer,
    out_proj: Float[Tensor, "d e"] | None = None,
    packing: Packing | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Float[Tensor, "b l d"], Mamba2State]:
    """See `everstate.ops.mamba2_scan`. `chunk_size` is the business of other implementations."""
    if packing is not None:
        packing.check(projected.shape[0], projected.shape[1], state.conv.shape[0])
    low, high = map(float, layer.dt_limit)
    ends = [] if packing is None else list(packing.cu_seqlens)
    out, conv, ssm, _ = _scan(
        projected, state.conv, state.ssm.to(torch.float32), *layer[:6], out_proj, *layer[6:9], low, high, ends
    )
    return out, Mamba2State(conv, ssm)


@kernel_op("mamba2_scan")
@replayed
def _scan(
    projected: Tensor, conv: Tensor, ssm: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor,
    A_log: Tensor, D: Tensor, scale: Tensor | None, out_proj: Tensor | None, ngroups: int, before: bool, eps: float,
    low: float, high: float, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The outputs, the last inputs of the convolution, the final states, and y of the scan."""
    given = _Parts(projected, conv_weight, dt_bias)
    convolved, last = conv1d.convolve(given.xBC, conv_weight, conv_bias, conv, ends, True)
    call = _call(convolved, ssm, D, ngroups, ends)
    _weigh(call, given.dt, dt_bias, A_log, low, high)
    y, final = call.scan(ssm)
    y = y.flatten(2)
    return leave(y, given.z, scale, out_proj, eps, ngroups, before), last, final, y


@_scan.register_fake
def _(
    projected: Tensor, conv: Tensor, ssm: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor,
    A_log: Tensor, D: Tensor, scale: Tensor | None, out_proj: Tensor | None, ngroups: int, before: bool, eps: float,
    low: float, high: float, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    channels, taps = conv_weight.shape
    y = projected.new_empty(*projected.shape[:2], ssm.shape[1] * ssm.shape[2])
    last = conv.new_empty(conv.shape[0], channels, taps - 1, dtype=torch.float32)
    out = torch.empty_like(y) if out_proj is None else y.new_empty(*y.shape[:2], len(out_proj))
    return out, last, torch.empty_like(ssm), y


@kernel_op("mamba2_scan_backward")
@replayed
def _backward(
    dout: Tensor, dlast: Tensor | None, dfinal: Tensor | None, y: Tensor, projected: Tensor, conv: Tensor, ssm: Tensor,
    conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor, scale: Tensor | None,
    out_proj: Tensor | None, ngroups: int, before: bool, eps: float, low: float, high: float, ends: Sequence[int],
    wanted: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of projected, ssm, conv_weight, dt_bias, A_log, D, then those of conv_bias, of conv if it is wanted
    (as `(seqs, k1, d)`), of scale and of out_proj, as far as there are such."""
    given = _Parts(projected, conv_weight, dt_bias)
    dprojected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    wants = _Parts(dprojected, conv_weight, dt_bias)
    dy, dscale, dout_proj = leave_gradients(dout, y, given.z, scale, out_proj, eps, ngroups, before, wants.z)
    convolved, _ = conv1d.convolve(given.xBC, conv_weight, conv_bias, conv, ends, True)
    call = _call(convolved, ssm, D, ngroups, ends)
    _weigh(call, given.dt, dt_bias, A_log, low, high)
    dconvolved = torch.empty_like(convolved)
    into = _inputs(dconvolved, ssm, ngroups)
    found = call.gradients(dy.view(into[0].shape), torch.zeros_like(ssm) if dfinal is None else dfinal, ssm, into)
    ddt_bias, dA_log = _step_gradients(call, found.a, found.s, given.dt, dt_bias, A_log, low, high, wants.dt)
    dweight, *rest = conv1d.differentiate(
        dconvolved, dlast, given.xBC, conv_weight, conv_bias, conv, ends, True, wanted, wants.xBC
    )  # fmt: skip
    assert found.D is not None
    given_too = [t for t in (dscale, dout_proj) if t is not None]
    return [dprojected, found.state, dweight, ddt_bias, dA_log, found.D.to(D.dtype), *rest, *given_too]


@_backward.register_fake
def _(
    dout: Tensor, dlast: Tensor | None, dfinal: Tensor | None, y: Tensor, projected: Tensor, conv: Tensor, ssm: Tensor,
    conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor, scale: Tensor | None,
    out_proj: Tensor | None, ngroups: int, before: bool, eps: float, low: float, high: float, ends: Sequence[int],
    wanted: bool,
) -> list[Tensor]:  # fmt: skip
    dconv = conv.new_empty(conv.shape[0], conv_weight.shape[1] - 1, conv_weight.shape[0]) if wanted else None
    order = (projected, ssm, conv_weight, dt_bias, A_log, D, conv_bias)
    given = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in order if t is not None]
    return [*given, *(torch.empty_like(t) for t in (dconv, scale, out_proj) if t is not None)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3], *inputs[:10])
    ctx.settings = inputs[10:]
    ctx.set_materialize_grads(False)  # final states rarely have one


def _differentiate(
    ctx: Any, dout: Tensor | None, dlast: Tensor | None, dfinal: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    y, projected, *parameters = ctx.saved_tensors
    conv_bias, scale, out_proj = parameters[3], parameters[7], parameters[8]
    wanted = ctx.needs_input_grad[1]
    if dout is None:
        dout = y.new_zeros(*y.shape[:2], y.shape[2] if out_proj is None else len(out_proj))
    gradients = _backward(dout, dlast, dfinal, y, projected, *parameters, *ctx.settings, wanted)
    dprojected, dssm, dweight, ddt_bias, dA_log, dD, *others = gradients
    rest = iter(others)
    dbias = None if conv_bias is None else next(rest)
    dconv = next(rest).transpose(1, 2) if wanted else None
    dscale = None if scale is None else next(rest)
    dout_proj = None if out_proj is None else next(rest)
    return dprojected, dconv, dssm, dweight, dbias, ddt_bias, dA_log, dD, dscale, dout_proj, *([None] * 6)


_scan.register_autograd(_differentiate, setup_context=_save)


class _Parts:
    """Views of what `in_proj` gave, or of the gradient of that."""

    def __init__(self, projected: Float[Tensor, "b l w"], conv_weight: Tensor, dt_bias: Tensor) -> None:
        projected = dense(projected)
        heads, channels = dt_bias.shape[0], conv_weight.shape[0]
        self.z, self.xBC, self.dt = projected.split([projected.shape[2] - channels - heads, channels, heads], 2)


def _inputs(xBC: Float[Tensor, "b l d"], ssm: Float[Tensor, "seqs h p n"], ngroups: int) -> list[Tensor]:
    """x `(b, l, h, p)`, B and C `(b, l, g, n)`, as views."""
    batch, length, channels = xBC.shape
    _, heads, headdim, d_state = ssm.shape
    rows, inner, width = (length * channels, channels), heads * headdim, ngroups * d_state
    at = xBC.storage_offset()
    shapes = ((heads, headdim), at), ((ngroups, d_state), at + inner), ((ngroups, d_state), at + inner + width)
    return [xBC.as_strided((batch, length, *each), (*rows, each[1], 1), start) for each, start in shapes]


def _call(convolved: Float[Tensor, "b l d"], ssm: Tensor, D: Tensor, ngroups: int, ends: Sequence[int]) -> Call:
    x, B, C = _inputs(convolved, ssm, ngroups)
    return Call(x, B, C, None, D, ends)


def _weigh(
    call: Call, dt: Float[Tensor, "b l h"], dt_bias: Tensor, A_log: Tensor, low: float, high: float
) -> None:  # fmt: skip
    """Make the decays and scales of a scan from what `in_proj` gave."""
    launch(
        _weigh_kernel, (call.layout.chunks, cdiv(call.heads, BLOCK_H)),
        dt, dt_bias, A_log, call.decays, call.scales, call.plan.chunks, dt.shape[1], *dt.stride()[:2], low, high,
        HEADS=call.heads, BLOCK=CHUNK, BLOCK_H=BLOCK_H,
    )  # fmt: skip


def _step_gradients(
    call: Call, da: Tensor, ds: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, low: float, high: float, ddt: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of dt, and return those of dt_bias and A_log."""
    sums = da.new_empty(2, call.layout.chunks, call.heads)
    launch(
        _step_gradients_kernel, (call.layout.chunks, cdiv(call.heads, BLOCK_H)),
        da, ds, dt, dt_bias, A_log, ddt, *sums.unbind(0), call.plan.chunks, dt.shape[1], *dt.stride()[:2],
        *ddt.stride()[:2], low, high, HEADS=call.heads, BLOCK=CHUNK, BLOCK_H=BLOCK_H,
    )  # fmt: skip
    return total(sums[0], dt_bias.dtype), total(sums[1], A_log.dtype)


@triton.jit
def _steps(
    dt, dt_bias, A_log, chunks, length, row, token, low, high,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Of the entries of a chunk and some heads: their tokens and heads, which exist, dt + dt_bias, the step, and A."""
    chunk, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    tokens = tl.load(chunks + 2 * chunk) + at
    exists = (tokens < tl.load(chunks + 2 * chunk + 1))[:, None] & (heads < HEADS)[None, :]
    place = (tokens // length).to(tl.int64) * row + (tokens % length).to(tl.int64) * token
    raw = tl.load(dt + place[:, None] + heads[None, :], mask=exists, other=0.0).to(tl.float32)
    raw += tl.load(dt_bias + heads, mask=heads < HEADS, other=0.0).to(tl.float32)[None, :]
    A = -tl.exp2(tl.load(A_log + heads, mask=heads < HEADS, other=0.0).to(tl.float32) * LOG2E)
    step = tl.minimum(tl.maximum(softplus(raw), low), high)
    return tokens, heads, exists, raw, step, A


@triton.jit
def _weigh_kernel(
    dt, dt_bias, A_log, decays, scales, chunks, length, row, token, low, high,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per chunk and some heads: sums of log decays since the chunk began, as powers of two, and steps.

    Both are laid out as (chunk, head, entry); what a short chunk does not have keeps the last sum and a step of 0.
    """
    _, heads, exists, _, step, A = _steps(
        dt, dt_bias, A_log, chunks, length, row, token, low, high, HEADS, BLOCK, BLOCK_H
    )
    step = tl.where(exists, step, 0.0)
    out = (tl.program_id(0).to(tl.int64) * HEADS + heads)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    mine = (heads < HEADS)[None, :]
    tl.store(decays + out, tl.cumsum(step * A[None, :], 0) * LOG2E, mask=mine)
    tl.store(scales + out, step, mask=mine)


@triton.jit
def _step_gradients_kernel(
    da, ds, dt, dt_bias, A_log, ddt, dbias, drate, chunks, length, row, token, ddt_row, ddt_token, low, high,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per chunk and some heads: the gradient of dt, and the chunk's part of those of dt_bias and A_log."""
    tokens, heads, exists, raw, step, A = _steps(
        dt, dt_bias, A_log, chunks, length, row, token, low, high, HEADS, BLOCK, BLOCK_H
    )  # fmt: skip
    given = tokens.to(tl.int64)[:, None] * HEADS + heads[None, :]
    decayed = tl.load(da + given, mask=exists, other=0.0) * A[None, :]
    slope = (tl.load(ds + given, mask=exists, other=0.0) + decayed) * (1.0 / (1.0 + tl.exp2(-raw * LOG2E)))
    free = softplus(raw)
    slope = tl.where((free >= low) & (free <= high), slope, 0.0)
    place = (tokens // length).to(tl.int64) * ddt_row + (tokens % length).to(tl.int64) * ddt_token
    tl.store(ddt + place[:, None] + heads[None, :], slope.to(ddt.dtype.element_ty), mask=exists)
    out = tl.program_id(0).to(tl.int64) * HEADS + heads
    tl.store(dbias + out, tl.sum(slope, 0), mask=heads < HEADS)
    tl.store(drate + out, tl.sum(decayed * step, 0), mask=heads < HEADS)
