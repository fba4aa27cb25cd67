"""Rotations on a GPU: one launch reads and writes each number once.

The angles of `rotary` are made where they are used: a float64 product, reduced to a quarter turn in float64, then sine
and cosine in float32. A program makes them once for all heads of its tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.ops.rotary.limits import width_of
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import dense, follow_last, launch_options

TILE = 1024
"""Pairs that a program turns together."""


def rotate(
    x: Float[Tensor, "*#b p"], cos: Float[Tensor, "*#b s"], sin: Float[Tensor, "*#b s"], *, interleaved: bool = False
) -> Float[Tensor, "*#b p"]:
    """See `everstate.ops.rotary.rotate`."""
    shape = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1], sin.shape[:-1])
    cos, sin = (t.to(torch.float32).expand(*shape, t.shape[-1]) for t in (cos, sin))
    learned = cos.requires_grad or sin.requires_grad
    return _rotate(x.expand(*shape, x.shape[-1]), cos, sin, interleaved, learned)


@kernel_op("rotate")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, learned: bool) -> Tensor:
    """`learned` says whether x has to be kept for the gradients of cos and sin."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_rotate(x, cos, sin, None, y, None, None, interleaved, inverse=False)
    return y


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, learned: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("rotate_backward")
def _rotate_backward(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> list[Tensor]:
    """Gradients of x, and of cos and sin where x is given."""
    grads = _gradients(dy, x, cos)
    dcos, dsin = (None, None) if x is None else grads[1:]
    _launch_rotate(dy, cos, sin, x, grads[0], dcos, dsin, interleaved, inverse=True)
    return grads


@_rotate_backward.register_fake
def _(dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> list[Tensor]:
    return _gradients(dy, x, cos)


def _gradients(dy: Tensor, x: Tensor | None, cos: Tensor) -> list[Tensor]:
    wanted = [dy] if x is None else [dy, cos, cos]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]


def _save_rotate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, ctx.interleaved, learned = inputs
    ctx.save_for_backward(x if learned else None, cos, sin)


def _differentiate_rotate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, *angles = _rotate_backward(dy, *ctx.saved_tensors, ctx.interleaved)
    return (dx, *angles, None, None) if angles else (dx, None, None, None, None)


_rotate.register_autograd(_differentiate_rotate, setup_context=_save_rotate)


def _launch_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, given: Tensor | None, y: Tensor, dcos: Tensor | None, dsin: Tensor | None,
    interleaved: bool, *, inverse: bool,
) -> None:  # fmt: skip
    x, cos, sin = (dense(t) for t in (x, cos, sin))
    given = None if given is None else dense(given)
    read = [t for t in (x, cos, sin, given) if t is not None]
    shape, strides = _merged(x.shape[:-1], [t.stride()[:-1] for t in read])
    if len(shape) > 3:
        read = [t.contiguous() for t in read]
        x, cos, sin, *rest = read
        given = rest[0] if rest else None
        shape, strides = _merged(x.shape[:-1], [t.stride()[:-1] for t in read])
    pairs, turned = x.shape[-1] // 2, cos.shape[-1]
    block = power_of_2(pairs)
    rows, tile = prod(shape), max(TILE // block, 1)
    sizes, steps = [1] * (3 - len(shape)) + shape, [[0] * (3 - len(shape)) + each for each in strides]
    launch(
        _rotate_kernel, (cdiv(rows, tile),),
        x, cos, sin, given, y, dcos, dsin, rows, *sizes[1:], *steps[0], *steps[1], *steps[2], *steps[-1],
        PAIRS=pairs, TURNED=turned, INTERLEAVED=interleaved, INVERSE=inverse, BLOCK_R=tile, BLOCK_P=block,
        num_warps=4,
    )  # fmt: skip


def _merged(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The dimensions with those made one that lie behind one another in every tensor, and their strides."""
    kept: list[tuple[int, list[int]]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if kept and all(before == size * step for before, step in zip(kept[-1][1], steps, strict=True)):
            kept[-1] = (kept[-1][0] * size, steps)
        else:
            kept.append((size, steps))
    return [size for size, _ in kept], [[steps[i] for _, steps in kept] for i in range(len(strides))]


def rotary(
    x: Float[Tensor, "b l h p"],
    positions: Int[Tensor, "#b l"],
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Float[Tensor, "b l h p"]:
    """See `everstate.ops.rotary`."""
    width = width_of(x.shape[-1], rotary_dim)
    return _rotary(x, positions.expand(x.shape[0], -1), theta, interleaved, width, False)


@kernel_op("rotary")
def _rotary(x: Tensor, positions: Tensor, theta: float, interleaved: bool, width: int, inverse: bool) -> Tensor:
    y, x = torch.empty_like(x, memory_format=torch.contiguous_format), dense(x)
    batch, length, heads, headdim = x.shape
    block = power_of_2(max(width // 2, 1))
    tile = min(max(TILE // block, 1), power_of_2(batch * length))
    tiles = cdiv(batch * length, tile)
    parts = min(heads, cdiv(4 * processors(x.device), tiles))
    each = cdiv(heads, parts)
    launch(
        _rotary_kernel, (tiles, cdiv(heads, each)),
        x, positions, frequencies(width, theta, x.device), y, batch * length, length, heads, each,
        *x.stride()[:3], *positions.stride(),
        P=headdim, WIDTH=width, INTERLEAVED=interleaved, INVERSE=inverse, BLOCK_T=tile, BLOCK_P=block,
        BLOCK_REST=power_of_2(max(headdim - width, 1)), num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return y


@_rotary.register_fake
def _(x: Tensor, positions: Tensor, theta: float, interleaved: bool, width: int, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_rotary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, *ctx.settings, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def _differentiate_rotary(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    return _rotary(dy, positions, *ctx.settings, not ctx.inverse), None, None, None, None, None


_rotary.register_autograd(_differentiate_rotary, setup_context=_save_rotary)


# Made on the host and cached by value: a captured graph could not copy them to the GPU.
@lru_cache(maxsize=64)
def frequencies(width: int, theta: float, device: torch.device) -> Float[Tensor, " s"]:
    """Radians per position of each pair, float64."""
    return (theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)).to(device)


@triton.jit
def _load_pairs(rows, inside, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second numbers of the pairs of each row."""
    if INTERLEAVED:
        at = tl.arange(0, 2 * BLOCK_P)[None, :]
        both = tl.load(rows + at, mask=inside & (at < 2 * PAIRS), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (both.shape[0], BLOCK_P, 2)))
    else:
        at = tl.arange(0, BLOCK_P)[None, :]
        a = tl.load(rows + at, mask=inside & (at < PAIRS), other=0.0).to(tl.float32)
        b = tl.load(rows + PAIRS + at, mask=inside & (at < PAIRS), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(rows, inside, a, b, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr):
    dtype = rows.dtype.element_ty
    if INTERLEAVED:
        at = tl.arange(0, 2 * BLOCK_P)[None, :]
        both = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), (a.shape[0], 2 * BLOCK_P))
        tl.store(rows + at, both, mask=inside & (at < 2 * PAIRS))
    else:
        at = tl.arange(0, BLOCK_P)[None, :]
        tl.store(rows + at, a.to(dtype), mask=inside & (at < PAIRS))
        tl.store(rows + PAIRS + at, b.to(dtype), mask=inside & (at < PAIRS))


