"""`everstate bench decode`: tokens per second of whole models, by size and batch, and whether old streams slow down.

Random weights of published shapes: speed does not depend on their values. A step is timed as a user sees it, from one
token in the host's hands to the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from everstate.bench.build import build, preferred, weight_bytes
from everstate.bench.models import config_of, kind_of
from everstate.bench.peer_decode import peer_steps
from everstate.bench.report import Row, machine, publishing
from everstate.bench.timing import Gate, Timing, relative_error, with_threads
from everstate.core.env import cpu_threads
from everstate.core.errors import RequestError
from everstate.core.state import nbytes, scatter_
from everstate.engine.graphs import DecodeGraph, worth_capturing
from everstate.engine.runner import decode_, prefill_
from everstate.engine.sampler import Sampling
from everstate.mixers import State
from everstate.mixers.attention import Attention
from everstate.mixers.mamba2 import Deferred
from everstate.models import LM
from everstate.ops.ssd.pending import ENTRIES

PROMPT, WARM, STEPPED = 128, 8, ENTRIES + 1
SEGMENT = 8192
"""Tokens read at once to make a stream old."""


@dataclass(frozen=True)
class Plan:
    """One model, and how much it writes: `steps` tokens per measurement, `old` tokens read by the old stream.

    Attention has room for what is read and written, and no more.
    """

    kind: str
    batches: tuple[int, ...]
    steps: int
    old: int

    @property
    def context(self) -> int:
        """Tokens of a young stream."""
        return PROMPT + self.steps + WARM


def run(
    *, model: str, batches: tuple[int, ...], quick: bool, device: str, output: Path | None, now: datetime
) -> dict[str, Any]:
    """Measure, print a table and a line of JSON, write that to `output`, and return it.

    `model` is a kind and a size, such as `mamba2-1.3b`, or a hybrid: see `config_of`. `quick` takes a tiny model, which
    proves only that everything works. Raises `ConfigError` for a model that has no published shape.
    """
    config = config_of(model, quick=quick)
    plan = Plan(kind_of(model), batches, 32 if quick else 128, 512 if quick else 131_072)
    rows: list[Row] = []
    left_out: list[str] = []
    facts: dict[str, Any] = {"model": model, "quick": quick, "machine": machine(device)}
    facts["left_out"] = left_out
    with (
        publishing("decode", rows, facts, now, output) as result,
        with_threads(cpu_threads()),
        Console(stderr=True).status(f"making {model}") as status,
    ):
        lm = build(config, device, preferred(device))
        facts["weight_bytes"] = weight_bytes(lm, 1)
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


def speed(lm: LM, plan: Plan, batch: int, state_dtype: torch.dtype | None) -> Iterator[Row]:
    """Greedy tokens of several sequences at once."""
    name = f"{batch} sequences" + (", int8 weights" if lm.quantised else "")
    name += "" if state_dtype is None else ", bfloat16 states"
    try:
        state = lm.init_state(batch, context=plan.context, dtype=state_dtype)
    except RequestError:
        return  # a kind that keeps its states in float32
    prompts = prompt_tokens(lm, batch, PROMPT).tolist()
    gate = step_gate(lm, plan, batch, state_dtype)
    if not gate.passed:
        yield Row(name, batch, gate, None)
        return
    timing = time_steps(lm, prefill_(lm, prompts, state), state, batch, plan.steps)
    row = Row(name, batch, gate, timing, state_bytes=nbytes(state) // batch)
    # Of keys and values a step reads what is filled, and writes one.
    if not any(isinstance(part, Attention) for part in lm.modules()):
        stepped = DecodeGraph.form(lm, state) if worth_capturing(lm, plan.steps) else state
        moved = (weight_bytes(lm, batch) + state_traffic(stepped)) / timing.median / 1e12
        row = replace(row, ratio=moved, ratio_of="TB/s")
    yield row


def ageing(lm: LM, plan: Plan) -> Iterator[Row]:
    """The same step of a stream that has read little, and of one that has read much."""
    context = plan.context + plan.old
    young, old = lm.init_state(1, context=context), lm.init_state(1, context=context)
    tokens = prompt_tokens(lm, 1, plan.old)
    first = prefill_(lm, tokens[:, :PROMPT].tolist(), young)
    with torch.no_grad():
        for segment in tokens.split(SEGMENT, 1):
            hidden, old = lm.hidden(segment, old)
        last = lm.logits(hidden[:, -1])
        read, old = old, lm.init_state(1, context=context)
        scatter_(old, None, read)  # laid out as the young one
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


def state_traffic(state: State) -> float:
    """Bytes that a step reads and writes of a state, on average."""
    if isinstance(state, Deferred):
        read, entries = nbytes(state), nbytes((state.pending.x, state.pending.B))
        often = read - nbytes(state.ssm) - entries
        return read + often + (nbytes(state.ssm) + entries) / ENTRIES
    if hasattr(type(state), "_fields"):  # of one mixer, and not of several
        return 2.0 * nbytes(state)
    return sum(map(state_traffic, state))


@torch.no_grad()
def step_gate(lm: LM, plan: Plan, batch: int, state_dtype: torch.dtype | None) -> Gate:
    """The logits after some decoding steps against those of reading the same tokens in one pass.

    So many that states are written which are not with every token.
    """
    tokens = prompt_tokens(lm, batch, PROMPT)
    make = partial(lm.init_state, batch, context=plan.context)
    expected = lm(tokens, make())[0][:, -1]
    state = make(dtype=state_dtype)
    scatter_(state, None, lm.hidden(tokens[:, :-STEPPED], make())[1])
    state = DecodeGraph.form(lm, state)
    for token in tokens[:, -STEPPED:].unbind(1):
        got = lm.step_(token, state)
    return Gate(relative_error(got.float(), expected.float()), 1e-4 if lm.dtype == torch.float32 else 5e-2)


def prompt_tokens(lm: LM, batch: int, length: int) -> Int[Tensor, "b l"]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lm.config.vocab_size, (batch, length), generator=generator).to(lm.device)
