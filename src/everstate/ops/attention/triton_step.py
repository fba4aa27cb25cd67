"""One token of attention on a GPU: the ring is read where it lies, as far as it is filled, by several programs per row.

The tokens that a query sees are counted in order of time: `seen` of them, the oldest in slot `oldest`, wrapping around
at the end of the ring. They are cut into as many *splits* as fill the GPU, all of one length, which each row finds out
from its own position: nothing waits for the host, and the time is that of what was read and not of the capacity. A
small kernel joins the splits, always in the same order, and moves the position on. With pages a slot is looked up in
the table of its row; a block that is not there makes a key of NaN, and no address.

The token itself is no part of the ring yet: the first split begins with it, and writes it to a slot that nobody reads.
Its queries and key are turned here, in each program, which costs less than a launch in front of this one.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; Milakov and Gimelshein 2018 (arXiv 1805.02867).
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.state import Slots
from everstate.ops.attention.cache import AttentionState, Pages, capacity_of
from everstate.ops.attention.rope import Rope
from everstate.ops.rotary.limits import width_of
from everstate.ops.rotary.triton import frequencies, turned_with, turns_of
from everstate.ops.triton_common import LOG2E, dot
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import (
    dense,
    follow_last,
    launch_options,
    reads_early,
    slot_of,
    start_next,
    wait_for_last,
)

PROGRAMS = 4
"""Programs per multiprocessor that the splits should make."""
SHORTEST = 256
"""Tokens of a split, at least: fewer are not worth the joining."""


def attention_step_(
    q: Float[Tensor, "b h p"],
    k: Float[Tensor, "b g p"],
    v: Float[Tensor, "b g p"],
    state: AttentionState,
    slots: Slots = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rope: Rope | None = None,
    pages: Pages = None,
) -> Float[Tensor, "b h p"]:
    """See `everstate.ops.attention_step_`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    theta, interleaved, width = 1.0, False, 0
    if rope is not None:
        theta, interleaved, width = rope.theta, rope.interleaved, width_of(q.shape[-1], rope.rotary_dim)
    return _step(
        q, k, v, state.k, state.v, state.pos, slots, pages, window, scale, softcap, theta, interleaved, width
    )  # fmt: skip