@triton.jit
def _turn(a, b, cos, sin, INVERSE: tl.constexpr):
    if INVERSE:
        sin = -sin
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def _rotate_kernel(
    x, cos, sin, given, y, dcos, dsin, rows, size1, size2,
    x0, x1, x2, cos0, cos1, cos2, sin0, sin1, sin2, given0, given1, given2,
    PAIRS: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows. With `given`, what was turned, x is the gradient of that, and turned back."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = row < rows
    first, second, third = row // size2 // size1, row // size2 % size1, row % size2
    pair = tl.arange(0, BLOCK_P)[None, :]
    turned = inside & (pair < TURNED)
    c = tl.load(cos + first * cos0 + second * cos1 + third * cos2 + pair, mask=turned, other=1.0)
    s = tl.load(sin + first * sin0 + second * sin1 + third * sin2 + pair, mask=turned, other=0.0)
    own = x + first * x0 + second * x1 + third * x2
    a, b = _load_pairs(own, inside, PAIRS, BLOCK_P, INTERLEAVED)
    turned_a, turned_b = _turn(a, b, c, s, INVERSE)
    # As it is, not as its product with 1 and 0, which an infinity would make NaN.
    still = pair >= TURNED
    turned_a, turned_b = tl.where(still, a, turned_a), tl.where(still, b, turned_b)
    _store_pairs(y + row * (2 * PAIRS), inside, turned_a, turned_b, PAIRS, BLOCK_P, INTERLEAVED)
    if given is not None:
        origin = given + first * given0 + second * given1 + third * given2
        u, v = _load_pairs(origin, inside, PAIRS, BLOCK_P, INTERLEAVED)
        tl.store(dcos + row * TURNED + pair, a * u + b * v, mask=turned)
        tl.store(dsin + row * TURNED + pair, b * u - a * v, mask=turned)


@triton.jit
def _cos_sin(angle):
    """Of float64 angles: to the nearest quarter turn in float64, the rest, at most pi / 4, by the series in float32."""
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = (angle - quarters * 1.5707963267948966).to(tl.float32)
    z = r * r
    sin = 1.0 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cos = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    sin = sin * r
    quarter = quarters.to(tl.int64).to(tl.int32) & 3
    odd = (quarter & 1) == 1
    c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where(quarter >= 2, -s, s)


@triton.jit
def turns_of(position, frequencies, p, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """For each number of a head which is the other of its pair, its cosine, and its sine with the sign of the other.

    Beyond WIDTH a number has no other, which must not be read; its cosine is 1 and its sine 0.
    """
    if INTERLEAVED:
        pair, other, second = p // 2, p ^ 1, p % 2 == 1
    else:
        second = p >= WIDTH // 2
        pair, other = p % (WIDTH // 2), tl.where(second, p - WIDTH // 2, p + WIDTH // 2)
    angle = position.to(tl.float64) * tl.load(frequencies + pair, mask=p < WIDTH, other=0.0)
    cos, sin = _cos_sin(angle)
    return other, cos, tl.where(second, sin, -sin)


@triton.jit
def turned_with(x, other, cos, sin):
    """Numbers turned with the others of their pairs, rounded as they were."""
    return (x.to(tl.float32) * cos + other.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def _rotary_kernel(
    x, positions, frequencies, y, tokens, length, heads, each, x_row, x_token, x_head, positions_row, positions_token,
    P: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens and part of the heads, one head after the other."""
    follow_last(OVERLAP)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    inside = token < tokens
    row, at = token // length, token % length
    position = tl.load(positions + row * positions_row + at * positions_token, mask=inside, other=0).to(tl.float64)
    pair = tl.arange(0, BLOCK_P)[None, :]
    cos, sin = _cos_sin(position * tl.load(frequencies + pair, mask=pair < WIDTH // 2, other=0.0))
    start = tl.program_id(1) * each
    own = x + row * x_row + at * x_token + start.to(tl.int64) * x_head
    out = y + (token * heads + start) * P
    for _ in range(start, tl.minimum(start + each, heads)):
        a, b = _load_pairs(own, inside, WIDTH // 2, BLOCK_P, INTERLEAVED)
        a, b = _turn(a, b, cos, sin, INVERSE)
        _store_pairs(out, inside, a, b, WIDTH // 2, BLOCK_P, INTERLEAVED)
        if WIDTH < P:
            rest = WIDTH + tl.arange(0, BLOCK_REST)[None, :]
            still = tl.load(own + rest, mask=inside & (rest < P), other=0.0)
            tl.store(out + rest, still, mask=inside & (rest < P))
        own += x_head
        out += P
