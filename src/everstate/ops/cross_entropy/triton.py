"""Cross entropy on a GPU: the logits of a chunk of tokens by one product, and one kernel that reads and writes them.

A sum of losses has its gradients made together with it, from logits that are there already: three products of the size
of the vocabulary. Losses of single tokens are weighted later, by whoever asks for gradients, so their logits are made
again: four products.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.ops.cross_entropy import IGNORE
from everstate.ops.triton_common import LOG2E
from everstate.ops.triton_launch import cdiv, launch, power_of_2

MEMORY = 2**29
"""Bytes of logits at a time. With each chunk the gradient of the weight is read and written once more."""

BLOCK = 8192
"""Logits of a token that a program takes at a time."""

IGNORED = tl.constexpr(IGNORE)


def linear_cross_entropy(
    x: Float[Tensor, "*t d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "*t"],
    *,
    bias: Float[Tensor, " v"] | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    reduction: str = "none",
) -> Float[Tensor, "*t"] | Float[Tensor, ""]:
    """See `everstate.ops.linear_cross_entropy`."""
    rows, size = x.flatten(0, -2), chunk_size or _chunk_of(weight.shape[0] * x.element_size())
    inputs = (rows, weight, bias, targets.flatten().contiguous(), softcap, size)
    if reduction == "none":
        losses: Tensor = _losses(*inputs)[0]
        return losses.view(targets.shape)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    summed: Tensor = _summed(*inputs, wanted)[0]
    return summed


def _chunk_of(bytes_of_a_token: int) -> int:
    """Tokens whose logits fit, in whole tiles of a product."""
    fitting = max(MEMORY // bytes_of_a_token, 1)
    return fitting if fitting < 256 else fitting // 256 * 256


@kernel_op("linear_cross_entropy")
def _losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Losses, and the log of each token's sum."""
    losses, sums = x.new_empty(2, x.shape[0], dtype=torch.float32)
    for now, logits in _Logits(x, weight, bias, chunk_size):
        _launch(logits, targets[now], softcap, losses=losses[now], sums=sums[now])
    return losses.clone(), sums.clone()


@_losses.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


@kernel_op("linear_cross_entropy_backward")
def _losses_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, sums: Tensor,
    softcap: float | None, chunk_size: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x and weight, and of bias where there is one."""
    grad, products = grad.contiguous(), _Products(x, weight, bias, None)
    for now, logits in _Logits(x, weight, bias, chunk_size):
        _launch(logits, targets[now], softcap, given=sums[now], upstream=grad[now], in_place=True)
        products.add_(now, logits)
    return products.gradients()


@_losses_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, sums: Tensor,
    softcap: float | None, chunk_size: int,
) -> list[Tensor]:  # fmt: skip
    return _like(x, weight, bias)


def _save_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.settings = inputs[4:]


def _differentiate_losses(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, *dbias = _losses_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return dx, dweight, dbias[0] if dbias else None, None, None, None


_losses.register_autograd(_differentiate_losses, setup_context=_save_losses)


@kernel_op("summed_linear_cross_entropy")
def _summed(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, chunk_size: int,
    wanted: bool,
) -> list[Tensor]:  # fmt: skip
    """The sum of all losses, and if `wanted` its gradients of x and weight, and of bias where there is one, in float32:
    they are rounded when it is known by what they are multiplied."""
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    products = _Products(x, weight, bias, torch.float32) if wanted else None
    for now, logits in _Logits(x, weight, bias, chunk_size):
        _launch(logits, targets[now], softcap, losses=losses[now], in_place=wanted)
        if products is not None:
            products.add_(now, logits)
    return [losses.sum(), *(products.gradients() if products is not None else [])]


@_summed.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, chunk_size: int,
    wanted: bool,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty((), dtype=torch.float32), *(_like(x, weight, bias, dtype=torch.float32) if wanted else [])]


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [t.dtype for t in inputs[:3] if t is not None]
    ctx.set_materialize_grads(False)  # of the gradients, which are outputs too


def _differentiate_sum(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    dx, dweight, *dbias = ((t * grads[0]).to(dtype) for t, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
    return dx, dweight, dbias[0] if dbias else None, None, None, None, None


_summed.register_autograd(_differentiate_sum, setup_context=_save_sum)


def _like(*inputs: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in inputs if t is not None]


class _Logits(NamedTuple):
    """The logits of all tokens, chunk by chunk, in one piece of memory."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    chunk_size: int

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:  # type: ignore[override]
        x, total, vocabulary = self.x, self.x.shape[0], self.weight.shape[0]
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        # A row begins at a multiple of 128 bytes: products of an odd vocabulary are slow without.
        buffer = x.new_empty(min(self.chunk_size, total), cdiv(vocabulary, 64) * 64)
        for start in range(0, total, self.chunk_size):
            now = slice(start, min(start + self.chunk_size, total))
            logits = buffer[: now.stop - start, :vocabulary]
            if bias is None:
                torch.mm(x[now], weight.T, out=logits)
            else:
                torch.addmm(bias, x[now], weight.T, out=logits)
            yield now, logits