@kernel_op("attention_step_", mutates={"ring_k", "ring_v", "pos"})
def _step(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, pos: Tensor, slots: Tensor | None,
    pages: Tensor | None, window: int | None, scale: float, softcap: float | None, theta: float, interleaved: bool,
    width: int,
) -> Tensor:  # fmt: skip
    (batch, heads, headdim), (size, groups) = q.shape, ring_k.shape[1:3]
    capacity = capacity_of(ring_k, pages)
    y = q.new_empty(batch, heads, headdim)
    if batch == 0:
        return y
    q, k, v = dense(q), dense(k), dense(v)
    sizes = _tiles(q, heads // groups, headdim, pages is not None)
    blocks = groups * cdiv(heads // groups, sizes["BLOCK_M"])
    reach = capacity if window is None else min(capacity, window)
    splits = _splits(batch * blocks, reach, q.device)
    sums = q.new_empty(batch, heads, splits, headdim, dtype=torch.float32)
    weights = q.new_empty(batch, heads, splits, 2, dtype=torch.float32)
    launch(
        _split_kernel, (batch * blocks * splits,),
        q, k, v, ring_k, ring_v, pos, slots, None if pages is None else pages.contiguous(), sums, weights,
        frequencies(width, theta, q.device) if width else None,
        splits, capacity, reach, scale, softcap, len(ring_k),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *ring_k.stride()[:3], *ring_v.stride()[:3],
        SIZE=size if pages is not None else 0, HEADS=heads, GROUPS=groups, P=headdim,
        TURNED=width, INTERLEAVED=interleaved, FORGETS=window is None or capacity < window,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        EARLY=pages is None and reads_early(slots, batch), **sizes, **launch_options(q.device),
    )  # fmt: skip
    joined = power_of_2(splits)
    part = min(power_of_2(headdim), max(8192 // joined, 16))
    launch(
        _join_kernel, (batch * heads, cdiv(headdim, part)),
        sums, weights, y, pos, slots, splits,
        HEADS=heads, P=headdim, BLOCK_SPLITS=joined, BLOCK_P=part, num_warps=4, **launch_options(q.device),
    )  # fmt: skip
    return y


@_step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, pos: Tensor, slots: Tensor | None,
    pages: Tensor | None, window: int | None, scale: float, softcap: float | None, theta: float, interleaved: bool,
    width: int,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


def _tiles(q: Tensor, per_group: int, headdim: int, paged: bool) -> dict[str, int]:
    """Heads of a program, keys that it reads at once, and how many of those loads are under way.

    Where a page has to be read before a key can be asked for, one more is worth the memory that it takes.
    """
    # A side of a float32 product is 32 or more: see the traps in docs/learn/kernels.md.
    wide, least = q.dtype == torch.float32, 32 if q.dtype == torch.float32 else 16
    block_p = max(power_of_2(headdim), least)
    block_s = max(min(8192 // block_p // (2 if wide else 1), 128), 32)
    block_m = min(max(power_of_2(per_group), least), 32 if wide and block_p > 128 else 64)
    return {"BLOCK_M": block_m, "BLOCK_S": block_s, "BLOCK_P": block_p, "num_warps": 4, "num_stages": 3 if paged else 2}


def _splits(programs: int, reach: int, device: torch.device) -> int:
    """Into how many parts each row's ring is cut, of which a query sees at most `reach` tokens."""
    return max(min(PROGRAMS * processors(device) // programs, cdiv(reach, SHORTEST)), 1)


@triton.jit
def capped(scores, scale, softcap):
    """The scores in powers of two."""
    scores = scores * scale
    if softcap is not None:
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))  # tanh
    return scores * LOG2E


@triton.jit
def softened(scores, total, top, MASKED: tl.constexpr):
    """A step of a running softmax: shares of these scores, how much earlier ones fade, the new total and maximum."""
    higher = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen nothing yet must not subtract infinities.
    base = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
    faded, shares = tl.exp2(top - base), tl.exp2(scores - base[:, None])
    return shares, faded, total * faded + tl.sum(shares, 1), higher


@triton.jit
def ring_of(pos, sequence, capacity, reach):
    """Tokens read, those of them in the ring that some query sees, and the slot of the oldest of these."""
    read = tl.load(pos + sequence).to(tl.int64)
    seen = tl.minimum(read, reach).to(tl.int32)
    return read, seen, ((read - seen) % tl.maximum(capacity, 1)).to(tl.int32)


@triton.jit
def located(pages, slot, place, asked, capacity, blocks, SIZE: tl.constexpr):
    """A slot of a ring as the first two indices of the pool; and whether there is such a block."""
    there = asked
    if pages is not None:
        block = tl.load(pages + slot * (capacity // SIZE) + place // SIZE, mask=asked, other=0).to(tl.int64)
        there = (block >= 0) & (block < blocks)
        slot, place = tl.where(there, block, 0), place % SIZE
    return slot, place, there


@triton.jit
def _split_kernel(
    q, k, v, ring_k, ring_v, pos, slots, pages, sums, weights, frequencies, splits, capacity, reach, scale, softcap,
    blocks, q_row, q_head, k_row, k_group, v_row, v_group, K_slot, K_s, K_group, V_slot, V_s, V_group,
    SIZE: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr, FORGETS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row, block of heads of one group, and split."""
    start_next(OVERLAP)
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    row, group, block, split = _program(splits, GROUPS, (PER_GROUP + BLOCK_M - 1) // BLOCK_M)
    m, s, p = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    head, real = group * PER_GROUP + m, (m < PER_GROUP)[:, None] & (p < P)[None, :]
    keys, values = ring_k + group * K_group, ring_v + group * V_group
    if not EARLY:
        wait_for_last(OVERLAP)
    slot = slot_of(slots, row)
    read, seen, oldest = ring_of(pos, slot, capacity, reach - 1)
    each = tl.cdiv(tl.cdiv(seen, BLOCK_S), splits) * BLOCK_S
    start, end = split * each, tl.minimum((split + 1) * each, seen)
    # The first keys and values of the ring are asked for, as states are, before the kernel before has ended.
    old_keys, old_values, asked, there = _tiles_of(
        pages, slot, oldest, start, end, s, p, keys, values, capacity, blocks, K_slot, K_s, V_slot, V_s, P, SIZE
    )
    turns = turns_of(read, frequencies, p, TURNED, INTERLEAVED) if TURNED > 0 else ()
    if EARLY:
        wait_for_last(OVERLAP)
    queries, key, value = _token(
        q + row * q_row + head[:, None] * q_head, k + row * k_row + group * k_group, v + row * v_row + group * v_group,
        turns, real, p, P, TURNED,
    )  # fmt: skip
    acc, total, top = _own(queries, key, value, split == 0, scale, softcap)
    kept = _keep(
        pages, slot, read % capacity, keys, values, key, value, p, (split == 0) & (block == 0), capacity, blocks,
        K_slot, K_s, V_slot, V_s, P, SIZE,
    )  # fmt: skip
    total = tl.where(kept, total, float("nan"))
    acc, total, top = _attend(
        queries, old_keys, old_values, asked, there, pages, scale, softcap, acc, total, top, True, PRECISION
    )
    for later in range(start + BLOCK_S, end, BLOCK_S):
        old_keys, old_values, asked, there = _tiles_of(
            pages, slot, oldest, later, end, s, p, keys, values, capacity, blocks, K_slot, K_s, V_slot, V_s, P, SIZE
        )
        acc, total, top = _attend(
            queries, old_keys, old_values, asked, there, pages, scale, softcap, acc, total, top, False, PRECISION
        )
    if FORGETS:  # tokens that it would look at, and no error can be raised here: see `cache.spoil`
        total = tl.where(read >= capacity, float("nan"), total)
    _leave(sums, weights, acc, total, top, (row * HEADS + head) * splits + split, real, m < PER_GROUP, p, P)


@triton.jit
def _program(splits, GROUPS: tl.constexpr, BLOCKS: tl.constexpr):
    """What a program is for: a row, a group, a block of its heads, and a split."""
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits % BLOCKS
    group = tl.program_id(0) // splits // BLOCKS % GROUPS
    row = (tl.program_id(0) // splits // BLOCKS // GROUPS).to(tl.int64)
    return row, group, block, split


@triton.jit
def _token(own_queries, own_key, own_value, turns, real, p, P: tl.constexpr, TURNED: tl.constexpr):
    """Queries, key and value of the token, the first two turned by its position."""
    queries = tl.load(own_queries + p[None, :], mask=real, other=0.0)
    key = tl.load(own_key + p, mask=p < P, other=0.0)
    if TURNED > 0:
        other, cos, sin = turns
        others = tl.load(own_queries + other[None, :], mask=real & (p < TURNED)[None, :], other=0.0)
        queries = turned_with(queries, others, cos[None, :], sin[None, :])
        key = turned_with(key, tl.load(own_key + other, mask=p < TURNED, other=0.0), cos, sin)
    return queries, key, tl.load(own_value + p, mask=p < P, other=0.0)


@triton.jit
def _own(queries, key, value, first, scale, softcap):
    """What the token sees of itself, weighted sum, total and maximum: only the first split has it."""
    own = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    top = tl.where(first, capped(own, scale, softcap), -float("inf"))
    total = tl.where(first, 1.0, 0.0) + tl.zeros_like(own)
    return total[:, None] * value.to(tl.float32)[None, :], total, top


@triton.jit
def _keep(
    pages, slot, place, keys, values, key, value, p, asked, capacity, blocks, K_slot, K_s, V_slot, V_s,
    P: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the token to its place, if that is asked for. Returns whether there is a block to write to."""
    index, place, there = located(pages, slot, place, place >= 0, capacity, blocks, SIZE)
    mask = (p < P) & asked & there
    tl.store(keys + index * K_slot + place * K_s + p, key.to(keys.dtype.element_ty), mask=mask)
    tl.store(values + index * V_slot + place * V_s + p, value.to(values.dtype.element_ty), mask=mask)
    return there


@triton.jit
def _tiles_of(
    pages, slot, oldest, start, end, s, p, keys, values, capacity, blocks, K_slot, K_s, V_slot, V_s,
    P: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Keys and values of the ring from the token `start` of those that are seen on; which of them were asked for, and
    which are there."""
    at = oldest + start + s
    place, asked = tl.where(at >= capacity, at - capacity, at).to(tl.int64), start + s < end
    index, place, there = located(pages, slot, place, asked, capacity, blocks, SIZE)
    old_keys = _rows_of(keys + index * K_slot + place * K_s, asked, p, P)
    return old_keys, _rows_of(values + index * V_slot + place * V_s, asked, p, P), asked, there


@triton.jit
def _attend(
    queries, keys, values, asked, there, pages, scale, softcap, acc, total, top,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of attention: the new weighted sum of values, total and maximum. MASKED where perhaps no key is there."""
    scores = dot(queries, tl.trans(keys.to(queries.dtype)), None, PRECISION)
    scores = _shown(capped(scores, scale, softcap), asked, there, pages)
    shares, faded, total, top = softened(scores, total, top, MASKED)
    return dot(shares.to(queries.dtype), values.to(queries.dtype), acc * faded[:, None], PRECISION), total, top


@triton.jit
def _leave(sums, weights, acc, total, top, at, real, is_head, p, P: tl.constexpr):
    """Write what a split has found."""
    tl.store(sums + at[:, None] * P + p[None, :], acc, mask=real & (top > -float("inf"))[:, None])
    tl.store(weights + at * 2, top, mask=is_head)
    tl.store(weights + at * 2 + 1, total, mask=is_head)


@triton.jit
def _rows_of(rows, asked, p, P: tl.constexpr):
    """Keys or values that begin at these places of the pool."""
    return tl.load(rows[:, None] + p[None, :], mask=asked[:, None] & (p < P)[None, :], other=0.0)


@triton.jit
def _shown(scores, asked, there, pages):
    """Scores of the keys that were asked for; those of a block that is not there are no numbers."""
    if pages is not None:
        scores = tl.where(there[None, :], scores, float("nan"))
    return tl.where(asked[None, :], scores, -float("inf"))


@triton.jit
def _join_kernel(
    sums, weights, y, pos, slots, splits,
    HEADS: tl.constexpr, P: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row, head and part of p; the first of a row moves its position on."""
    follow_last(OVERLAP)
    at, p = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    split = tl.arange(0, BLOCK_SPLITS)
    tops = tl.load(weights + (at * splits + split) * 2, mask=split < splits, other=-float("inf"))
    totals = tl.load(weights + (at * splits + split) * 2 + 1, mask=split < splits, other=0.0)
    shares = tl.exp2(tops - tl.max(tops, 0))
    # Splits without a token wrote no sums. One of NaN did: not so written that a comparison would lose it.
    inside = (tops != -float("inf"))[:, None] & (p < P)[None, :]
    part = tl.load(sums + (at * splits + split)[:, None] * P + p[None, :], mask=inside, other=0.0)
    out = tl.sum(part * shares[:, None], 0) / tl.sum(totals * shares, 0)
    tl.store(y + at * P + p, out.to(y.dtype.element_ty), mask=p < P)
    if at % HEADS == 0 and tl.program_id(1) == 0:
        slot = slot_of(slots, at // HEADS)
        tl.store(pos + slot, tl.load(pos + slot) + 1)
