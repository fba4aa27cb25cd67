"""`everstate bench decode`: tokens per second of whole models, by size and batch, and whether old streams slow down.

Random weights of published shapes: speed does not depend on their values. A step is timed as a user sees it, from one
token in the host's hands to the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from everstate.bench.build import build, preferred
from everstate.bench.peer_decode import peer_steps
from everstate.bench.report import Row, machine, publishing
from everstate.bench.timing import Gate, Timing, relative_error, with_threads
from everstate.core.env import cpu_threads
from everstate.core.errors import ConfigError, RequestError
from everstate.core.state import nbytes, scatter_
from everstate.engine.runner import decode_, prefill_
from everstate.engine.sampler import Sampling
from everstate.mixers import State
from everstate.models import LM, ModelConfig

WIDTHS = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
"""Width and layers of the published sizes."""
TINY = (64, 2)
KINDS = ("mamba1", "mamba2", "mamba3")
VOCABULARY, PROMPT, WARM = 50_288, 128, 8
SEGMENT = 8192
"""Tokens read at once to make a stream old."""


@dataclass(frozen=True)
class Plan:
    """One model, and how much it writes: `steps` tokens per measurement, `old` tokens read by the old stream."""

    kind: str
    batches: tuple[int, ...]
    steps: int
    old: int
    device: str


def run(
    *, model: str, batches: tuple[int, ...], quick: bool, device: str, output: Path | None, now: datetime
) -> dict[str, Any]:
    """Measure, print a table and a line of JSON, write that to `output`, and return it.

    `model` is a kind and a size, such as `mamba2-1.3b`. `quick` takes a tiny model, which proves only that everything
    works. Raises `ConfigError` for a model that has no published shape.
    """
    kind, _, size = model.partition("-")
    if kind not in KINDS or size not in WIDTHS:
        raise ConfigError(f"bench decode: {model!r} is not one of {', '.join(KINDS)}, a dash, and {', '.join(WIDTHS)}")
    width, layers = TINY if quick else WIDTHS[size]
    plan = Plan(kind, batches, 32 if quick else 128, 512 if quick else 131_072, device)
    rows: list[Row] = []
    left_out: list[str] = []
    facts: dict[str, Any] = {"model": model, "quick": quick, "machine": machine(torch.device(device))}
    facts["left_out"] = left_out
    with (
        publishing("decode", rows, facts, now, output) as result,
        with_threads(cpu_threads()),
        Console(stderr=True).status(f"making {model}") as status,
    ):
        config = ModelConfig(d_model=width, vocab_size=VOCABULARY, layout=f"{layers} * ({kind})")
        lm = build(config, device, preferred(device))
        facts["weight_bytes"] = weight_bytes(lm)
        for batch in batches:
            status.update(f"{batch} sequences")
            for state_dtype in (None, torch.bfloat16) if device != "cpu" else (None,):
                rows += speed(lm, plan, batch, state_dtype)
            rows += peer_steps(lm, plan.kind, batch, plan.steps, rows[-1], left_out)
        status.update(f"a stream of {plan.old:,} tokens")
        rows += ageing(lm, plan)
        if device != "cpu":
            lm.quantize_()
            for batch in batches:
                status.update(f"{batch} sequences, int8 weights")
                rows += speed(lm, plan, batch, torch.bfloat16)
    return result


def weight_bytes(lm: LM) -> int:
    """Bytes of what a step reads of the model: not the embedding, unless it is the head too."""
    read = sum(t.numel() * t.element_size() for t in (*lm.parameters(), *lm.buffers()))
    return read - (0 if lm.head is None else lm.embedding.weight.numel() * lm.embedding.weight.element_size())


def speed(lm: LM, plan: Plan, batch: int, state_dtype: torch.dtype | None) -> Iterator[Row]:
    """Greedy tokens of several sequences at once."""
    name = f"{batch} sequences" + (", int8 weights" if lm.quantised else "")
    name += "" if state_dtype is None else ", bfloat16 states"
    try:
        state = lm.init_state(batch, dtype=state_dtype)
    except RequestError:
        return  # a kind that keeps its states in float32
    prompts = prompt_tokens(plan, batch, PROMPT).tolist()
    gate = step_gate(lm, plan, batch, state_dtype)
    if not gate.passed:
        yield Row(name, batch, gate, None)
        return
    timing = time_steps(lm, prefill_(lm, prompts, state), state, batch, plan.steps)
    moved = (weight_bytes(lm) + 2 * nbytes(state)) / timing.median / 1e12
    yield Row(name, batch, gate, timing, ratio=moved, ratio_of="TB/s", state_bytes=nbytes(state) // batch)


def ageing(lm: LM, plan: Plan) -> Iterator[Row]:
    """The same step of a stream that has read little, and of one that has read much."""
    young, old = lm.init_state(1), lm.init_state(1)
    tokens = prompt_tokens(plan, 1, plan.old)
    first = prefill_(lm, tokens[:, :PROMPT].tolist(), young)
    with torch.no_grad():
        for segment in tokens.split(SEGMENT, 1):
            hidden, old = lm.hidden(segment, old)
        last = lm.logits(hidden[:, -1])
    gate = Gate(float(nbytes(young) != nbytes(old)), 0.0)
    timings = [time_steps(lm, logits, state, 1, plan.steps) for logits, state in ((first, young), (last, old))]
    yield Row(f"after {PROMPT} tokens", 1, gate, timings[0], state_bytes=nbytes(young))
    ratio = timings[1].median / timings[0].median
    yield Row(
        f"after {plan.old:,} tokens", 1, gate, timings[1],
        ratio=ratio, ratio_of=f"time after {PROMPT}", state_bytes=nbytes(old),
    )  # fmt: skip


def time_steps(lm: LM, logits: Tensor, state: State, batch: int, steps: int) -> Timing:
    """Seconds of each step but the first few, in which a graph is captured and caches are cold."""
    marks = []
    greedy = [Sampling(temperature=0.0)] * batch
    for _ in decode_(lm, logits, state, greedy, [PROMPT] * batch, max_tokens=steps + WARM):
        marks.append(time.perf_counter())
    kept = marks[WARM - 1 :]
    return Timing(tuple(after - before for before, after in pairwise(kept)))


@torch.no_grad()
def step_gate(lm: LM, plan: Plan, batch: int, state_dtype: torch.dtype | None) -> Gate:
    """The logits of a decoding step against those of reading the same tokens in one pass."""
    tokens = prompt_tokens(plan, batch, PROMPT)
    expected = lm(tokens, lm.init_state(batch))[0][:, -1]
    state = lm.init_state(batch, dtype=state_dtype)
    scatter_(state, None, lm.hidden(tokens[:, :-1], lm.init_state(batch))[1])
    got = lm.step_(tokens[:, -1], state)
    return Gate(relative_error(got.float(), expected.float()), 1e-4 if lm.dtype == torch.float32 else 5e-2)


def prompt_tokens(plan: Plan, batch: int, length: int) -> Int[Tensor, "b l"]:
    """Random tokens."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0)).to(plan.device)
