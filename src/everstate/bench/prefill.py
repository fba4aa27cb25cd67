"""`everstate bench prefill`: whole models read one prompt of 8,192 tokens, by kind and size, beside peers.

Random weights of published shapes. The time is that of `prefill_`, as a user sees it: from a list of tokens to the
logits after them and the state that decoding goes on from. A peer computes the same outputs, and keeps no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from everstate.bench.build import build, preferred, weight_bytes
from everstate.bench.kernels import differing, first_line, norm_error
from everstate.bench.models import config_of, kind_of
from everstate.bench.peer import PEER_NAME, Peer, available, name_with_kernels
from everstate.bench.peer_ssm import SSMPeer, name_of, unavailable
from everstate.bench.report import Row, machine, publishing
from everstate.bench.timing import Gate, Timing, interleave, with_threads
from everstate.core.env import cpu_threads
from everstate.core.op import REFERENCE
from everstate.core.state import named_tensors, nbytes
from everstate.engine.runner import prefill_
from everstate.models import LM, ModelConfig
from everstate.ops import use

LENGTH, QUICK_LENGTH = 8192, 300
REPEATS = 10
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest error of what the head reads, of norms, over all tokens."""
SPLIT = 1000
"""Tokens of the segments that must say the same as one pass; no multiple of a chunk."""


def run(*, models: tuple[str, ...], quick: bool, device: str, output: Path | None, now: datetime) -> dict[str, Any]:
    """Measure, print a table and a line of JSON, write that to `output`, and return it.

    A model is a kind and a size, such as `mamba2-1.3b`, or a hybrid: see `config_of`. `quick` takes tiny models, which
    proves only that everything works. Raises `ConfigError` for a model that has no published shape.
    """
    configs = {model: config_of(model, quick=quick) for model in models}
    rows: list[Row] = []
    left_out: list[str] = []
    facts = {"quick": quick, "machine": machine(device), "left_out": left_out}
    with (
        publishing("prefill", rows, facts, now, output) as result,
        with_threads(cpu_threads()),
        Console(stderr=True).status("starting") as status,
    ):
        for model, config in configs.items():
            status.update(model)
            rows += prefills(model, config, quick, device, left_out)
    return result


def prefills(name: str, config: ModelConfig, quick: bool, device: str, left_out: list[str]) -> Iterator[Row]:
    """Ours and every peer of one model, in turn."""
    length = QUICK_LENGTH if quick else LENGTH
    model = build(config, device, preferred(device))
    tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    prompt, state = tokens.tolist(), model.init_state(1, context=length)

    def read() -> Tensor:
        for part, tensor in named_tensors(state):
            if part.endswith("pos"):  # attention has read nothing yet
                tensor.zero_()
        return prefill_(model, prompt, state)

    calls: dict[str, Callable[[], object]] = {name: read}
    gates = {name: exact_gate(model, tokens)}
    for peer, make in peers_of(model, kind_of(name), left_out):
        try:
            hidden, logits = make()
            gate = Gate(norm_error(hidden(tokens), hidden_of(model, tokens)), ALLOWED[model.dtype])
        except Exception as failure:
            left_out.append(f"{peer}: {first_line(failure)}")
            continue
        if not gate.passed:
            left_out.append(differing(peer, gate.error))
            continue
        gates[peer], calls[peer] = gate, _last_logits(hidden, logits, tokens)
    timings = interleave(calls, gates[name], REPEATS, device)
    first = timings.get(name)
    yield Row(
        f"{name} {length:,}", length, gates[name], first, state_bytes=nbytes(state), figures=_of_limit(model, first)
    )
    for peer, timing in timings.items():
        if peer != name and first is not None:
            yield Row(f"  {peer}", length, gates[peer], timing, ratio=timing.ratio(first), ratio_of="the time")


@torch.no_grad()
def exact_gate(model: LM, tokens: Int[Tensor, "1 l"]) -> Gate:
    """Against the torch forms in float32 over all tokens, and against reading in segments."""
    hidden = hidden_of(model, tokens)
    exact = build(model.config, model.device, torch.float32)
    exact.load_state_dict(model.state_dict())
    with use("torch", REFERENCE):
        error = norm_error(hidden, hidden_of(exact, tokens))
    parts, state = [], model.init_state(1, context=tokens.shape[1])
    for segment in tokens.split(min(SPLIT, tokens.shape[1] // 2 + 1), 1):
        part, state = model.hidden(segment, state)
        parts.append(part)
    return Gate(max(error, norm_error(torch.cat(parts, 1), hidden)), ALLOWED[model.dtype])


@torch.no_grad()
def hidden_of(model: LM, tokens: Int[Tensor, "b l"]) -> Tensor:
    """What the head reads."""
    return model.hidden(tokens, model.init_state(len(tokens), context=tokens.shape[1]))[0]


Function = Callable[[Tensor], Tensor]


Maker = Callable[[], tuple[Function, Function]]
"""Gives the hidden outputs of tokens, and the logits of hidden outputs."""


def peers_of(model: LM, kind: str, left_out: list[str]) -> Iterator[tuple[str, Maker]]:
    """Names of the peers that there are, and what makes each."""
    why = unavailable(kind) if model.device.type == "cuda" else "mamba_ssm runs on a GPU"
    if why is None:
        yield name_of(kind), lambda: _of_mamba_ssm(model)
    else:
        left_out.append(why)
    if not available(kind):
        left_out.append(f"transformers is not installed or has no {kind}")
    elif kind == "mamba1" and model.device.type == "cuda":
        left_out.append(f"{PEER_NAME} on a GPU: but for mamba_ssm's CUDA kernels its Mamba-1 is a loop over all tokens")
    else:
        # In PyTorch alone, 5.17 makes a tensor of 86 GB in each layer of a Mamba-2 of 2.7B, and may run out of memory.
        yield name_with_kernels(), lambda: (Peer(model).hidden, model.logits)


def _of_mamba_ssm(model: LM) -> tuple[Function, Function]:
    peer = SSMPeer(model, model.dtype)
    return torch.no_grad()(peer.forward), peer.logits


def _last_logits(hidden: Function, logits: Function, tokens: Tensor) -> Callable[[], object]:
    return lambda: logits(hidden(tokens)[:, -1])


def _of_limit(model: LM, timing: Timing | None) -> dict[str, float]:
    """Part of the rate of a large product that the matrices of the model alone ask for."""
    if timing is None or model.device.type == "cpu":
        return {}
    numbers = weight_bytes(model, 1) / model.embedding.weight.element_size()
    flops = 2 * (numbers - model.embedding.weight.numel()) * LENGTH  # of all tokens but one the head reads nothing
    return {"of_peak": flops / timing.median / 790e12}
