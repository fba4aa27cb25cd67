"""Attention of a segment on a GPU: blocks of queries walk along the keys, and no score is ever in memory.

A query sees two runs of keys: what the ring holds, in order of time (see `triton_step`), and the segment up to itself.
Both are read where they lie. How much of the ring is filled each sequence finds out on the device. Packed sequences are
a table of blocks: none is padded, and one launch serves them all.

Backward keeps the logarithm of each softmax's sum. One kernel walks along the keys for the gradient of q, one along the
queries of all heads of a group for those of k and v, so that these are sums in registers.

Sources: Dao 2023, "FlashAttention-2" (arXiv 2307.08691); Milakov and Gimelshein 2018 (arXiv 1805.02867).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.core.packing import Packing
from everstate.ops.attention.cache import AttentionState, append, append_packed, check_memory
from everstate.ops.attention.rope import Rope, turned
from everstate.ops.attention.triton_step import capped, ring_of, softened
from everstate.ops.triton_common import LOG2E, dot
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import dense


def attention(
    q: Float[Tensor, "b l h p"],
    k: Float[Tensor, "b l g p"],
    v: Float[Tensor, "b l g p"],
    state: AttentionState,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rope: Rope | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l h p"], AttentionState]:
    """See `everstate.ops.attention`."""
    check_memory(state.pos, state.k.shape[1], window)
    q, k = turned(q, k, state.pos, rope, packing)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ends = [] if packing is None else list(packing.cu_seqlens)
    y, _ = _attend(q, k, v, state.k, state.v, state.pos, ends, window, scale, softcap)
    return y, append(state, k, v) if packing is None else append_packed(state, k, v, packing)


@kernel_op("attention")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, pos: Tensor, ends: Sequence[int],
    window: int | None, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the logarithm to base 2 of the sum of each softmax."""
    call = _Call(q, k, v, ring_k, ring_v, pos, ends, window, scale, softcap)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    plan, tile = call.plan("forward")
    launch(
        _forward_kernel, (len(plan) * call.heads,),
        *call.inputs, plan, y, lse, *call.settings, *call.strides, **call.sizes, **tile,
    )  # fmt: skip
    return y, lse


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, pos: Tensor, ends: Sequence[int],
    window: int | None, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@kernel_op("attention_backward")
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, pos: Tensor, y: Tensor, lse: Tensor,
    ends: Sequence[int], window: int | None, scale: float, softcap: float | None, of_ring: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, and of the ring if asked for."""
    call = _Call(q, k, v, ring_k, ring_v, pos, ends, window, scale, softcap)
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    dy = dy.contiguous()
    delta = torch.empty_like(lse)
    launch(
        _delta_kernel, (cdiv(lse.numel(), 32),),
        dy, y, delta, lse.numel(), P=call.headdim, BLOCK_P=power_of_2(call.headdim), BLOCK=32, num_warps=4,
    )  # fmt: skip
    upstream = dy, lse, delta
    plan, tile = call.plan("queries")
    launch(
        _query_kernel, (len(plan) * call.heads,),
        *call.inputs, plan, *upstream, dq, *call.settings, *call.strides, **call.sizes, **tile,
    )  # fmt: skip
    plan, tile = call.plan("keys")
    launch(
        _key_kernel, (len(plan) * call.groups,),
        *call.inputs, plan, *upstream, dk, dv, *call.settings, *call.strides, *_strides(dk), *_strides(dv), 0, 0,
        OF_RING=False, **call.sizes, **tile,
    )  # fmt: skip
    if not of_ring:
        return [dq, dk, dv]
    dring = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (ring_k, ring_v)]
    if call.reach and len(q):
        plan, tile = call.plan_of_ring()
        launch(
            _key_kernel, (len(plan) * call.groups,),
            *call.inputs, plan, *upstream, *dring, *call.settings, *call.strides,
            *dring[0].stride()[1:3], *dring[1].stride()[1:3], dring[0].stride(0), dring[1].stride(0),
            OF_RING=True, **call.sizes, **tile,
        )  # fmt: skip
    return [dq, dk, dv, *dring]


@_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, pos: Tensor, y: Tensor, lse: Tensor,
    ends: Sequence[int], window: int | None, scale: float, softcap: float | None, of_ring: bool,
) -> list[Tensor]:  # fmt: skip
    given = [q, k, v, ring_k, ring_v] if of_ring else [q, k, v]
    return [t.new_empty(t.shape) for t in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]
    ctx.of_ring = inputs[3].requires_grad or inputs[4].requires_grad
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
    grads = _backward(dy, *ctx.saved_tensors, *ctx.settings, ctx.of_ring)
    ring = grads[3:] if ctx.of_ring else [None, None]
    return (*grads[:3], *ring, None, None, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_save)


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, pos: Tensor, ends: Sequence[int],
        window: int | None, scale: float, softcap: float | None,
    ) -> None:  # fmt: skip
        (batch, length, self.heads, self.headdim), self.groups = q.shape, k.shape[2]
        self.ends = tuple(ends) or tuple(range(0, (batch + 1) * length, length))
        self.device, self.float32 = q.device, q.dtype == torch.float32
        capacity = ring_k.shape[1]
        self.reach = capacity if window is None else min(capacity, window - 1)
        rows = [_rows_of(t) for t in (q, k, v)]
        ring = [dense(t) for t in (ring_k, ring_v)]
        self.inputs = (*rows, *ring, pos)
        self.settings = capacity, self.reach, scale, softcap, window
        self.strides = [n for t in rows for n in _strides(t)] + [n for t in ring for n in t.stride()[:3]]
        self.block_p = max(power_of_2(self.headdim), 32 if self.float32 else 16)
        self.sizes: dict[str, Any] = {
            "HEADS": self.heads, "GROUPS": self.groups, "P": self.headdim, "BLOCK_P": self.block_p,
            "FORGETS": window is None or capacity < window, "PRECISION": "tf32x3" if self.float32 else "tf32",
        }  # fmt: skip

    def plan(self, kind: str) -> tuple[Int[Tensor, "blocks 4"], dict[str, int]]:
        """The blocks of one kernel, and its tiles."""
        tile = self._tile(kind)
        return _plan(self.ends, tile["BLOCK_N" if kind == "keys" else "BLOCK_M"], kind == "keys", self.device), tile

    def plan_of_ring(self) -> tuple[Int[Tensor, "blocks 4"], dict[str, int]]:
        """Blocks of keys in the ring of each sequence."""
        tile = self._tile("keys")
        return _plan_of_ring(self.ends, self.reach, tile["BLOCK_N"], self.device), tile

    def _tile(self, kind: str) -> dict[str, int]:
        """Queries and keys of a tile: what fits into registers and shared memory."""
        wide = self.block_p > 128
        if self.float32:
            sides = (32, 32) if wide else (64, 32)
            return {"BLOCK_M": min(sides), "BLOCK_N": min(sides), "num_warps": 4, "num_stages": 1 if wide else 2}
        if kind == "keys":
            return {"BLOCK_M": 32 if wide else 64, "BLOCK_N": 64, "num_warps": 8 if wide else 4, "num_stages": 2}
        narrow = wide or kind == "queries"
        return {"BLOCK_M": 128, "BLOCK_N": 32 if narrow else 64, "num_warps": 8, "num_stages": 2 if wide else 3}


def _rows_of(t: Float[Tensor, "b l h p"]) -> Float[Tensor, "t h p"]:
    """All tokens in one dimension: a view where it can be one, as of a part of a wider projection."""
    return dense(t.reshape(-1, *t.shape[2:]))


def _strides(t: Tensor) -> tuple[int, int]:
    """From token to token and from head to head."""
    return t.stride(-3), t.stride(-2)


@lru_cache(maxsize=64)
def _plan(ends: tuple[int, ...], size: int, keys: bool, device: torch.device) -> Int[Tensor, "blocks 4"]:
    """First token of each block, first and end of its sequence, and which that is; the most work comes first."""
    blocks = [
        (begin, start, end, i) for i, (start, end) in enumerate(pairwise(ends)) for begin in range(start, end, size)
    ]
    blocks.sort(key=lambda block: block[0] - block[2] if keys else block[1] - block[0])
    return torch.tensor(blocks, dtype=torch.int32, device=device).view(-1, 4)


@lru_cache(maxsize=64)
def _plan_of_ring(ends: tuple[int, ...], reach: int, size: int, device: torch.device) -> Int[Tensor, "blocks 4"]:
    """The same for keys in rings: the first of each block, counted from the oldest that is seen."""
    blocks = [
        (begin, start, end, i) for i, (start, end) in enumerate(pairwise(ends)) for begin in range(0, reach, size)
    ]
    return torch.tensor(blocks, dtype=torch.int32, device=device).view(-1, 4)


@triton.jit
def _visible(t, j, ahead, end, window):
    """Which keys j < end queries t see, if query t lies t + ahead after key 0."""
    distance = t + ahead - j
    seen = (distance >= 0) & (j < end)
    if window is not None:
        seen = seen & (distance < window)
    return seen


@triton.jit
def _tile_of(base, first, wrap, j, end, stride, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The rows j < end of what begins at `first` of a ring of `wrap` rows, or with wrap 0 of a plain run of rows."""
    p = tl.arange(0, BLOCK_P)
    at = first + j
    at = tl.where((wrap > 0) & (at >= wrap), at - wrap, at)
    inside = (j < end)[:, None] & (p < P)[None, :]
    return tl.load(base + at.to(tl.int64)[:, None] * stride + p[None, :], mask=inside, other=0.0)


