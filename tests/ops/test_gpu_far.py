"""Kernels whose tensors are so large that an offset in them does not fit into 32 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.bench.examples import in_precision, lower
from everstate.bench.kernels import norm_error
from everstate.bench.peer_ops import is_number, run_op
from everstate.bench.shapes import GPU_SHAPES, SHAPES, STEPS, Shape, experts, op_of
from everstate.core.op import Op
from everstate.core.packing import Packing
from everstate.core.state import clone, gather, map_state, scatter_, tensors
from everstate.ops import OPS, AttentionState, TrapezoidState, use
from everstate.ops.example import Draw, Example
from everstate.ops.ssd.limits import CHUNK
from everstate.ops.trapezoid import wrap
from tests.ops.test_gpu_laws import ROWS, call, normal, rows, ssd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FAR = 2**31
"""Numbers of a tensor beyond which an offset does not fit into 32 bits."""

FAR_WIDTH, KEPT = 8192, 1024
"""Numbers of x for each token, and last tokens that are compared; what is before the second half is forgotten there."""

MANY = 4 * FAR // FAR_WIDTH**2 + 1
"""Experts whose weights are large, too."""


def of_time(example: Example) -> int:
    """Numbers of the largest tensor that has a row for each token; a complex one is two."""
    return max(t.numel() * (2 if t.is_complex() else 1) for t in example.timed.values())


def of_outputs(example: Example) -> int:
    return example.timed["x"].numel() * example.timed["B"].shape[2]


def of_states(example: Example) -> int:
    """Numbers of the states between the chunks, which backward keeps."""
    entries = example.timed["x"].shape[1] * example.timed["B"].shape[2]
    return tensors(example.state)[0].numel() * entries // CHUNK


def of_logits(example: Example) -> int:
    return example.timed["x"].shape[1] * len(example.fixed["weight"])


def small_states(draw: Draw, d_inner: int, length: int) -> Example:
    given = ssd(1, length, d_inner // 64, 64, 16)
    timed = {key: given.pop(key) for key in ("x", "a", "s", "B", "C")}
    return Example(timed, given.pop("state"), given)


def forgetful(draw: Draw, d_inner: int, length: int) -> Example:
    """A model has channels that remember thousands of tokens."""
    example = SHAPES["selective_scan"](draw, d_inner, length)
    return example._replace(fixed={**example.fixed, "dt_bias": draw.normal(d_inner, scale=0.1) - 2.0})


def complex_numbers(draw: Draw, d_inner: int, length: int) -> Example:
    radius, angle = (draw.uniform(1, length, d_inner, high=high) for high in (1.0, math.tau))
    timed = {"a": torch.polar(radius, angle), "b": draw.complex(1, length, d_inner)}
    return Example(timed, state=draw.complex(1, d_inner))


def all_logits(draw: Draw, d_inner: int, length: int) -> Example:
    example = GPU_SHAPES["linear_cross_entropy"](draw, d_inner, length)
    return example._replace(fixed={"weight": example.fixed["weight"], "chunk_size": length})


def packed_after_many(draw: Draw, d_inner: int, length: int) -> Example:
    """Packed sequences that go on from almost full rings; as many heads of keys as of queries: each tensor is large."""
    heads, rows = d_inner // 128, length // KEPT
    ring = lambda: draw.normal(rows, KEPT, heads, 128)
    pos = torch.full((rows,), KEPT - 1, device=draw.device)
    return Example(
        timed={name: draw.normal(1, length, heads, 128) for name in "qkv"},
        state=AttentionState(ring(), ring(), pos),
        fixed={"packing": Packing.of_lengths([KEPT] * rows)},
    )


FAR_SCANS: dict[str, tuple[Shape, Callable[[Example], int]]] = {
    "ssd_scan": (SHAPES["ssd_scan"], of_time),
    "ssd_scan, small states": (small_states, of_time),
    "trapezoid_scan": (GPU_SHAPES["trapezoid_scan"], of_outputs),
    "trapezoid_scan, 4 ranks": (GPU_SHAPES["trapezoid_scan, 4 ranks"], of_outputs),
    "trapezoid_scan, states": (GPU_SHAPES["trapezoid_scan"], of_states),
    "trapezoid_scan, states of 4 ranks": (GPU_SHAPES["trapezoid_scan, 4 ranks"], of_states),
    "selective_scan": (forgetful, of_time),
    "linear_scan": (SHAPES["linear_scan"], of_time),
    "linear_scan, complex": (complex_numbers, of_time),
    "causal_conv1d": (SHAPES["causal_conv1d"], of_time),
    "rotary": (GPU_SHAPES["rotary"], of_time),
    "linear_cross_entropy": (all_logits, of_logits),
    "attention": (packed_after_many, of_time),
    "experts": (partial(experts, count=MANY, top_k=2), of_time),
}
"""What is drawn, and the numbers of its largest tensor. Where that is states, the kernels for Hopper GPUs serve, which
refuse more than FAR outputs."""


FAR_STEPS: dict[str, Shape] = {
    "ssd_step_": SHAPES["ssd_scan"],
    "causal_conv1d_step_": SHAPES["causal_conv1d"],
    "selective_step_": SHAPES["selective_scan"],
    "trapezoid_step_": SHAPES["trapezoid_scan"],
    "mamba3_step_": STEPS["mamba3_step_"],
}


def drawn() -> Draw:
    return Draw(dtype=torch.float32, device="cuda", drawn_on="cuda")


def alone(example: Example) -> Example:
    """The last tokens, with nothing of those before them but how far they have turned."""
    timed, state = {key: value[:, -KEPT:].clone() for key, value in example.timed.items()}, example.state
    if "packing" in example.fixed:
        state = map_state(lambda t: t[-1:].clone(), state)
        return Example(timed, state, {**example.fixed, "packing": Packing.of_lengths([KEPT])})
    if isinstance(state, TrapezoidState):
        dt, omega = (example.timed[key][0, :-KEPT].double() for key in ("dt", "omega"))
        state = state._replace(angle=wrap(state.angle + dt.T @ omega).float())
    return example._replace(timed=timed, state=state)


def differentiated(example: Example) -> list[Tensor]:
    """What has a row for each token, and weights that are large themselves."""
    large = [t for t in example.fixed.values() if isinstance(t, Tensor) and t.numel() > FAR]
    return [t for t in example.timed.values() if is_number(t)] + large


def far_scan(op: str, shape: Shape, numbers: Callable[[Example], int]) -> Iterator[float]:
    """The last tokens of a long sequence, which no longer know how it began, alone; and their gradients."""
    draw, last = drawn(), slice(-KEPT // 2, None)
    each = numbers(shape(draw, FAR_WIDTH, KEPT)) // KEPT
    far = lower(shape(draw, FAR_WIDTH, FAR // each + KEPT))
    assert numbers(far) > FAR
    near = alone(far)
    leaves, wanted = ([t.requires_grad_() for t in differentiated(one)] for one in (far, near))
    with use("triton"):
        (y, *final), (y_near, *final_near) = run_op(op, far), run_op(op, near)
    yield norm_error(y[:, last], y_near[:, last])
    if final:
        yield norm_error(final[0][-1:], final_near[0])
    upstream = torch.randn_like(y_near[:, last])
    gradients = torch.autograd.grad(y[:, last], leaves, upstream)
    for got, want in zip(gradients, torch.autograd.grad(y_near[:, last], wanted, upstream), strict=True):
        yield norm_error(got[:, last], want[:, last])


def far_rows(name: str) -> Iterator[float]:
    """The last rows of many, alone; and their gradients."""
    width, kept = 2048, 50
    given = {key: t.bfloat16() for key, t in rows(name, width, FAR // width + kept, torch.bfloat16).items()}
    timed = [key for key in given if key != "weight"]
    near = {key: value[-kept:].clone() if key in timed else value for key, value in given.items()}
    for inputs in (given, near):
        for key in timed:
            inputs[key].requires_grad_()
    far_outputs, near_outputs = call(name, given), call(name, near)
    for got, want in zip(far_outputs, near_outputs, strict=True):
        yield norm_error(got[-kept:], want)
    upstream = normal(*near_outputs[-1].shape)
    gradients = torch.autograd.grad(far_outputs[-1][-kept:], [given[key] for key in timed], upstream)
    wanted = torch.autograd.grad(near_outputs[-1], [near[key] for key in timed], upstream)
    for got, want in zip(gradients, wanted, strict=True):
        yield norm_error(got[-kept:], want)


def far_step(name: str) -> Iterator[float]:
    """A token for the last row of a pool."""
    step = OPS[name]
    example = lower(FAR_STEPS[name](drawn(), 4096, 1))
    now = {key: value[:, 0] for key, value in example.timed.items()}
    largest = max(t.numel() for t in tensors(example.state))
    state = in_precision(example.state, torch.bfloat16)
    pool = map_state(lambda t: t.new_zeros(FAR // largest + 10, *t.shape[1:]), state)
    assert max(t.numel() for t in tensors(pool)) > FAR
    slot = torch.tensor([FAR // largest + 9], device="cuda")
    scatter_(pool, slot, state)
    alone = clone(gather(pool, slot))
    yield from far_pool(step, {**now, **example.fixed}, {"state": pool, "slots": slot}, {"state": alone})
    for one, other in zip(tensors(gather(pool, slot)), tensors(alone), strict=True):
        yield norm_error(one, other)


def far_pool(
    step: Op[..., Tensor], given: dict[str, Any], pool: dict[str, Any], alone: dict[str, Any]
) -> Iterator[float]:
    """What a step returns that finds its state in a pool, against one that has it alone."""
    verdict = step.explain(**given, **pool).get("triton")
    assert verdict == "accepts", verdict
    with use("triton"), torch.no_grad():
        yield norm_error(step(**given, **pool), step(**given, **alone))


def far_pages() -> Iterator[float]:
    """A token of one sequence, whose keys and values are the last blocks of a pool."""
    example = lower(STEPS["attention_step_, paged"](drawn(), 4096, 1))
    now = {key: value[:, 0] for key, value in example.timed.items()}
    alone, pages = in_precision(example.state, torch.bfloat16), example.fixed["pages"]
    more = FAR // alone.k[0].numel() + 1
    grown = lambda t: torch.cat([t.new_zeros(more, *t.shape[1:]), t])
    pool = AttentionState(grown(alone.k), grown(alone.v), alone.pos.clone())
    assert pool.k.numel() > FAR
    yield from far_pool(
        OPS["attention_step_"], now, {"state": pool, "pages": pages + more}, {"state": alone, "pages": pages}
    )
    yield norm_error(pool.k[more:], alone.k)
    yield norm_error(pool.v[more:], alone.v)


FAR_CHECKS: dict[str, Callable[[], Iterator[float]]] = {
    **{name: partial(far_scan, op_of(name), *what) for name, what in FAR_SCANS.items()},
    **{name: partial(far_rows, name) for name in ROWS},
    **{name: partial(far_step, name) for name in FAR_STEPS},
    "attention_step_": far_pages,
}


def test_offsets_beyond_32_bits() -> None:
    """One test, one after the other: each takes tens of gigabytes."""
    free, _ = torch.cuda.mem_get_info()
    if free < 80e9:
        pytest.skip("needs 80 GB of free memory")
    for name, check in FAR_CHECKS.items():
        errors = list(check())
        torch.cuda.empty_cache()
        assert all(error <= 1e-2 for error in errors), (name, errors)
