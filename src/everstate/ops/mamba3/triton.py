"""A Mamba-3 layer between its projections on a GPU: the kernels of its parts, for one rank as one operator.

What stands before the scan is one pass over what `in_proj` gives, forward and backward: made of single operations it is
some twenty launches of a few microseconds. Of one rank, all gradients of `[z | x | B | C | dt | A | lam | omega]` are
written where they belong in one tensor, which nobody has to join, and what `out_proj` reads is not kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from everstate.core.kernels import kernel_op, processors
from everstate.core.packing import Packing
from everstate.ops import triton_ends
from everstate.ops.glu import gated
from everstate.ops.mamba3.ends import Mamba3Layer, leave
from everstate.ops.mamba3.triton_step import PI, heavy_tail, tanh
from everstate.ops.norm import gated_rms_norm
from everstate.ops.trapezoid import TrapezoidState, trapezoid_scan
from everstate.ops.trapezoid.limits import refusal_of_heads
from everstate.ops.trapezoid.triton import Call, phases_and_kept
from everstate.ops.trapezoid.triton_values import Arguments
from everstate.ops.triton_common import softplus
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_rows import dense, dense_rows
from everstate.ops.triton_sums import total

TOKENS = 8
"""Of a program at a time: their numbers are few, their B and C some kilobytes."""

PROGRAMS = 8
"""Per multiprocessor, backwards."""

Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""dt, A, lam, omega, B and C."""


