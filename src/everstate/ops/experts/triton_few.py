"""The experts of few rows on a GPU in two launches: each row reads the weights of its expert by itself, which is all
there is to read. A shared expert, and a residual stream with the norm behind it, are in the same launches."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.ops.activations import Activation
from everstate.ops.linear.composed import add_and_norm
from everstate.ops.linear.limits import divides
from everstate.ops.norm.normed import Normed, as_normed
from everstate.ops.triton_activations import act
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import dense, follow_last, halved, launch_options, piece_of, rstd_of

TOGETHER: tl.constexpr = tl.constexpr(4)
"""Turns of a loop whose weights are asked for at once."""
GEMV = 4096
"""Numbers of a matrix that a program has on their way at once."""


def few(
    x: Normed, weights: Float[Tensor, "t k"], indices: Int[Tensor, "t k"], w_in: Float[Tensor, "e f2 d"],
    w_out: Float[Tensor, "e d f"], activation: Activation, gated: bool,
) -> Float[Tensor, "t d"]:  # fmt: skip
    """`experts` of a few rows."""
    return _few(*x, weights, indices, w_in, w_out, None, None, activation, gated, None, None, 1.0)[0]


def experts_add_rms_norm(
    x: Float[Tensor, "t d"] | Normed,
    weights: Float[Tensor, "t k"],
    indices: Int[Tensor, "t k"],
    w_in: Float[Tensor, "e f2 d"],
    w_out: Float[Tensor, "e d f"],
    residual: Float[Tensor, "t d"],
    norm: Float[Tensor, " d"],
    *,
    shared: tuple[Float[Tensor, "s2 d"], Float[Tensor, "d s"]] | None = None,
    activation: Activation = "silu",
    gated: bool = True,
    eps: float = 1e-5,
    multiplier: float = 1.0,
) -> tuple[Float[Tensor, "t d"], Normed]:
    """See `everstate.ops.experts_add_rms_norm`."""
    whole = as_normed(x)
    rows = whole.x
    given = (*whole, weights, indices, w_in, w_out, *(shared or (None, None)), activation, gated)
    if not divides(len(rows), rows.shape[1], _blocks(rows, w_out), rows.dtype, rows.device):
        return add_and_norm(_few(*given, None, None, 1.0)[0], None, residual, norm, eps, multiplier)
    y, summed, squares = _few(*given, residual, norm, multiplier)
    return summed, Normed(y, squares, eps)


@kernel_op("experts_few")
def _few(
    x: Tensor, squares: Tensor | None, eps: float, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor,
    shared_in: Tensor | None, shared_out: Tensor | None, activation: str, gated: bool, residual: Tensor | None,
    norm: Tensor | None, multiplier: float,
) -> list[Tensor]:  # fmt: skip
    """y; or with a residual stream the rows of its norm, the new stream, and the sums of squares of blocks of it."""
    written = _written(x, w_out, residual)
    if x.shape[0] == 0:
        return written
    x, weights, indices, w_in, w_out = (dense(t) for t in (x, weights, indices, w_in, w_out))
    hidden = _up(Normed(x, squares, eps), indices, w_in, shared_in, w_out.shape[2], activation, gated)
    stream = None if residual is None else residual.contiguous()
    _down(hidden, weights, indices, w_out, shared_out, stream, norm, multiplier, written)
    return written


@_few.register_fake
def _(
    x: Tensor, squares: Tensor | None, eps: float, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor,
    shared_in: Tensor | None, shared_out: Tensor | None, activation: str, gated: bool, residual: Tensor | None,
    norm: Tensor | None, multiplier: float,
) -> list[Tensor]:  # fmt: skip
    return _written(x, w_out, residual)


def _written(x: Float[Tensor, "t d"], w_out: Tensor, residual: Float[Tensor, "t d"] | None) -> list[Tensor]:
    """Memory for what the kernels write."""
    y = x.new_empty(x.shape)
    if residual is None:
        return [y]
    summed = residual.new_empty(residual.shape, dtype=torch.promote_types(residual.dtype, y.dtype))
    return [y, summed, x.new_empty(x.shape[0], _blocks(x, w_out), dtype=torch.float32)]


def _blocks(x: Float[Tensor, "t d"], w_out: Tensor) -> int:
    """Among how many programs the channels of a token are shared out."""
    tokens, width = x.shape
    return cdiv(width, _tile(w_out.shape[2], tokens, width, x.device)["BLOCK_N"])


def _tile(summed: int, pairs: int, rows: int, device: torch.device) -> dict[str, int]:
    """How many columns and rows of a matrix a program reads at once, fewer rows to fill the GPU."""
    block_k = piece_of(summed, 1024, least=256, part=6)
    block_n = max(GEMV // block_k, 1)
    return {"BLOCK_N": halved(block_n, rows, pairs, 4 * processors(device), least=1), "BLOCK_K": block_k}


def _up(
    x: Normed, indices: Tensor, w_in: Tensor, shared_in: Tensor | None, d_hidden: int, activation: str, gated: bool
) -> Float[Tensor, "t hidden"]:
    """The activations of each token, `top_k f + s` of them: of its experts, best first, and of the shared one."""
    (tokens, width), top_k = x.x.shape, indices.shape[1]
    shared = 0 if shared_in is None else len(shared_in) // (1 + gated)
    hidden = x.x.new_empty(tokens, top_k * d_hidden + shared, dtype=torch.float32)
    tile, parts = _tile(width, tokens * top_k, d_hidden, x.x.device), 0 if x.squares is None else x.squares.shape[1]
    routed = tokens * top_k * cdiv(d_hidden, tile["BLOCK_N"])
    beside = w_in if shared_in is None else shared_in
    launch(
        _few_up_kernel, (routed + tokens * cdiv(shared, tile["BLOCK_N"]),),
        x.x, x.squares, indices, w_in, beside, hidden, x.x.stride(0), parts, x.eps, indices.stride(0),
        *w_in.stride()[:2], routed, PARTS=power_of_2(max(parts, 1)), TOP_K=top_k, D=width, F=d_hidden, SHARED=shared,
        ACTIVATION=activation, GATED=gated, **tile, num_warps=4, **launch_options(x.x.device),
    )  # fmt: skip
    return hidden


def _down(
    hidden: Float[Tensor, "t hidden"], weights: Tensor, indices: Tensor, w_out: Tensor, shared_out: Tensor | None,
    stream: Tensor | None, norm: Tensor | None, multiplier: float, written: list[Tensor],
) -> None:  # fmt: skip
    """What the experts of each token make of its activations, and what is behind that."""
    (tokens, top_k), (width, d_hidden) = indices.shape, w_out.shape[1:]
    tile = _tile(d_hidden, tokens, width, w_out.device)
    y, summed, squares = written if stream is not None else (*written, None, None)
    launch(
        _few_down_kernel, (tokens, cdiv(width, tile["BLOCK_N"])),
        hidden, weights, indices, w_out, shared_out, stream, norm, y, summed, squares, multiplier, weights.stride(0),
        indices.stride(0), *w_out.stride()[:2], TOP_K=top_k, D=width, F=d_hidden,
        SHARED=0 if shared_out is None else shared_out.shape[1], **tile, num_warps=4, **launch_options(w_out.device),
    )  # fmt: skip


@triton.jit
def _few_up_kernel(
    x, squares, indices, w_in, shared_in, hidden, x_row, parts, eps, i_token, w_expert, w_row, routed,
    PARTS: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per token, one of its experts or the shared one, and some hidden channels."""
    follow_last(OVERLAP)
    shared = tl.program_id(0) >= routed
    of = tl.where(shared, tl.program_id(0) - routed, tl.program_id(0))
    width = tl.where(shared, SHARED, F)
    across = (width + BLOCK_N - 1) // BLOCK_N
    row, n, k = of // across, of % across * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    token, place = tl.where(shared, row, row // TOP_K).to(tl.int64), tl.where(shared, TOP_K, row % TOP_K)
    expert = tl.load(indices + token * i_token + place, mask=place < TOP_K, other=0).to(tl.int64)
    step = tl.where(shared, D, w_row)
    b = tl.where(shared, shared_in, w_in + expert * w_expert) + tl.minimum(n, width - 1)[:, None] * step + k[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = gate
    for start in tl.range(0, D, BLOCK_K, loop_unroll_factor=TOGETHER):
        u = tl.load(x + token * x_row + start + k, mask=start + k < D, other=0.0).to(tl.float32)[None, :]
        gate += u * tl.load(b + start, mask=(start + k < D)[None, :], other=0.0).to(tl.float32)
        if GATED:
            up += u * tl.load(b + width * step + start, mask=(start + k < D)[None, :], other=0.0).to(tl.float32)
    rstd = 1.0 if squares is None else rstd_of(squares, token, parts, eps, D, PARTS)
    active = act(tl.sum(gate, 1) * rstd, ACTIVATION)
    if GATED:
        active = active * (tl.sum(up, 1) * rstd)
    tl.store(hidden + token * (TOP_K * F + SHARED) + place * F + n, active, mask=n < width)


@triton.jit
def _few_down_kernel(
    hidden, weights, indices, w_out, shared_out, stream, norm, y, summed, squares, multiplier,
    w_token, i_token, w_expert, w_row, TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per token and some channels of y, with all experts of the token."""
    follow_last(OVERLAP)
    token, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = hidden + token * (TOP_K * F + SHARED) + k
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in tl.range(0, TOP_K, loop_unroll_factor=TOGETHER):
        expert = tl.load(indices + token * i_token + i).to(tl.int64)
        share = tl.load(weights + token * w_token + i).to(tl.float32)
        b = w_out + expert * w_expert + (n % D)[:, None] * w_row + k[None, :]
        for start in range(0, F, BLOCK_K):
            h = tl.load(own + i * F + start, mask=start + k < F, other=0.0)
            acc += (h * share)[None, :] * tl.load(b + start, mask=(start + k < F)[None, :], other=0.0).to(tl.float32)
    if SHARED > 0:
        b = shared_out + (n % D)[:, None] * SHARED + k[None, :]
        for start in tl.range(0, SHARED, BLOCK_K, loop_unroll_factor=TOGETHER):
            h = tl.load(own + TOP_K * F + start, mask=start + k < SHARED, other=0.0)
            acc += h[None, :] * tl.load(b + start, mask=(start + k < SHARED)[None, :], other=0.0).to(tl.float32)
    out = tl.sum(acc, 1)
    if stream is not None:
        before = tl.load(stream + token * D + n, mask=n < D, other=0.0).to(tl.float32)
        total = (before + out * multiplier).to(summed.dtype.element_ty)
        tl.store(summed + token * D + n, total, mask=n < D)
        out = tl.where(n < D, total.to(tl.float32), 0.0)
        tl.store(squares + token * tl.num_programs(1) + tl.program_id(1), tl.sum(out * out, 0))
        out = out * tl.load(norm + n, mask=n < D, other=0.0).to(tl.float32)
    tl.store(y + token * D + n, out.to(y.dtype.element_ty), mask=n < D)