class _Products:
    """The gradients of x, weight and bias from those of the logits: in `dtype`, or each in that of what it is of."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
        self.x, self.factor = x, weight.to(x.dtype)
        self.dtypes = [dtype or t.dtype for t in (x, weight, bias) if t is not None]
        self.dx = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        self.dweight = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        self.dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)

    def add_(self, now: slice, slope: Float[Tensor, "t v"]) -> None:
        """A chunk's gradient of x, and its share of the others, which are summed in float32."""
        _multiply(slope, self.factor, self.dx[now], added=False)
        _multiply(slope.T, self.x[now], self.dweight, added=True)
        if self.dbias is not None:
            self.dbias += slope.sum(0, dtype=torch.float32)

    def gradients(self) -> list[Tensor]:
        """Those of x and weight, and of bias where there is one."""
        given = [t for t in (self.dx, self.dweight, self.dbias) if t is not None]
        return [t.to(dtype) for t, dtype in zip(given, self.dtypes, strict=True)]


def _multiply(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], out: Float[Tensor, "m n"], *, added: bool) -> None:
    """Put `a @ b` into `out`, which may be of higher precision, or add it."""
    settings: dict[str, Any] = {}
    if a.is_cuda and a.dtype != out.dtype:
        settings["out_dtype"] = out.dtype
    else:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if added:
        torch.addmm(out, a, b, out=out, **settings)
    else:
        torch.mm(a, b, out=out, **settings)


def _launch(
    logits: Float[Tensor, "t v"], targets: Int[Tensor, " t"], softcap: float | None, *,
    losses: Tensor | None = None, sums: Tensor | None = None, given: Tensor | None = None,
    upstream: Tensor | None = None, in_place: bool = False,
) -> None:  # fmt: skip
    tokens, vocabulary = logits.shape
    block = min(power_of_2(vocabulary), BLOCK)
    launch(
        _loss_kernel, (tokens,),
        logits, targets, losses, sums, given, upstream, logits.stride(0), vocabulary,
        softcap or 1.0, CAPPED=softcap is not None, IN_PLACE=in_place, BLOCK=block, num_warps=8,
    )  # fmt: skip


@triton.jit
def _capped(logit, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        # softcap tanh(logit / softcap)
        logit = softcap * (2.0 / (1.0 + tl.exp2(logit * (-2.0 * LOG2E / softcap))) - 1.0)
    return logit


@triton.jit
def _loss_kernel(
    logits, targets, losses, sums, given, upstream, stride, vocabulary, softcap,
    CAPPED: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token. With `given`, the log of its sum, no loss; `IN_PLACE`, its gradient where its logits were.

    The second pass finds the logits of the first in the cache.
    """
    token = tl.program_id(0).to(tl.int64)
    own, at = logits + token * stride, tl.arange(0, BLOCK)
    target = tl.load(targets + token)
    if given is not None:
        log_sum = tl.load(given + token)
    else:
        # Before the first store, and every thread has it: sums over the program follow.
        chosen = tl.load(own + target, mask=(target >= 0) & (target < vocabulary), other=0.0).to(tl.float32)
        chosen = _capped(chosen, softcap, CAPPED)
        largest, summed = float("-inf"), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            inside = first + at < vocabulary
            here = _capped(tl.load(own + first + at, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
            here = tl.where(inside, here, float("-inf"))
            larger = tl.maximum(largest, tl.max(here, 0))
            summed = summed * tl.exp2((largest - larger) * LOG2E) + tl.exp2((here - larger) * LOG2E)
            largest = larger
        log_sum = largest + tl.log(tl.sum(summed, 0))
        tl.store(losses + token, tl.where(target == IGNORED, 0.0, log_sum - chosen))
        if sums is not None:
            tl.store(sums + token, log_sum)
    if IN_PLACE:
        share = 1.0
        if upstream is not None:
            share = tl.load(upstream + token).to(tl.float32)
        for first in range(0, vocabulary, BLOCK):
            inside = first + at < vocabulary
            here = _capped(tl.load(own + first + at, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
            slope = tl.exp2((here - log_sum) * LOG2E) - tl.where(first + at == target, 1.0, 0.0)
            if CAPPED:
                slope = slope * (1.0 - (here / softcap) * (here / softcap))
            slope = tl.where(target == IGNORED, 0.0, slope * share)
            tl.store(own + first + at, slope.to(logits.dtype.element_ty), mask=inside)
