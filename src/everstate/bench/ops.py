"""`everstate bench ops`: ops against their references, layers against `transformers`, long inputs against short ones.

Three questions: how fast is an op, how fast is a stack of layers and does its time grow linearly with the length, and
does decoding slow down with what was read before?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from everstate.bench.kernels import first_line
from everstate.bench.peer import PEER_NAME, Peer, available, name_with_kernels
from everstate.bench.peer_ops import is_number
from everstate.bench.report import Row, machine, publish
from everstate.bench.shapes import SHAPES
from everstate.bench.timing import Gate, Timing, interleave, relative_error, with_threads
from everstate.core.env import cpu_threads
from everstate.core.op import REFERENCE
from everstate.core.state import clone, map_state, nbytes, tensors
from everstate.mixers import MIXERS, State
from everstate.models import LM, ModelConfig
from everstate.ops import OPS, use
from everstate.ops.example import EXAMPLES, Draw, Example


@dataclass(frozen=True)
class Plan:
    """How much is measured, and where.

    width, layers, vocab_size: of the stacks. short, long: tokens that they read. op_tokens: tokens that an op reads.
    young, old: ages at which decoding is timed, `steps` tokens at a time, in two layers of `decode_width`.
    """

    width: int
    layers: int
    vocab_size: int
    short: int
    long: int
    op_tokens: int
    young: int
    old: int
    steps: int
    decode_width: int
    repeats: int
    device: str = "cpu"


# The widths of the published 130M models. A stack of 4 of their 24 layers says the same about each layer.
FULL = Plan(
    width=768, layers=4, vocab_size=50280, short=4096, long=32768, op_tokens=2048,
    young=1000, old=200_000, steps=20, decode_width=128, repeats=5,
)  # fmt: skip
QUICK = Plan(
    width=64, layers=2, vocab_size=256, short=256, long=2048, op_tokens=128,
    young=100, old=2000, steps=5, decode_width=64, repeats=3,
)  # fmt: skip
STACKS = ("mamba1", "mamba2", "mamba3")
FLOAT64, FLOAT64_GRADIENTS, FLOAT32 = 1e-10, 1e-8, 1e-4
"""Largest relative errors that a gate allows."""
GATE_TOKENS = 65
"""Tokens of the comparisons with references: one chunk and one more."""
SEGMENT = 2048
"""Tokens read at once where only the state is wanted."""

Say = Callable[[str], None]


def run(*, quick: bool, threads: int | None, output: Path | None, now: datetime, device: str = "cpu") -> dict[str, Any]:
    """Measure, print a table and a line of JSON, write that to `output`, and return it.

    `quick` takes seconds and proves only that everything works; the full run takes minutes. `threads` are CPU threads,
    by default all that this process may use.
    """
    plan = replace(QUICK if quick else FULL, device=device)
    with with_threads(threads or cpu_threads()), Console(stderr=True).status("starting") as status:
        rows: list[Row] = []
        left_out: list[str] = []
        for part in (agreements, op_speeds, partial(stacks, left_out), decoding):
            rows += list(part(plan, status.update))
        facts = {"quick": quick, "machine": machine(device), "plan": asdict(plan), "left_out": left_out}
    return publish("ops", rows, facts, now, output)


def agreements(plan: Plan, say: Say) -> Iterator[Row]:
    """Every implementation of every op against its reference, on small arguments."""
    for dtype, allowed in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        say(f"all ops against their references in {dtype}")
        errors = [
            relative_error(_call(op, backend, example), _call(op, REFERENCE, example))
            for op in EXAMPLES
            for draw in EXAMPLES[op].values()
            for example in [draw(Draw(dtype=dtype, device=plan.device), 2, GATE_TOKENS, 2)]
            for backend in _backends(op, example)
        ]
        name = f"{len(errors)} cases, {dtype}".replace("torch.", "")
        yield Row(name, GATE_TOKENS, Gate(max(errors), allowed), None)
    say("the gradients of all ops against those of their references")
    errors = [
        relative_error(_gradients(op, backend, example), _gradients(op, REFERENCE, example))
        for op in EXAMPLES
        for draw in EXAMPLES[op].values()
        for example in [draw(Draw(device=plan.device), 2, GATE_TOKENS, 2)]
        for backend in _backends(op, example)
    ]
    yield Row(f"{len(errors)} cases, gradients", GATE_TOKENS, Gate(max(errors), FLOAT64_GRADIENTS), None)


def op_speeds(plan: Plan, say: Say) -> Iterator[Row]:
    """Forward, and forward with backward, of one op in the shape that a layer of the stacks gives it."""
    for op, shape in SHAPES.items():
        say(op)
        small = shape(Draw(device=plan.device), 2 * plan.width, GATE_TOKENS)
        example = shape(Draw(dtype=torch.float32, device=plan.device), 2 * plan.width, plan.op_tokens)
        backend = _backends(op, example)[0]
        error = relative_error(_gradients(op, backend, small), _gradients(op, REFERENCE, small))
        candidates = {
            "forward": partial(_call, op, backend, example),
            "both": partial(_gradients, op, backend, example),
        }
        timings = interleave(candidates, Gate(error, FLOAT64_GRADIENTS), plan.repeats, plan.device)
        forward, both = timings.get("forward"), timings.get("both")
        row = Row(op, plan.op_tokens, Gate(error, FLOAT64_GRADIENTS), forward)
        yield row
        yield replace(row, name=f"{op} + backward", timing=both, **_compared(both, forward, "forward"))


def stacks(left_out: list[str], plan: Plan, say: Say) -> Iterator[Row]:
    """Layers of one kind on end, without the head, beside the peer, and at two lengths."""
    for kind in (kind for kind in STACKS if kind in MIXERS):
        name = f"{plan.layers} x {kind}"
        say(name)
        layout = f"{plan.layers} * ({kind})"
        config = ModelConfig(d_model=plan.width, vocab_size=plan.vocab_size, layout=layout)
        model = LM(config, device=plan.device)
        tokens = _tokens(plan, plan.vocab_size, plan.long)
        peer = _peer_of(model, tokens[:, :GATE_TOKENS], left_out) if available(kind) else None
        candidates: dict[str, Callable[[], object]] = {"short": partial(_hidden, model, tokens[:, : plan.short])}
        candidates["long"] = partial(_hidden, model, tokens)
        if peer is not None:
            candidates["peer"] = partial(peer.hidden, tokens[:, : plan.short])
        gate = _stack_gate(model, peer, tokens[:, : plan.short])
        timings = interleave(candidates, gate, plan.repeats, plan.device)
        short, long, theirs = (timings.get(key) for key in ("short", "long", "peer"))
        yield Row(name, plan.short, gate, short, **_compared(theirs, short, "peer's speed"))
        if peer is not None:
            yield Row(f"  {PEER_NAME}", plan.short, gate, theirs)
        yield Row(name, plan.long, gate, long, **_compared(long, short, f"time of {plan.short:,}"))


def _peer_of(model: LM, tokens: Int[Tensor, "b l"], left_out: list[str]) -> Peer | None:
    """The same layers there. One that reads no tokens here, as with mamba_ssm, whose kernels it calls on a CPU too, is
    left out."""
    try:
        peer = Peer(model)
        peer.hidden(tokens)
    except Exception as error:
        left_out.append(f"{model.config.layout} of {name_with_kernels()}: {first_line(error)}")
        return None
    return peer


@torch.no_grad()
def _stack_gate(model: LM, peer: Peer | None, tokens: Int[Tensor, "b l"]) -> Gate:
    """Against the references on a few tokens, and against the peer on all, and on the logits of a few."""
    few = tokens[:, :GATE_TOKENS]
    with use(REFERENCE):
        expected = _hidden(model, few)
    error = relative_error(_hidden(model, few), expected)
    if peer is not None:
        error = max(error, relative_error(_hidden(model, tokens), peer.hidden(tokens)))
        error = max(error, relative_error(model.logits(expected), peer.logits(few)))
    return Gate(error, FLOAT32)


def decoding(plan: Plan, say: Say) -> Iterator[Row]:
    """Steps of a model that has read few tokens, and in turn of the same model when it has read many."""
    for kind in (kind for kind in STACKS if kind in MIXERS):
        say(f"{kind} reads {plan.old:,} tokens")
        model = LM(ModelConfig(d_model=plan.decode_width, vocab_size=256, layout=f"2 * ({kind})"), device=plan.device)
        tokens = _tokens(plan, 256, plan.old)
        young = _read(model, tokens[:, : plan.young], model.init_state(1))
        old = _read(model, tokens[:, plan.young :], young)
        gate = _decoding_gate(model, young, old, tokens[:, :1])
        candidates = {
            age: partial(_steps, model, clone(state), tokens[0, : plan.steps])
            for age, state in (("young", young), ("old", old))
        }
        timings = interleave(candidates, gate, 10 * plan.repeats, plan.device)
        first, last = timings.get("young"), timings.get("old")
        row = Row(f"{kind} after {plan.young:,}", plan.steps, gate, first, state_bytes=nbytes(young))
        yield row
        compared = _compared(last, first, f"time at {plan.young:,}")
        yield replace(row, name=f"{kind} after {plan.old:,}", timing=last, state_bytes=nbytes(old), **compared)


@torch.no_grad()
def _decoding_gate(model: LM, young: State, old: State, token: Int[Tensor, "1 1"]) -> Gate:
    """A step against `forward` on the same token, from an old state that holds as many bytes as a young one."""
    expected, after = model(token, old)
    stepped = clone(old)
    logits = model.step_(token[:, 0], stepped)
    error = max(relative_error(logits, expected[:, 0]), relative_error(stepped, after))
    return Gate(error if nbytes(young) == nbytes(old) else math.inf, FLOAT32)


def _backends(op: str, example: Example) -> list[str]:
    """The implementations that serve these arguments here, first the one that a plain call takes."""
    state = {} if example.state is None else {"state": example.state}
    verdicts = OPS[op].explain(**example.timed, **state, **example.fixed)
    return [backend for backend, verdict in verdicts.items() if verdict == "accepts" and backend != REFERENCE]


def _call(op: str, backend: str, example: Example) -> Any:
    """What the op returns: outputs, or outputs and state."""
    state = {} if example.state is None else {"state": example.state}
    with torch.no_grad(), use(backend):
        return OPS[op](**example.timed, **state, **example.fixed)


def _gradients(op: str, backend: str, example: Example) -> tuple[Tensor, ...]:
    """Gradients of half the sum of the squares of everything that the op returns, for every argument."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_number(value):
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    timed = {key: leaf(value) for key, value in example.timed.items()}
    fixed = {key: leaf(value) for key, value in example.fixed.items()}
    state = {} if example.state is None else {"state": map_state(leaf, example.state)}
    with use(backend):
        outputs = [output for output in tensors(OPS[op](**timed, **state, **fixed)) if output.requires_grad]
    upstream = [output.detach() for output in outputs]
    return torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)


@torch.no_grad()
def _hidden(model: LM, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
    return model.hidden(tokens, model.init_state(tokens.shape[0]))[0]


@torch.no_grad()
def _read(model: LM, tokens: Int[Tensor, "b l"], state: State) -> State:
    """The state after these tokens, read in segments."""
    for segment in tokens.split(SEGMENT, 1):
        _, state = model.hidden(segment, state)
    return state


def _steps(model: LM, state: State, tokens: Int[Tensor, " l"]) -> None:
    for token in tokens.split(1):
        model.step_(token, state)


def _tokens(plan: Plan, vocab_size: int, length: int) -> Int[Tensor, "1 l"]:
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(plan.device)


def _compared(timing: Timing | None, base: Timing | None, ratio_of: str) -> dict[str, Any]:
    """The fields of a row that say how many times as long as `base` something took."""
    return {} if timing is None or base is None else {"ratio": timing.ratio(base), "ratio_of": ratio_of}
