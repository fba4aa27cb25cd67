"""`everstate bench train`: one optimizer step of language models of about 360M parameters, beside peers of equal size.

A step is forward, loss, backward and AdamW, on random tokens, timed as a user sees it. Ours are bfloat16 weights with
float32 masters (`train/optim.py`) on a GPU, float32 weights on a CPU; the peers train as they are usually trained,
float32 weights under autocast to bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor, nn

from everstate.bench.build import build, preferred
from everstate.bench.kernels import norm_error
from everstate.bench.peer_train import peers_of
from everstate.bench.report import Row, machine, publishing
from everstate.bench.timing import Gate, Timing, interleave, with_threads
from everstate.core.env import cpu_threads
from everstate.core.errors import ConfigError
from everstate.core.op import REFERENCE
from everstate.models import LM, ModelConfig
from everstate.models.cost import cost
from everstate.ops import OPS, linear_cross_entropy, use
from everstate.train.optim import adamw

MODELS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "mamba1": ("48 * (mamba1)", {}),
    "mamba2": ("48 * (mamba2)", {}),
    "mamba3": ("24 * (mamba3 mlp)", {"mlp": {"type": "mlp", "d_hidden": 2048}}),
    "attention": (
        "24 * (attention mlp)",
        {"attention": {"type": "attention", "rope_theta": 10000.0}, "mlp": {"type": "mlp", "d_hidden": 2816}},
    ),
}
"""Layouts and mixers of a width of `WIDTH`."""
WIDTH, VOCABULARY = 1024, 50_288
QUICK_WIDTH, QUICK_VOCABULARY = 64, 128
SHAPES, QUICK_SHAPES = ((16, 2048), (4, 8192)), ((2, 70),)
"""Sequences and tokens of each."""
PEAK = 790e12
"""Operations per second of a large product of bfloat16 matrices on an H200, of which MFU is a part."""
GATE_SHAPE = (2, 130)
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Largest error of the gradient of a parameter, of norms."""
REPEATS = 5


@dataclass(frozen=True)
class Plan:
    """What is trained, and where."""

    kind: str
    config: ModelConfig
    shapes: tuple[tuple[int, int], ...]
    device: str
    compiled: bool


