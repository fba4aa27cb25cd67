"""Experts on a GPU: the rows of all experts in one launch per product, without the host knowing how many each has.

A *row* is a token and one of its experts. Rows are sorted by expert on the device; a program finds its expert and rows
in the cumulative counts, and as many programs are launched as there can be tiles at most: the surplus ends at once. The
rows of x are read where they lie, and results are written to where the token will sum them, best expert first.

Few rows are not sorted (`triton_few.py`).

Everything is summed in a fixed order, and nothing in a row depends on the other rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.ops.activations import Activation
from everstate.ops.experts.limits import FEW
from everstate.ops.experts.triton_few import few
from everstate.ops.linear import limits as linear_limits
from everstate.ops.norm.normed import Normed, as_normed
from everstate.ops.triton_activations import act, act_slope
from everstate.ops.triton_common import dot
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import dense, follow_last, launch_options, rstds_of

RANKED = 8192
"""Rows up to which a row counts those before it, which is one launch; more are sorted by PyTorch."""


def experts(
    x: Float[Tensor, "*t d"] | Normed,
    weights: Float[Tensor, "*t k"],
    indices: Int[Tensor, "*t k"],
    w_in: Float[Tensor, "e f2 d"],
    w_out: Float[Tensor, "e d f"],
    *,
    activation: Activation = "silu",
    gated: bool = True,
) -> Float[Tensor, "*t d"]:
    """See `everstate.ops.experts`."""
    x, squares, eps = as_normed(x)
    squares = None if squares is None else squares.flatten(0, -2)
    tokens, shares, chosen = (t.flatten(0, -2) for t in (x, weights, indices))
    ins, outs = w_in.to(x.dtype), w_out.to(x.dtype)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (tokens, squares, shares, ins, outs)
    )
    if not keep and chosen.numel() <= FEW:
        return few(Normed(tokens, squares, eps), shares, chosen, ins, outs, activation, gated).view(x.shape)
    if squares is not None and (keep or _holds_too_many(squares, chosen, len(ins), x.dtype)):
        tokens, squares = Normed(tokens, squares, eps).divided(), None
    return _experts(tokens, shares, chosen, ins, outs, squares, eps, activation, gated, keep)[0].view(x.shape)


def _holds_too_many(squares: Float[Tensor, "t parts"], chosen: Tensor, experts: int, dtype: torch.dtype) -> bool:
    """Whether the sums of squares of a tile of rows are more than a program should hold."""
    return _rows_of_tile(chosen.numel(), experts, dtype) * power_of_2(squares.shape[1]) > linear_limits.SQUARES


def _rows_of_tile(rows: int, experts: int, dtype: torch.dtype) -> int:
    """About as many as an expert has, or the matrix units multiply nothing."""
    size, most = (32, 64) if dtype == torch.float32 else (16, 128)
    while size < most and rows // experts > size:  # by comparisons, so that a compiler need not fix the number of rows
        size *= 2
    return size


@kernel_op("experts")
def _experts(
    x: Tensor, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor, squares: Tensor | None, eps: float,
    activation: str, gated: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and for the gradients: what the first product gave to each row, the row in each place, each expert's first."""
    call = _Call(x, weights, indices, w_in, w_out)
    logits = x.new_empty(call.rows if keep else 0, w_in.shape[1])
    if call.rows == 0:
        empty = indices.new_empty(0, dtype=torch.int32)
        return torch.empty_like(call.x), logits, empty, torch.zeros_like(w_in[:, 0, 0], dtype=torch.int32)
    order, starts = _sort(call.indices, call.experts)
    hidden = call.up(order, starts, squares, eps, logits if keep else None, activation, gated)
    parts = call.product(hidden, call.w_out, call.w_out.stride(2), call.w_out.stride(1), order, starts, scatter=True)
    return call.summed(parts, call.weights), logits, order, starts


