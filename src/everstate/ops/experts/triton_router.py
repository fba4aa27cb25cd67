"""The experts of a few tokens on a GPU in one launch: logits, scores, the best of them and their weights.

A token has several programs, each with some experts, or one would read all weights of the router by itself. The last of
them to end has all logits, and chooses.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import counters, kernel_op
from everstate.ops.experts.route import Score
from everstate.ops.norm.normed import Normed, as_normed
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import dense_rows, launch_options, rstd_of, start_next, wait_for_last

NONE: tl.constexpr = tl.constexpr(-float("inf"))
"""The chance of an expert that has been chosen, or is none."""
LEAST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
"""The chance of any other, at least."""
EXPERTS = 4
"""Experts of a program."""
PIECE = 2048
"""Numbers of each that it reads at once, the first of them before the kernel before has ended."""


def topk_router(
    x: Float[Tensor, "*t d"] | Normed,
    weight: Float[Tensor, "e d"],
    *,
    top_k: int,
    score: Score = "softmax_topk",
    bias: Float[Tensor, " e"] | None = None,
    normalise: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    ngroups: int = 1,
    topk_groups: int = 1,
) -> tuple[Float[Tensor, "*t k"], Int[Tensor, "*t k"]]:
    """See `everstate.ops.topk_router`."""
    x, squares, norm_eps = as_normed(x)
    made = _router(
        dense_rows(x), squares, norm_eps, weight, bias, top_k, score, normalise, eps, scale, ngroups, topk_groups
    )
    weights, indices = (t.view(*x.shape[:-1], top_k) for t in made)
    return weights, indices


@kernel_op("topk_router")
def _router(
    x: Tensor, squares: Tensor | None, norm_eps: float, weight: Tensor, bias: Tensor | None, top_k: int, score: str,
    normalise: bool, eps: float, scale: float, ngroups: int, topk_groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count, width = weight.shape
    weights, indices = _results(x, top_k)
    logits = weights.new_empty(len(x), count)
    programs, parts = cdiv(count, EXPERTS), 0 if squares is None else squares.shape[-1]
    launch(
        _router_kernel, (len(x) * programs,),
        x, squares, weight, bias, logits, weights, indices, counters(x.device, len(x)), x.stride(0), parts, norm_eps,
        eps, scale, PARTS=power_of_2(max(parts, 1)), PROGRAMS=programs, COUNT=count, WIDTH=width, TOP_K=top_k,
        SCORE=score, NORMALISE=normalise, GROUPS=ngroups, KEPT=topk_groups, BLOCK_E=EXPERTS,
        BLOCK_D=min(power_of_2(width), PIECE), BLOCK=power_of_2(count), BLOCK_K=power_of_2(top_k), num_warps=4,
        **launch_options(x.device),
    )  # fmt: skip
    return weights, indices


@_router.register_fake
def _(
    x: Tensor, squares: Tensor | None, norm_eps: float, weight: Tensor, bias: Tensor | None, top_k: int, score: str,
    normalise: bool, eps: float, scale: float, ngroups: int, topk_groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _results(x, top_k)


def _results(x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]  # `len(x)` would be a number, and a compiler should serve any
    return x.new_empty(rows, top_k, dtype=torch.float32), x.new_empty(rows, top_k, dtype=torch.int64)


@triton.jit
def _router_kernel(
    x, squares, weight, bias, logits, weights, indices, arrived, x_row, parts, norm_eps, eps, scale,
    PARTS: tl.constexpr, PROGRAMS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    SCORE: tl.constexpr, NORMALISE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per token and some experts; the last of a token chooses for it."""
    start_next(OVERLAP)
    row, part = (tl.program_id(0) // PROGRAMS).to(tl.int64), tl.program_id(0) % PROGRAMS
    e, d = part * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    own = weight + e[:, None] * WIDTH + d[None, :]
    known = (e < COUNT)[:, None]
    first = tl.load(own, mask=known & (d < WIDTH)[None, :], other=0.0).to(tl.float32)
    wait_for_last(OVERLAP)
    x += row * x_row
    sums = first * tl.load(x + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
    for start in tl.static_range(BLOCK_D, WIDTH, BLOCK_D):
        inside = start + d < WIDTH
        w = tl.load(own + start, mask=known & inside[None, :], other=0.0).to(tl.float32)
        sums += w * tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    logit_of = tl.sum(sums, 1)
    if squares is not None:
        logit_of = logit_of * rstd_of(squares, row, parts, norm_eps, WIDTH, PARTS)
    tl.store(logits + row * COUNT + e, logit_of, mask=e < COUNT)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
        tl.store(arrived + row, 0)  # as the next kernel wants to find it
        at = tl.arange(0, BLOCK)
        # Past the cache of a multiprocessor, which knows nothing of what others write.
        logit = tl.load(logits + row * COUNT + at, mask=at < COUNT, other=NONE, cache_modifier=".cg")
        score = _scores(logit, SCORE)
        chance = score
        if bias is not None:
            chance += tl.load(bias + at, mask=at < COUNT, other=0.0).to(tl.float32)
        # NaN is chosen first, as by PyTorch. Compared as it is, threads would not agree where the largest number is.
        chance = tl.where(chance == chance, tl.maximum(chance, LEAST), float("inf"))
        chance = tl.where(at < COUNT, chance, NONE)
        if KEPT < GROUPS:
            chance = _of_best_groups(chance, at, COUNT // GROUPS, GROUPS, KEPT)
        share, chosen = _best(score, chance, at, TOP_K, BLOCK_K)
        share = _weights(share, eps, scale, TOP_K, BLOCK_K, SCORE, NORMALISE)
        k = tl.arange(0, BLOCK_K)
        tl.store(weights + row * TOP_K + k, share, mask=k < TOP_K)
        tl.store(indices + row * TOP_K + k, chosen.to(tl.int64), mask=k < TOP_K)


@triton.jit
def _scores(logit, SCORE: tl.constexpr):
    """What the best are taken of; minus infinity stands for no expert."""
    score = logit
    if SCORE == "softmax_topk":
        powers = tl.exp(logit - tl.max(logit, 0))
        score = powers / tl.sum(powers, 0)
    if SCORE == "sigmoid":
        score = tl.sigmoid(logit)
    return score


@triton.jit
def _of_best_groups(chance, at, SIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr):
    """The same, with minus infinity outside the groups whose two best have the largest sums."""
    ours, group = tl.zeros_like(chance) + NONE, at // SIZE
    for g in tl.static_range(GROUPS):
        own = tl.where(group == g, chance, NONE)
        best, where = tl.max(own, 0, return_indices=True)
        if SIZE > 1:
            best += tl.max(tl.where(at == where, NONE, own), 0)
        # The sum stands at the group's first expert.
        ours = tl.where(at == g * SIZE, best, ours)
    kept = at < 0
    for _ in tl.static_range(KEPT):
        _best_of, where = tl.max(ours, 0, return_indices=True)
        kept = kept | (group == where // SIZE)
        ours = tl.where(at == where, NONE, ours)
    return tl.where(kept, chance, NONE)


@triton.jit
def _best(score, chance, at, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scores and places of the best, best first."""
    k = tl.arange(0, BLOCK_K)
    share, chosen = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int32)
    for i in tl.static_range(TOP_K):
        _chance, where = tl.max(chance, 0, return_indices=True)
        share = tl.where(k == i, tl.sum(tl.where(at == where, score, 0.0), 0), share)
        chosen = tl.where(k == i, where, chosen)
        chance = tl.where(at == where, NONE, chance)
    return share, chosen


@triton.jit
def _weights(
    share, eps, scale, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, SCORE: tl.constexpr, NORMALISE: tl.constexpr
):  # fmt: skip
    """The weights of the chosen experts."""
    real = tl.arange(0, BLOCK_K) < TOP_K
    if SCORE == "topk_softmax":
        powers = tl.where(real, tl.exp(share - tl.max(tl.where(real, share, NONE), 0)), 0.0)
        share = powers / tl.sum(powers, 0)
    if NORMALISE:
        share = share / tl.maximum(tl.sum(tl.where(real, share, 0.0), 0) + eps, 1.1754943508222875e-38)
    return share * scale