class Trainee:
    """A model and its optimizer; calling it is a step, and gives the loss."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.model, self._loss, self._optimizer = model, loss, optimizer

    def __call__(self, tokens: Int[Tensor, "b l1"]) -> Float[Tensor, ""]:
        loss = self._loss(tokens)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def run(
    *, models: tuple[str, ...], quick: bool, compiled: bool, device: str, output: Path | None, now: datetime
) -> dict[str, Any]:
    """Measure, print a table and a line of JSON, write that to `output`, and return it.

    `quick` takes tiny models, which proves only that everything works. `compiled` times the step under `torch.compile`
    too. Raises `ConfigError` for a model that is not in `MODELS`.
    """
    unknown = [kind for kind in models if kind not in MODELS]
    if unknown:
        raise ConfigError(f"bench train: {unknown[0]!r} is not one of {', '.join(MODELS)}")
    rows: list[Row] = []
    left_out: list[str] = []
    facts = {"quick": quick, "machine": machine(device), "peak_flops": PEAK, "left_out": left_out}
    facts["parameters"] = {kind: cost(config_of(kind, quick)).parameters for kind in models}
    with (
        publishing("train", rows, facts, now, output) as result,
        with_threads(cpu_threads()),
        Console(stderr=True).status("starting") as status,
    ):
        for kind in models:
            plan = Plan(kind, config_of(kind, quick), QUICK_SHAPES if quick else SHAPES, device, compiled)
            status.update(kind)
            rows += steps(plan, left_out)
    return result


def config_of(kind: str, quick: bool) -> ModelConfig:
    """The model; a quick one has one of its repeated parts."""
    layout, mixers = MODELS[kind]
    if not quick:
        return ModelConfig(d_model=WIDTH, vocab_size=VOCABULARY, layout=layout, mixers=mixers)
    small = {name: {key: v for key, v in table.items() if key != "d_hidden"} for name, table in mixers.items()}
    return ModelConfig(d_model=QUICK_WIDTH, vocab_size=QUICK_VOCABULARY, layout=layout.partition("* ")[2], mixers=small)


def steps(plan: Plan, left_out: list[str]) -> Iterator[Row]:
    """Ours and every peer, in turn, at all shapes."""
    gate = gradient_gate(plan)
    makers: dict[str, Callable[[], Trainee]] = {"everstate": lambda: ours(plan)}
    if plan.compiled:
        makers["compiled"] = lambda: ours(plan, compiled=True)
    makers |= peers_of(plan.kind, plan.config, plan.device, left_out, Trainee)
    if not gate.passed:
        yield Row(plan.kind, 0, gate, None)
        return
    trainees: dict[str, Trainee] = {}
    figures: dict[str, dict[str, float]] = {}
    batches = {shape: random_tokens(plan, *shape) for shape in plan.shapes}
    for name, make in list(makers.items()):
        trainees[name], figures[name] = first_steps(make, list(batches.values()), plan.device)
    for shape, tokens in batches.items():
        calls = {name: _call(trainee, tokens) for name, trainee in trainees.items()}
        timings = interleave(calls, gate, REPEATS, plan.device, settle=True)
        for name, timing in timings.items():
            yield _row(plan, name, shape, gate, timing, trainees[name], figures[name])


def ours(plan: Plan, *, compiled: bool = False) -> Trainee:
    """Our model with its optimizer; the loss is that of `everstate train`."""
    model = build(plan.config, plan.device, preferred(plan.device))
    loss = mean_loss(model)
    if compiled:
        for op in OPS.values():
            op.load()
        loss = torch.compile(loss, fullgraph=True)
    return Trainee(model, loss, adamw(model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))


def mean_loss(model: LM) -> Callable[[Tensor], Tensor]:
    """The loss of each token but the last given those before it, averaged, as a function of `(b, l + 1)` tokens."""

    def loss(tokens: Int[Tensor, "b l1"]) -> Float[Tensor, ""]:
        hidden, _ = model.hidden(tokens[:, :-1], model.init_state(len(tokens), context=0))
        softcap, targets = model.config.logit_softcap, tokens[:, 1:]
        total = linear_cross_entropy(hidden, model.head_weight, targets, softcap=softcap, reduction="sum")
        return total / targets.numel()

    return loss


def first_steps(make: Callable[[], Trainee], batches: list[Tensor], device: str) -> tuple[Trainee, dict[str, float]]:
    """A trainee, the seconds of its first step, kernels compiled, and the memory that it takes at its most."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    trainee = make()
    _finish(device)
    begun = time.perf_counter()
    trainee(batches[0])
    _finish(device)
    figures = {"first_s": time.perf_counter() - begun}
    for tokens in batches:
        trainee(tokens)
    if on_gpu:
        figures["gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return trainee, figures


def gradient_gate(plan: Plan) -> Gate:
    """Loss and the gradient of every parameter against the torch form in float64, two of each block on few tokens."""
    dtype = preferred(plan.device)
    names = list(dict.fromkeys(plan.config.blocks))
    config = ModelConfig.parse({**plan.config.table(), "layout": f"2 * ({' '.join(names)})"})
    model, exact = (build(config, plan.device, each) for each in (dtype, torch.float64))
    exact.load_state_dict(model.state_dict())
    tokens = random_tokens(plan, *GATE_SHAPE)
    got = _outcome(model, tokens)
    with use("torch", REFERENCE):
        expected = _outcome(exact, tokens)
    error = max(norm_error(one, other) for one, other in zip(got, expected, strict=True))
    return Gate(error if math.isfinite(error) else math.inf, ALLOWED[dtype])


def _outcome(model: LM, tokens: Int[Tensor, "b l1"]) -> list[Tensor]:
    """The loss, and the gradients of all parameters."""
    loss = mean_loss(model)(tokens)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def random_tokens(plan: Plan, batch: int, length: int) -> Int[Tensor, "b l1"]:
    """Tokens to read and, one further, to predict."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(plan.config.vocab_size, (batch, length + 1), generator=generator).to(plan.device)


def _call(trainee: Trainee, tokens: Tensor) -> Callable[[], object]:
    return lambda: trainee(tokens)


def _row(
    plan: Plan, name: str, shape: tuple[int, int], gate: Gate, timing: Timing, trainee: Trainee,
    figures: dict[str, float],
) -> Row:  # fmt: skip
    parameters = sum(p.numel() for p in trainee.model.parameters())
    tokens = shape[0] * shape[1]
    mfu = {"mfu": 6 * parameters * tokens / timing.median / PEAK, **figures}
    title = plan.kind if name == "everstate" else f"  {name}"
    return Row(f"{title} {shape[0]} x {shape[1]}", tokens, gate, timing, figures=mfu)


def _finish(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