@_experts.register_fake
def _(
    x: Tensor, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor, squares: Tensor | None, eps: float,
    activation: str, gated: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, places = indices.numel(), lambda n: indices.new_empty(n, dtype=torch.int32)
    logits = x.new_empty(rows if keep else 0, w_in.shape[1])
    return x.new_empty(x.shape), logits, places(rows), places(w_in.shape[0] + 1)


@kernel_op("experts_backward")
def _backward(
    dy: Tensor, x: Tensor, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor,
    logits: Tensor, order: Tensor, starts: Tensor, activation: str, gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, w_in and w_out."""
    call, dy = _Call(x, weights, indices, w_in, w_out), dense(dy)
    if call.rows == 0:
        return torch.zeros_like(x), torch.zeros_like(weights), torch.zeros_like(w_in), torch.zeros_like(w_out)
    dhidden = call.product(dy, call.w_out, call.w_out.stride(1), call.w_out.stride(2), order, starts, gather=True)
    dlogits, shared, dweights = call.slopes(dhidden, logits, order, activation, gated)
    dw_out = call.weight_gradient(dy, shared, order, starts, w_out, gathered_left=True)
    dw_in = call.weight_gradient(dlogits, call.x, order, starts, w_in, gathered_left=False)
    parts = call.product(dlogits, call.w_in, call.w_in.stride(1), call.w_in.stride(2), order, starts, scatter=True)
    return call.summed(parts, None), dweights.to(weights.dtype), dw_in, dw_out


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor,
    logits: Tensor, order: Tensor, starts: Tensor, activation: str, gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
        w_in.new_empty(w_in.shape),
        w_out.new_empty(w_out.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.settings = inputs[7:9]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor, *others: None) -> tuple[Tensor | None, ...]:
    dx, dweights, dw_in, dw_out = _backward(dy, *ctx.saved_tensors, *ctx.settings)
    return dx, dweights, None, dw_in, dw_out, None, None, None, None, None


_experts.register_autograd(_differentiate, setup_context=_save)


class _Call:
    """The products of one call, forward and backward."""

    def __init__(self, x: Tensor, weights: Tensor, indices: Tensor, w_in: Tensor, w_out: Tensor) -> None:
        self.x, self.weights, self.indices = dense(x), dense(weights), indices.contiguous()
        self.w_in, self.w_out = dense(w_in), dense(w_out)
        self.top_k, self.experts, self.rows = indices.shape[1], len(w_in), indices.numel()
        self.float32 = x.dtype == torch.float32
        self.block_m = _rows_of_tile(self.rows, self.experts, x.dtype)
        self.tiles = cdiv(self.rows, self.block_m) + self.experts
        self.shared: dict[str, Any] = {
            "EXPERTS": self.experts, "BLOCK_E": power_of_2(self.experts), "TOP_K": self.top_k,
            "BLOCK_M": self.block_m, "PRECISION": "tf32x3" if self.float32 else "tf32",
        }  # fmt: skip

    def up(
        self, order: Tensor, starts: Tensor, squares: Tensor | None, eps: float, logits: Tensor | None,
        activation: str, gated: bool,
    ) -> Tensor:  # fmt: skip
        """`act(w_in x)` of each row, in the order of experts."""
        width, d_hidden = self.x.shape[1], self.w_out.shape[2]
        parts = 0 if squares is None else squares.shape[1]
        hidden = self.x.new_empty(self.rows, d_hidden)
        tile = self._tile(d_hidden, width, 2 if gated else 1)
        grid = (self.tiles * cdiv(d_hidden, tile["BLOCK_N"]),)
        launch(
            _up_kernel, grid,
            self.x, squares, self.w_in, order, starts, logits, hidden, self.x.stride(0), parts, eps,
            *self.w_in.stride()[:2], D=width, F=d_hidden, PARTS=power_of_2(max(parts, 1)), ACTIVATION=activation,
            GATED=gated, **self.shared, **tile, **launch_options(hidden.device),
        )  # fmt: skip
        return hidden

    def product(
        self, a: Tensor, b: Tensor, b_k: int, b_n: int, order: Tensor, starts: Tensor,
        *, gather: bool = False, scatter: bool = False,
    ) -> Tensor:  # fmt: skip
        """Each row of `a` times the matrix of its expert, which is read with strides `b_k` and `b_n`.

        `gather`: the rows of `a` are tokens; `scatter`: the results lie as `indices` do, not in the order of experts.
        """
        summed = a.shape[1]
        columns = b.shape[1] * b.shape[2] // summed
        out = a.new_empty(self.rows, columns)
        tile = self._tile(columns, summed, 1)
        grid = (self.tiles * cdiv(columns, tile["BLOCK_N"]),)
        launch(
            _product_kernel, grid,
            a, b, order, starts, out, a.stride(0), b.stride(0), b_k, b_n,
            K=summed, N=columns, GATHER=gather, SCATTER=scatter, **self.shared, **tile, **launch_options(a.device),
        )  # fmt: skip
        return out

    def slopes(
        self, dhidden: Tensor, logits: Tensor, order: Tensor, activation: str, gated: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `logits`, the activations times their weights, and the gradients of the weights."""
        d_hidden, shared = dhidden.shape[1], torch.empty_like(dhidden)
        dlogits = torch.empty_like(logits)
        dweights = self.weights.new_empty(self.weights.shape, dtype=torch.float32)
        block = min(power_of_2(d_hidden), 1024)
        launch(
            _slope_kernel, (self.rows,),
            dhidden, logits, self.weights, order, dlogits, shared, dweights, self.weights.stride(0),
            TOP_K=self.top_k, F=d_hidden, ACTIVATION=activation, GATED=gated, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return dlogits, shared, dweights

    def weight_gradient(
        self, left: Tensor, right: Tensor, order: Tensor, starts: Tensor, like: Tensor, *, gathered_left: bool
    ) -> Tensor:
        """`left^T right` over the rows of each expert, one of the two being rows of tokens."""
        out = like.new_empty(like.shape)
        rows, columns = like.shape[1:]
        side = 32 if self.float32 else 128
        block = [min(max(power_of_2(n), 32 if self.float32 else 16), side) for n in (rows, columns)]
        grid = (cdiv(columns, block[1]) * cdiv(rows, block[0]), self.experts)
        launch(
            _weight_kernel, grid,
            left, right, order, starts, out, left.stride(0), right.stride(0),
            ROWS=rows, COLUMNS=columns, LEFT=gathered_left, TOP_K=self.top_k, PRECISION=self.shared["PRECISION"],
            BLOCK_M=block[0], BLOCK_N=block[1], BLOCK_K=32 if self.float32 else 64,
            num_warps=8 if min(block) == 128 else 4, num_stages=3,
        )  # fmt: skip
        return out

    def summed(self, parts: Tensor, weights: Tensor | None) -> Tensor:
        """The sum of the parts of each token, best expert first."""
        tokens, width = self.x.shape
        out = self.x.new_empty(tokens, width)
        block = min(power_of_2(width), 1024)
        launch(
            _sum_kernel, (tokens, cdiv(width, block)),
            parts, weights, out, 0 if weights is None else weights.stride(0),
            TOP_K=self.top_k, D=width, BLOCK=block, num_warps=4, **launch_options(out.device),
        )  # fmt: skip
        return out

    def _tile(self, columns: int, summed: int, products: int) -> dict[str, int]:
        """Columns of a tile of so many products at once, numbers summed in one go, warps and stages."""
        least = 32 if self.float32 else 16
        fill = lambda size, most: min(max(power_of_2(size), least), most)
        if self.float32:
            return {"BLOCK_N": fill(columns, 32), "BLOCK_K": fill(summed, 32), "num_warps": 4, "num_stages": 2}
        if self.block_m <= 32:
            return {
                "BLOCK_N": fill(columns, 128 // products),
                "BLOCK_K": fill(summed, 128),
                "num_warps": 4,
                "num_stages": 3,
            }
        warps = 8 if self.block_m == 128 else 4
        return {
            "BLOCK_N": fill(columns, 128 // products),
            "BLOCK_K": fill(summed, 64),
            "num_warps": warps,
            "num_stages": 3,
        }


def _sort(indices: Int[Tensor, "t k"], experts: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " e1"]]:
    """Rows in the order of their experts, and the place where each expert's begin and the last one's end."""
    rows, chosen = indices.numel(), indices.flatten()
    starts = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    if rows > RANKED:
        ranked, order = chosen.to(torch.int16 if experts < 2**15 else torch.int32).sort(stable=True)
        bounds = torch.arange(experts + 1, dtype=ranked.dtype, device=chosen.device)
        return order.to(torch.int32), torch.searchsorted(ranked, bounds, out_int32=True)
    order = torch.empty(rows, dtype=torch.int32, device=chosen.device)
    programs = cdiv(rows, 32)
    launch(
        _rank_kernel, (programs + cdiv(experts + 1, 32),),
        chosen, order, starts, rows, programs, EXPERTS=experts, BLOCK=32, WIDE=256, num_warps=4,
        **launch_options(chosen.device),
    )  # fmt: skip
    return order, starts


@triton.jit
def _rank_kernel(
    chosen, order, starts, rows, programs, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A row's place is how many come before it; an expert's start is that of a row before all of its own."""
    follow_last(OVERLAP)
    of_row = tl.program_id(0) < programs
    at = tl.where(of_row, tl.program_id(0), tl.program_id(0) - programs) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(of_row, rows, EXPERTS + 1)
    key = tl.where(of_row, tl.load(chosen + at, mask=inside & of_row, other=0).to(tl.int32), at)
    mine = tl.where(of_row, at, -1)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, WIDE):
        other = start + tl.arange(0, WIDE)
        theirs = tl.load(chosen + other, mask=other < rows, other=EXPERTS + 1).to(tl.int32)
        earlier = (theirs[None, :] == key[:, None]) & (other[None, :] < mine[:, None])
        place += tl.sum(((theirs[None, :] < key[:, None]) | earlier).to(tl.int32), 1)
    tl.store(order + place, at, mask=inside & of_row)
    tl.store(starts + at, place, mask=inside & (at <= EXPERTS) & (mine < 0))


@triton.jit
def _rows_of(starts, tile, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile of rows, its first row and the end of its expert; beyond the last tile expert EXPERTS."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(starts + e, mask=e < EXPERTS, other=0)
    end = tl.load(starts + e + 1, mask=e < EXPERTS, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (e < EXPERTS)).to(tl.int32), 0)
    first = tile - tl.sum(tl.where(e < expert, tiles, 0), 0)
    known = tl.minimum(expert, EXPERTS - 1)
    return expert, tl.load(starts + known) + first * BLOCK_M, tl.load(starts + known + 1)


@triton.jit
def _up_kernel(
    x, squares, w_in, order, starts, logits, hidden, x_row, parts, eps, w_expert, w_row,
    D: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows of one expert and tile of hidden channels: gate, up and activation."""
    follow_last(OVERLAP)
    COLUMNS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = 2 * F if GATED else F
    expert, first, end = _rows_of(starts, tl.program_id(0) // COLUMNS, EXPERTS, BLOCK_E, BLOCK_M)
    if expert < EXPERTS:
        row, n = first + tl.arange(0, BLOCK_M), tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        token = tl.load(order + row, mask=row < end, other=0) // TOP_K
        # Columns beyond the last read some other column and are not written.
        column = n % F
        a = x + token.to(tl.int64)[:, None] * x_row + k[None, :]
        b = w_in + expert.to(tl.int64) * w_expert + column[None, :] * w_row + k[:, None]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = gate
        for start in range(0, D, BLOCK_K):
            left = tl.load(a + start, mask=(start + k < D)[None, :], other=0.0)
            gate = dot(left, tl.load(b + start, mask=(start + k < D)[:, None], other=0.0), gate, PRECISION)
            if GATED:
                right = tl.load(b + F * w_row + start, mask=(start + k < D)[:, None], other=0.0)
                up = dot(left, right, up, PRECISION)
        if squares is not None:
            rstd = rstds_of(squares, token, parts, eps, D, PARTS)[:, None]
            gate, up = gate * rstd, up * rstd
        inside = (row < end)[:, None] & (n < F)[None, :]
        out = row.to(tl.int64)[:, None]
        if logits is not None:
            tl.store(logits + out * WIDTH + n[None, :], gate.to(x.dtype.element_ty), mask=inside)
            if GATED:
                tl.store(logits + out * WIDTH + F + n[None, :], up.to(x.dtype.element_ty), mask=inside)
        gate = act(gate, ACTIVATION)
        if GATED:
            gate = gate * up
        tl.store(hidden + out * F + n[None, :], gate.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
    a, b, order, starts, out, a_row, b_expert, b_k, b_n,
    K: tl.constexpr, N: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows of one expert and tile of columns."""
    follow_last(OVERLAP)
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert, first, end = _rows_of(starts, tl.program_id(0) // COLUMNS, EXPERTS, BLOCK_E, BLOCK_M)
    if expert < EXPERTS:
        row, n = first + tl.arange(0, BLOCK_M), tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        source = tl.minimum(row, end - 1)
        if GATHER:
            source = tl.load(order + source) // TOP_K
        left = a + source.to(tl.int64)[:, None] * a_row + k[None, :]
        right = b + expert.to(tl.int64) * b_expert + (n % N)[None, :] * b_n + k[:, None] * b_k
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            rows = tl.load(left + start, mask=(start + k < K)[None, :], other=0.0)
            acc = dot(rows, tl.load(right + start * b_k, mask=(start + k < K)[:, None], other=0.0), acc, PRECISION)
        place = row
        if SCATTER:
            place = tl.load(order + row, mask=row < end, other=0)
        inside = (row < end)[:, None] & (n < N)[None, :]
        tl.store(out + place.to(tl.int64)[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slope_kernel(
    dhidden, logits, weights, order, dlogits, shared, dweights, w_token,
    TOP_K: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: backward through the activation and the weight."""
    WIDTH: tl.constexpr = 2 * F if GATED else F
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(order + row)
    weight = tl.load(weights + (place // TOP_K).to(tl.int64) * w_token + place % TOP_K).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        upstream = tl.load(dhidden + row * F + f, mask=f < F, other=0.0).to(tl.float32)
        gate = tl.load(logits + row * WIDTH + f, mask=f < F, other=0.0).to(tl.float32)
        active, slope = act(gate, ACTIVATION), act_slope(gate, ACTIVATION)
        if GATED:
            up = tl.load(logits + row * WIDTH + F + f, mask=f < F, other=0.0).to(tl.float32)
            dup = upstream * weight * active
            tl.store(dlogits + row * WIDTH + F + f, dup.to(dlogits.dtype.element_ty), mask=f < F)
            active, slope = active * up, slope * up
        summed += upstream * active
        tl.store(dlogits + row * WIDTH + f, (upstream * weight * slope).to(dlogits.dtype.element_ty), mask=f < F)
        tl.store(shared + row * F + f, (active * weight).to(shared.dtype.element_ty), mask=f < F)
    tl.store(dweights + place, tl.sum(summed, 0))


@triton.jit
def _weight_kernel(
    left, right, order, starts, out, left_row, right_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per expert and tile of its matrix, which walks along its rows; LEFT: those of `left` are tokens."""
    ACROSS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(1)
    m = tl.program_id(0) // ACROSS * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        inside = row < end
        token = tl.load(order + row, mask=inside, other=0) // TOP_K
        of_left, of_right = (token if LEFT else row).to(tl.int64), (row if LEFT else token).to(tl.int64)
        one = tl.load(left + of_left[:, None] * left_row + (m % ROWS)[None, :], mask=inside[:, None], other=0.0)
        other = tl.load(right + of_right[:, None] * right_row + (n % COLUMNS)[None, :], mask=inside[:, None], other=0.0)
        acc = dot(tl.trans(one), other, acc, PRECISION)
    at = expert.to(tl.int64) * ROWS * COLUMNS + m[:, None] * COLUMNS + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < ROWS)[:, None] & (n < COLUMNS)[None, :])


@triton.jit
def _sum_kernel(
    parts, weights, out, w_token, TOP_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """One program per token and block of channels."""
    follow_last(OVERLAP)
    token, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(TOP_K):
        part = tl.load(parts + (token * TOP_K + i) * D + d, mask=d < D, other=0.0).to(tl.float32)
        if weights is not None:
            part = part * tl.load(weights + token * w_token + i).to(tl.float32)
        acc += part
    tl.store(out + token * D + d, acc.to(out.dtype.element_ty), mask=d < D)