@triton.jit
def _attend_to(
    acc, total, top, queries, keys, values, K_s, V_s, first, wrap, begin, end, t, ahead, scale, softcap, window,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The running softmax over keys begin ... end - 1 of one run."""
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        key = _tile_of(keys, first, wrap, j, end, K_s, P, BLOCK_P).to(queries.dtype)
        scores = dot(queries, tl.trans(key), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        scores = capped(scores, scale, softcap)
        if MASKED:
            scores = tl.where(_visible(t[:, None], j[None, :], ahead, end, window), scores, -float("inf"))
        shares, faded, total, top = softened(scores, total, top, MASKED)
        value = _tile_of(values, first, wrap, j, end, V_s, P, BLOCK_P).to(queries.dtype)
        acc = dot(shares.to(queries.dtype), value, acc * faded[:, None], PRECISION)
    return acc, total, top


@triton.jit
def _runs(begin, start, end, seen, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For a block of queries: the first key of the ring, and in the segment the first key, the first that all see, and
    the end of the keys."""
    t = begin - start
    from_ring, first, whole = t * 0, t * 0, t * 0
    if window is not None:
        from_ring = tl.maximum(t + seen - window + 1, 0) // BLOCK_N * BLOCK_N
        first = tl.maximum(t - window + 1, 0) // BLOCK_N * BLOCK_N
        whole = tl.minimum(tl.cdiv(tl.maximum(t + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, t)
    return from_ring, first, whole, tl.minimum(t + BLOCK_M, end - start)


@triton.jit
def _forward_kernel(
    q, k, v, ring_k, ring_v, pos, plan, y, lse, capacity, reach, scale, softcap, window,
    q_t, q_head, k_t, k_group, v_t, v_group, K_row, K_s, K_group, V_row, V_s, V_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, FORGETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per block of queries and head."""
    # Heads may lie in memory one whole sequence after the other.
    head, block = (tl.program_id(0) % HEADS).to(tl.int64), plan + tl.program_id(0) // HEADS * 4
    begin, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    sequence, group = tl.load(block + 3).to(tl.int64), head // (HEADS // GROUPS)
    read, seen, oldest = ring_of(pos, sequence, capacity, reach)
    m, p = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
    t, at = begin - start + m, (begin + m).to(tl.int64)
    real = (begin + m < end)[:, None] & (p < P)[None, :]
    queries = tl.load(q + at[:, None] * q_t + head * q_head + p[None, :], mask=real, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    total, top = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), -float("inf"), tl.float32)
    from_ring, first, whole, last = _runs(begin, start, end, seen, window, BLOCK_M, BLOCK_N)
    keys, values = ring_k + sequence * K_row + group * K_group, ring_v + sequence * V_row + group * V_group
    acc, total, top = _attend_to(
        acc, total, top, queries, keys, values, K_s, V_s, oldest, capacity, from_ring, seen, t, seen,
        scale, softcap, window, True, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
    )  # fmt: skip
    keys, values = k + start.to(tl.int64) * k_t + group * k_group, v + start.to(tl.int64) * v_t + group * v_group
    if window is not None:
        acc, total, top = _attend_to(
            acc, total, top, queries, keys, values, k_t, v_t, 0, 0, first, whole, t, 0,
            scale, softcap, window, True, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
        )  # fmt: skip
    acc, total, top = _attend_to(
        acc, total, top, queries, keys, values, k_t, v_t, 0, 0, whole, begin - start, t, 0,
        scale, softcap, window, False, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
    )  # fmt: skip
    acc, total, top = _attend_to(
        acc, total, top, queries, keys, values, k_t, v_t, 0, 0, begin - start, last, t, 0,
        scale, softcap, window, True, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
    )  # fmt: skip
    # Rows of the tile beyond the last token may have seen nothing.
    total = tl.where(begin + m < end, total, 1.0)
    if FORGETS:
        # Tokens that it would look at are gone, and no error can be raised here: see `cache.spoil`.
        total = tl.where((read > 0) & (read >= capacity), float("nan"), total)
    tl.store(lse + at * HEADS + head, top + tl.log2(total), mask=begin + m < end)
    out = (at * HEADS + head)[:, None] * P + p[None, :]
    tl.store(y + out, (acc / total[:, None]).to(y.dtype.element_ty), mask=real)


@triton.jit
def _delta_kernel(dy, y, delta, rows, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """One program per some tokens and heads: how much all weights of each together pull y along dy."""
    row, p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    inside = (row < rows)[:, None] & (p < P)[None, :]
    upstream = tl.load(dy + row[:, None] * P + p[None, :], mask=inside, other=0.0).to(tl.float32)
    out = tl.load(y + row[:, None] * P + p[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(upstream * out, 1), mask=row < rows)


@triton.jit
def _slopes(scores, shares, dshares, delta, softcap):
    """Gradient of the scaled scores."""
    slopes = shares * (dshares - delta)
    if softcap is not None:
        bent = scores / (LOG2E * softcap)
        slopes = slopes * (1.0 - bent * bent)
    return slopes


@triton.jit
def _gradient_from(
    acc, queries, upstream, lse, delta, keys, values, K_s, V_s, first, wrap, begin, end, t, ahead,
    scale, softcap, window, MASKED: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries from keys begin ... end - 1 of one run."""
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        key = _tile_of(keys, first, wrap, j, end, K_s, P, BLOCK_P).to(queries.dtype)
        value = _tile_of(values, first, wrap, j, end, V_s, P, BLOCK_P).to(queries.dtype)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = capped(dot(queries, tl.trans(key), zeros, PRECISION), scale, softcap)
        shares = tl.exp2(scores - lse[:, None])
        if MASKED:
            shares = tl.where(_visible(t[:, None], j[None, :], ahead, end, window), shares, 0.0)
        dshares = dot(upstream, tl.trans(value), zeros, PRECISION)
        slopes = _slopes(scores, shares, dshares, delta[:, None], softcap)
        acc = dot(slopes.to(queries.dtype), key, acc, PRECISION)
    return acc


@triton.jit
def _query_kernel(
    q, k, v, ring_k, ring_v, pos, plan, dy, lse, delta, dq, capacity, reach, scale, softcap, window,
    q_t, q_head, k_t, k_group, v_t, v_group, K_row, K_s, K_group, V_row, V_s, V_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, FORGETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per block of queries and head: the gradient of q."""
    # Heads may lie in memory one whole sequence after the other.
    head, block = (tl.program_id(0) % HEADS).to(tl.int64), plan + tl.program_id(0) // HEADS * 4
    begin, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    sequence, group = tl.load(block + 3).to(tl.int64), head // (HEADS // GROUPS)
    _, seen, oldest = ring_of(pos, sequence, capacity, reach)
    m, p = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
    t, at = begin - start + m, (begin + m).to(tl.int64)
    real = (begin + m < end)[:, None] & (p < P)[None, :]
    out = (at * HEADS + head)[:, None] * P + p[None, :]
    queries = tl.load(q + at[:, None] * q_t + head * q_head + p[None, :], mask=real, other=0.0)
    upstream = tl.load(dy + out, mask=real, other=0.0)
    logs = tl.load(lse + at * HEADS + head, mask=begin + m < end, other=float("inf"))
    pulls = tl.load(delta + at * HEADS + head, mask=begin + m < end, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    from_ring, first, whole, last = _runs(begin, start, end, seen, window, BLOCK_M, BLOCK_N)
    keys, values = ring_k + sequence * K_row + group * K_group, ring_v + sequence * V_row + group * V_group
    acc = _gradient_from(
        acc, queries, upstream, logs, pulls, keys, values, K_s, V_s, oldest, capacity, from_ring, seen, t, seen,
        scale, softcap, window, True, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
    )  # fmt: skip
    keys, values = k + start.to(tl.int64) * k_t + group * k_group, v + start.to(tl.int64) * v_t + group * v_group
    if window is not None:
        acc = _gradient_from(
            acc, queries, upstream, logs, pulls, keys, values, k_t, v_t, 0, 0, first, whole, t, 0,
            scale, softcap, window, True, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
        )  # fmt: skip
    acc = _gradient_from(
        acc, queries, upstream, logs, pulls, keys, values, k_t, v_t, 0, 0, whole, begin - start, t, 0,
        scale, softcap, window, False, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
    )  # fmt: skip
    acc = _gradient_from(
        acc, queries, upstream, logs, pulls, keys, values, k_t, v_t, 0, 0, begin - start, last, t, 0,
        scale, softcap, window, True, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
    )  # fmt: skip
    tl.store(dq + out, (acc * scale).to(dq.dtype.element_ty), mask=real)


@triton.jit
def _gradient_of(
    dkey, dvalue, key, value, q, dy, lse, delta, q_t, head, begin, end, length, start, j, ahead, keys_end,
    scale, softcap, window, MASKED: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values from queries begin ... end - 1 of one head."""
    p = tl.arange(0, BLOCK_P)
    for first in range(begin, end, BLOCK_M):
        t = first + tl.arange(0, BLOCK_M)
        at = (start + t).to(tl.int64)
        real = (t < length)[:, None] & (p < P)[None, :]
        queries = tl.load(q + at[:, None] * q_t + p[None, :], mask=real, other=0.0)
        upstream = tl.load(dy + (at * HEADS + head)[:, None] * P + p[None, :], mask=real, other=0.0)
        logs = tl.load(lse + at * HEADS + head, mask=t < length, other=float("inf"))
        pulls = tl.load(delta + at * HEADS + head, mask=t < length, other=0.0)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        scores = capped(dot(key, tl.trans(queries), zeros, PRECISION), scale, softcap)
        shares = tl.exp2(scores - logs[None, :])
        if MASKED:
            shares = tl.where(_visible(t[None, :], j[:, None], ahead, keys_end, window), shares, 0.0)
        dvalue = dot(shares.to(key.dtype), upstream, dvalue, PRECISION)
        dshares = dot(value, tl.trans(upstream), zeros, PRECISION)
        slopes = _slopes(scores, shares, dshares, pulls[None, :], softcap)
        dkey = dot(slopes.to(key.dtype), queries, dkey, PRECISION)
    return dkey, dvalue


@triton.jit
def _pair_of(keys, values, at, K_s, V_s, inside, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """A block of keys and its values."""
    p = tl.arange(0, BLOCK_P)
    mask = inside[:, None] & (p < P)[None, :]
    key = tl.load(keys + at[:, None] * K_s + p[None, :], mask=mask, other=0.0)
    return key, tl.load(values + at[:, None] * V_s + p[None, :], mask=mask, other=0.0)


@triton.jit
def _key_kernel(
    q, k, v, ring_k, ring_v, pos, plan, dy, lse, delta, dk, dv, capacity, reach, scale, softcap, window,
    q_t, q_head, k_t, k_group, v_t, v_group, K_row, K_s, K_group, V_row, V_s, V_group,
    dk_t, dk_group, dv_t, dv_group, dk_row, dv_row, OF_RING: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, FORGETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program per block of keys, of the segment or OF_RING, and group: the gradients of k and v."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    group, block = (tl.program_id(0) % GROUPS).to(tl.int64), plan + tl.program_id(0) // GROUPS * 4
    begin, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    sequence, length = tl.load(block + 3).to(tl.int64), end - start
    n, p = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    if OF_RING:
        _, keys_end, oldest = ring_of(pos, sequence, capacity, reach)
        j, ahead, first, last = begin + n, keys_end, 0 * length, tl.where(begin < keys_end, length, 0)
        at = oldest + j
        at = tl.where(at >= capacity, at - capacity, at).to(tl.int64)
        keys, values = ring_k + sequence * K_row + group * K_group, ring_v + sequence * V_row + group * V_group
        key, value = _pair_of(keys, values, at, K_s, V_s, j < keys_end, P, BLOCK_P)
    else:
        keys_end, ahead, first, last = length, 0, begin - start, length
        j, at = first + n, (begin + n).to(tl.int64)
        key, value = _pair_of(k + group * k_group, v + group * v_group, at, k_t, v_t, j < keys_end, P, BLOCK_P)
    key, value = key.to(q.dtype.element_ty), value.to(q.dtype.element_ty)
    if window is not None:
        # The last key of the block is seen up to window - 1 tokens later.
        last = tl.minimum(last, tl.maximum(tl.max(j, 0) - ahead + window, 0))
    dkey, dvalue = tl.zeros((BLOCK_N, BLOCK_P), tl.float32), tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for i in range(PER_GROUP):
        head = group * PER_GROUP + i
        masked = last
        if window is None and not OF_RING:
            masked = tl.minimum(first + BLOCK_N, length)
        dkey, dvalue = _gradient_of(
            dkey, dvalue, key, value, q + head * q_head, dy, lse, delta, q_t, head, first, masked, length, start, j,
            ahead, keys_end, scale, softcap, window, True, HEADS, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
        )  # fmt: skip
        if window is None and not OF_RING:
            dkey, dvalue = _gradient_of(
                dkey, dvalue, key, value, q + head * q_head, dy, lse, delta, q_t, head, masked, last, length, start, j,
                ahead, keys_end, scale, softcap, window, False, HEADS, PRECISION, P, BLOCK_M, BLOCK_N, BLOCK_P,
            )  # fmt: skip
    out_k, out_v = dk + sequence * dk_row + group * dk_group, dv + sequence * dv_row + group * dv_group
    inside = (j < keys_end)[:, None] & (p < P)[None, :]
    tl.store(out_k + at[:, None] * dk_t + p[None, :], (dkey * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(out_v + at[:, None] * dv_t + p[None, :], dvalue.to(dv.dtype.element_ty), mask=inside)