def mamba3_scan(
    projected: Float[Tensor, "b l w"],
    state: TrapezoidState,
    delta_t: Float[Tensor, "b l"] | None = None,
    *,
    layer: Mamba3Layer,
    out_proj: Float[Tensor, "d e"] | None = None,
    packing: Packing | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b l d"], TrapezoidState]:
    """See `everstate.ops.mamba3_scan`. `chunk_size` is for where the scan is not served by kernels."""
    if packing is not None:
        packing.check(projected.shape[0], projected.shape[1], state.ssm.shape[0])
    sizes = state.x.shape[-1], state.ssm.shape[-1], state.angle.shape[-1]
    several = layer.B_bias.shape[1] > 1 or any(t is not None for t in (layer.mimo_x, layer.mimo_z, layer.mimo_o))
    if several or delta_t is not None or refusal_of_heads(*sizes, projected) is not None:
        return _in_parts(projected, state, delta_t, layer, out_proj, packing, chunk_size)
    heavy, ends = layer.A_activation == "heavy_tail", [] if packing is None else list(packing.cu_seqlens)
    out, ssm, k, last, angle, *_ = _scan(
        projected, *(t.to(torch.float32) for t in state), *layer[:6], layer.norm, out_proj, layer.ngroups,
        layer.interleaved, heavy, layer.A_floor, layer.norm_eps, ends,
    )  # fmt: skip
    return out, TrapezoidState(ssm, k, last, angle)


def _in_parts(
    projected: Float[Tensor, "b l w"], state: TrapezoidState, delta_t: Float[Tensor, "b l"] | None,
    layer: Mamba3Layer, out_proj: Float[Tensor, "d e"] | None, packing: Packing | None, chunk_size: int,
) -> tuple[Float[Tensor, "b l d"], TrapezoidState]:  # fmt: skip
    """The same as an operator for each part."""
    (heads, rank, d_state), headdim, pairs = layer.B_bias.shape, state.x.shape[-1], state.angle.shape[-1]
    z, x, rest = _split(projected, heads * headdim)
    dt, A, lam, omega, B, C = _enter(
        rest, layer.dt_bias, layer.B_norm, layer.C_norm, pairs, layer.A_activation == "heavy_tail", layer.A_floor,
        layer.norm_eps,
    )  # fmt: skip
    if delta_t is not None:
        dt = dt * delta_t.unsqueeze(-1)
    B, C = (t.unflatten(-1, (rank, layer.ngroups, d_state)) for t in (B, C))
    y, state = trapezoid_scan(
        x.unflatten(-1, (heads, headdim)), dt, A, lam, omega, B, C, state, B_bias=layer.B_bias, C_bias=layer.C_bias,
        mimo_x=layer.mimo_x, D=layer.D, interleaved=layer.interleaved, packing=packing, chunk_size=chunk_size,
    )  # fmt: skip
    out = leave(y, z, layer, gated, gated_rms_norm)
    return out if out_proj is None else linear(out, out_proj.to(out.dtype)), state


@kernel_op("mamba3_scan")
@replayed
def _scan(
    projected: Tensor, ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor, scale: Tensor | None,
    out_proj: Tensor | None, ngroups: int, interleaved: bool, heavy: bool, floor: float, eps: float,
    ends: Sequence[int],
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """The outputs and the four parts of the final state; and what backward asks for: y of the scan, `Call.phases` and
    `Call.kept`, and what the scan reads besides x."""
    heads, projected = len(dt_bias), dense(projected)
    z, x, rest = _split(projected, heads * last.shape[2])
    made = enter(rest, dt_bias, B_norm, C_norm, angle.shape[2], heavy, floor, eps)
    call = _call(x, made, (ssm, k, last, angle), B_bias, C_bias, D, ngroups, interleaved, ends)
    y, final, final_angle = call.scan()
    y = y.view(x.shape)
    out = triton_ends.leave(y, z, scale, out_proj, eps, heads, True)
    return out, final, *call.leave(final_angle), final_angle, y, call.phases, call.kept, *made


@_scan.register_fake
def _(
    projected: Tensor, ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor, scale: Tensor | None,
    out_proj: Tensor | None, ngroups: int, interleaved: bool, heavy: bool, floor: float, eps: float,
    ends: Sequence[int],
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    _, x, rest = _split(projected, len(dt_bias) * last.shape[2])
    y, made = x.new_empty(x.shape), _made(rest, dt_bias, angle.shape[2])
    out = torch.empty_like(y) if out_proj is None else y.new_empty(*y.shape[:2], len(out_proj))
    empty = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)
    state = empty(ssm), empty(k), empty(last), empty(angle)
    given = _arguments(x, made, (ssm, k, last, angle), B_bias, C_bias, D, ngroups)
    return out, *state, y, *phases_and_kept(given, ends), *made


@kernel_op("mamba3_scan_backward")
@replayed
def _backward(
    dout: Tensor, dssm: Tensor | None, dk: Tensor | None, dlast: Tensor | None, dangle: Tensor | None,
    y: Tensor, phases: Tensor, kept: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    projected: Tensor, ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor, scale: Tensor | None,
    out_proj: Tensor | None, ngroups: int, interleaved: bool, heavy: bool, floor: float, eps: float,
    ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of all tensors from `projected` on that are given, in their order."""
    heads, projected = len(dt_bias), dense(projected)
    z, x, rest = _split(projected, heads * last.shape[2])
    dprojected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    dz, dx, drest = _split(dprojected, heads * last.shape[2])
    dy, dscale, dout_proj = triton_ends.leave_gradients(dout, y, z, scale, out_proj, eps, heads, True, dz)
    made = (dt, A, lam, omega, B, C)
    call = _call(x, made, (ssm, k, last, angle), B_bias, C_bias, D, ngroups, interleaved, ends, phases, kept)
    into = dx.flatten(0, 1).unflatten(-1, (heads, -1))
    found = call.gradients(dy.view(*dy.shape[:2], 1, heads, -1), dssm, dk, dlast, dangle, into)
    given = [t for t in found if t is not None]  # all but that of mimo_x
    upstream = tuple(t.reshape(m.shape) for t, m in zip(given[1:7], made, strict=True))
    of_entering = enter_gradients(upstream, rest, dt_bias, B_norm, C_norm, angle.shape[2], heavy, floor, eps, drest)
    others = [t.to(m.dtype) for t, m in zip(given[7:], (ssm, k, last, angle, B_bias, C_bias, D), strict=True)]
    after = [t for t in (dscale, dout_proj) if t is not None]
    return [dprojected, *others[:4], *of_entering, *others[4:], *after]


@_backward.register_fake
def _(
    dout: Tensor, dssm: Tensor | None, dk: Tensor | None, dlast: Tensor | None, dangle: Tensor | None,
    y: Tensor, phases: Tensor, kept: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    projected: Tensor, ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, B_bias: Tensor, C_bias: Tensor, D: Tensor, scale: Tensor | None,
    out_proj: Tensor | None, ngroups: int, interleaved: bool, heavy: bool, floor: float, eps: float,
    ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    given = (projected, ssm, k, last, angle, dt_bias, B_norm, C_norm, B_bias, C_bias, D, scale, out_proj)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[5:], *inputs[:13])
    ctx.settings = inputs[13:]
    ctx.set_materialize_grads(False)  # final states rarely have one


def _differentiate(
    ctx: Any, dout: Tensor | None, dssm: Tensor | None, dk: Tensor | None, dlast: Tensor | None, dangle: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    saved = ctx.saved_tensors
    y, out_proj = saved[0], saved[-1]
    if dout is None:
        dout = y.new_zeros(*y.shape[:2], y.shape[2] if out_proj is None else len(out_proj))
    grads = iter(_backward(dout, dssm, dk, dlast, dangle, *saved, *ctx.settings))
    return *(None if t is None else next(grads) for t in saved[9:]), *([None] * 6)


_scan.register_autograd(_differentiate, setup_context=_save)


def _split(projected: Float[Tensor, "b l w"], inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, x, and `[B | C | dt | A | lam | omega]`, as views."""
    z, x, rest = projected.split([inner, inner, projected.shape[-1] - 2 * inner], -1)
    return z, x, rest


def _arguments(
    x: Float[Tensor, "b l e"], made: Made, state: tuple[Tensor, Tensor, Tensor, Tensor], B_bias: Tensor,
    C_bias: Tensor, D: Tensor, ngroups: int,
) -> Arguments:  # fmt: skip
    """Those of the trapezoid."""
    each = (1, ngroups, B_bias.shape[2])
    dt, A, lam, omega, B, C = made
    B, C, x = B.unflatten(-1, each), C.unflatten(-1, each), x.unflatten(-1, (len(D), -1))
    return Arguments(x, dt, A, lam, omega, B, C, *state, B_bias, C_bias, None, D)


def _call(
    x: Float[Tensor, "b l e"], made: Made, state: tuple[Tensor, Tensor, Tensor, Tensor], B_bias: Tensor,
    C_bias: Tensor, D: Tensor, ngroups: int, interleaved: bool, ends: Sequence[int], phases: Tensor | None = None,
    kept: Tensor | None = None,
) -> Call:  # fmt: skip
    return Call(_arguments(x, made, state, B_bias, C_bias, D, ngroups), interleaved, ends, phases, kept)


def enter(
    rest: Tensor, dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, pairs: int, heavy: bool, floor: float, eps: float
) -> Made:
    """dt, A, lam, omega, B and C of `[B | C | dt | A | lam | omega]`."""
    rows, made = dense_rows(rest), _made(rest, dt_bias, pairs)
    launch(
        _enter_kernel, (cdiv(len(rows), TOKENS),),
        rows, dt_bias, B_norm, C_norm, *made, len(rows), rows.stride(0), floor, eps,
        **_sizes(rest, dt_bias, B_norm, pairs), HEAVY=heavy,
    )  # fmt: skip
    return made


def enter_gradients(
    upstream: tuple[Tensor, ...], rest: Tensor, dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, pairs: int,
    heavy: bool, floor: float, eps: float, drest: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of dt_bias, B_norm and C_norm; those of rest are written into `drest`, whose rows are dense."""
    rows, given = dense_rows(rest), [t.contiguous() for t in upstream]
    programs, into = min(cdiv(len(rows), TOKENS), PROGRAMS * processors(rest.device)), drest.flatten(0, 1)
    heads, d_state = len(dt_bias), len(B_norm)
    sums = [torch.empty((programs, n), dtype=torch.float32, device=rest.device) for n in (heads, d_state, d_state)]
    launch(
        _backward_kernel, (programs,),
        *given, rows, dt_bias, B_norm, C_norm, into, *sums, len(rows), rows.stride(0), into.stride(0), floor, eps,
        **_sizes(rest, dt_bias, B_norm, pairs), HEAVY=heavy,
    )  # fmt: skip
    dbias, dB_norm, dC_norm = (total(s, t.dtype) for s, t in zip(sums, (dt_bias, B_norm, C_norm), strict=True))
    return dbias, dB_norm, dC_norm


_enter = kernel_op("mamba3_enter")(replayed(enter))


@_enter.register_fake
def _(
    rest: Tensor, dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, pairs: int, heavy: bool, floor: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _made(rest, dt_bias, pairs)


@kernel_op("mamba3_enter_backward")
@replayed
def _enter_backward(
    ddt: Tensor, dA: Tensor, dlam: Tensor, domega: Tensor, dB: Tensor, dC: Tensor,
    rest: Tensor, dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, pairs: int, heavy: bool, floor: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rest, dt_bias, B_norm and C_norm."""
    drest = torch.empty_like(rest, memory_format=torch.contiguous_format)
    upstream = ddt, dA, dlam, domega, dB, dC
    return drest, *enter_gradients(upstream, rest, dt_bias, B_norm, C_norm, pairs, heavy, floor, eps, drest)


@_enter_backward.register_fake
def _(
    ddt: Tensor, dA: Tensor, dlam: Tensor, domega: Tensor, dB: Tensor, dC: Tensor,
    rest: Tensor, dt_bias: Tensor, B_norm: Tensor, C_norm: Tensor, pairs: int, heavy: bool, floor: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    drest, dbias, dB_norm, dC_norm = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (rest, dt_bias, B_norm, C_norm)
    )
    return drest, dbias, dB_norm, dC_norm


def _save_entered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _differentiate_entered(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    return *_enter_backward(*upstream, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_enter.register_autograd(_differentiate_entered, setup_context=_save_entered)


def _made(rest: Tensor, dt_bias: Tensor, pairs: int) -> Made:
    """Memory for the outputs."""
    shape, heads = rest.shape[:2], len(dt_bias)
    width = (rest.shape[2] - 3 * heads - pairs) // 2
    numbers = lambda n: torch.empty((*shape, n), dtype=torch.float32, device=rest.device)
    vectors = lambda: torch.empty((*shape, width), dtype=rest.dtype, device=rest.device)
    return numbers(heads), numbers(heads), numbers(heads), numbers(pairs), vectors(), vectors()


def _sizes(rest: Tensor, dt_bias: Tensor, B_norm: Tensor, pairs: int) -> dict[str, int]:
    heads, d_state = len(dt_bias), len(B_norm)
    return {
        "HEADS": heads, "PAIRS": pairs, "N": d_state, "VECTORS": (rest.shape[2] - 3 * heads - pairs) // (2 * d_state),
        "TOKENS": TOKENS, "BLOCK_H": power_of_2(heads), "BLOCK_S": power_of_2(pairs), "BLOCK_N": power_of_2(d_state),
    }  # fmt: skip


@triton.jit
def _load(base, token, stride, column, inside):
    return tl.load(base + token[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base, token, width, column, value, inside):
    tl.store(base + token[:, None] * width + column[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _rate(a, HEAVY: tl.constexpr):
    """-A before its floor, and its derivative."""
    rate, slope = a, a
    if HEAVY:
        rate = heavy_tail(a)
        below = 1.0 / (1.0 + tl.maximum(-a, 0.0))
        slope = tl.where(a >= 0, 1.0, below * below)
    else:
        rate, slope = softplus(a), _sigmoid(a)
    return rate, slope


@triton.jit
def _normalise(source, norm, out, token, stride, n, inside, eps, N: tl.constexpr, VECTORS: tl.constexpr):
    """The norm of each vector of some tokens."""
    scale = tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
    for i in tl.static_range(VECTORS):
        u = _load(source, token, stride, i * N + n, inside)
        rstd = tl.rsqrt(tl.sum(u * u, 1) / N + eps)
        _store(out, token, VECTORS * N, i * N + n, u * rstd[:, None] * scale[None, :], inside)


@triton.jit
def _enter_kernel(
    rows, dt_bias, B_norm, C_norm, dt, A, lam, omega, B, C, tokens, stride, floor, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr, VECTORS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, HEAVY: tl.constexpr,
):  # fmt: skip
    """One program per few tokens."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    h, s, n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N)
    exists = (token < tokens)[:, None]
    numbers, turns, vectors = exists & (h < HEADS)[None, :], exists & (s < PAIRS)[None, :], exists & (n < N)[None, :]
    scalars = rows + 2 * VECTORS * N
    bias = tl.load(dt_bias + h, mask=h < HEADS, other=0.0).to(tl.float32)
    step = softplus(_load(scalars, token, stride, h, numbers) + bias[None, :])
    _store(dt, token, HEADS, h, step, numbers)
    rate, _ = _rate(_load(scalars, token, stride, HEADS + h, numbers), HEAVY)
    _store(A, token, HEADS, h, -tl.maximum(rate, floor), numbers)
    _store(lam, token, HEADS, h, _sigmoid(_load(scalars, token, stride, 2 * HEADS + h, numbers)), numbers)
    _store(omega, token, PAIRS, s, tanh(_load(scalars, token, stride, 3 * HEADS + s, turns)) * PI, turns)
    _normalise(rows, B_norm, B, token, stride, n, vectors, eps, N, VECTORS)
    _normalise(rows + VECTORS * N, C_norm, C, token, stride, n, vectors, eps, N, VECTORS)


@triton.jit
def _vector_gradients(
    d, source, norm, out, summed, token, stride, width, n, inside, eps, N: tl.constexpr, VECTORS: tl.constexpr
):
    """Write the gradients of each vector of some tokens, and add to that of the scale of the norm."""
    scale = tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
    for i in tl.static_range(VECTORS):
        u, upstream = _load(source, token, stride, i * N + n, inside), _load(d, token, VECTORS * N, i * N + n, inside)
        rstd = tl.rsqrt(tl.sum(u * u, 1) / N + eps)[:, None]
        summed += tl.sum(upstream * u * rstd, 0)
        scaled = upstream * scale[None, :]
        along = rstd * rstd * (tl.sum(scaled * u, 1) / N)[:, None]
        _store(out, token, width, i * N + n, rstd * (scaled - u * along), inside)
    return summed


@triton.jit
def _backward_kernel(
    ddt, dA, dlam, domega, dB, dC, rows, dt_bias, B_norm, C_norm, drest, dbias, dB_norm, dC_norm,
    tokens, stride, width, floor, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr, VECTORS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, HEAVY: tl.constexpr,
):  # fmt: skip
    """Every so many tokens, a few at a time; the rows of `drest` are `width` numbers apart."""
    h, s, n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N)
    scalars, dscalars = rows + 2 * VECTORS * N, drest + 2 * VECTORS * N
    bias = tl.load(dt_bias + h, mask=h < HEADS, other=0.0).to(tl.float32)[None, :]
    biases = tl.zeros((BLOCK_H,), tl.float32)
    of_B, of_C = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for first in range(tl.program_id(0) * TOKENS, tokens, tl.num_programs(0) * TOKENS):
        token = first + tl.arange(0, TOKENS).to(tl.int64)
        exists = (token < tokens)[:, None]
        numbers, turns = exists & (h < HEADS)[None, :], exists & (s < PAIRS)[None, :]
        slope = _load(ddt, token, HEADS, h, numbers) * _sigmoid(_load(scalars, token, stride, h, numbers) + bias)
        biases += tl.sum(slope, 0)
        _store(dscalars, token, width, h, slope, numbers)
        rate, of_rate = _rate(_load(scalars, token, stride, HEADS + h, numbers), HEAVY)
        slope = tl.where(rate >= floor, -of_rate, 0.0) * _load(dA, token, HEADS, h, numbers)
        _store(dscalars, token, width, HEADS + h, slope, numbers)
        share = _sigmoid(_load(scalars, token, stride, 2 * HEADS + h, numbers))
        slope = share * (1.0 - share) * _load(dlam, token, HEADS, h, numbers)
        _store(dscalars, token, width, 2 * HEADS + h, slope, numbers)
        part = tanh(_load(scalars, token, stride, 3 * HEADS + s, turns))
        slope = (1.0 - part * part) * PI * _load(domega, token, PAIRS, s, turns)
        _store(dscalars, token, width, 3 * HEADS + s, slope, turns)
        inside = exists & (n < N)[None, :]
        of_B = _vector_gradients(
            dB, rows, B_norm, drest, of_B, token, stride, width, n, inside, eps, N, VECTORS
        )  # fmt: skip
        of_C = _vector_gradients(
            dC, rows + VECTORS * N, C_norm, drest + VECTORS * N, of_C, token, stride, width, n, inside, eps, N, VECTORS
        )  # fmt: skip
    tl.store(dbias + tl.program_id(0) * HEADS + h, biases, mask=h < HEADS)
    tl.store(dB_norm + tl.program_id(0) * N + n, of_B, mask=n < N)
    tl.store(dC_norm + tl.program_id(0) * N + n, of_C, mask=n < N)
