"""The two loops of inference: reading prompts in blocks, and writing token by token. Both in constant memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.errors import RequestError
from everstate.core.packing import Packing
from everstate.core.state import batch_size, gather, scatter_
from everstate.engine.compiling import first_compiled
from everstate.engine.graphs import DecodeGraph, worth_capturing
from everstate.engine.sampler import Filters, Sampling, choose, greedy, most_kept, uniforms
from everstate.mixers import State
from everstate.models import LM

BLOCK = 512
"""Tokens of each prompt read at once: on a CPU longer blocks cost more memory and gain no speed."""
GPU_TOKENS = 16_384
"""Tokens of all prompts read at once by a GPU, which fewer leave idle."""
DRAWN = 64
"""Random numbers of each row that are made at once and copied to the device."""


Written = dict[int, tuple[int, Float[Tensor, " v"]]]
"""What a step wrote: row -> its new token, and the logits after it."""


@torch.no_grad()
def prefill_(model: LM, prompts: Sequence[Iterable[int]], state: State) -> Float[Tensor, "b v"]:
    """Read prompts of any lengths, one per row of `state`, which is updated in place.

    Returns the logits of the token after each prompt. Prompts may be generators: only one block of each is held at a
    time. Raises `RequestError` for an empty prompt.
    """
    sources = [iter(prompt) for prompt in prompts]
    logits: list[Tensor | None] = [None] * len(sources)
    rows = list(range(len(sources)))
    while rows:
        length = BLOCK if model.device.type == "cpu" else max(BLOCK, GPU_TOKENS // len(rows))
        blocks = {row: block for row in rows if (block := list(islice(sources[row], length)))}
        rows = list(blocks)
        if rows:
            for row, last in zip(rows, _read(model, blocks, state), strict=True):
                logits[row] = last
    read = [last for last in logits if last is not None]
    if len(read) < len(logits):
        raise RequestError(f"prompt {logits.index(None) + 1} is empty; give at least one token")
    return torch.stack(read)


def _read(model: LM, blocks: dict[int, list[int]], state: State) -> Float[Tensor, "b v"]:
    """Read one block of each of some rows, packed; the logits after each."""
    # Where all rows read, nothing is picked out: that would be two launches for each tensor of the state.
    slots = None if len(blocks) == batch_size(state) else torch.tensor(list(blocks), device=model.device)
    # Of a list, PyTorch looks at each number's type, which takes a millisecond for a prompt of 8,192 tokens.
    numbers = array("q")
    for block in blocks.values():
        numbers.fromlist(block)
    tokens = torch.frombuffer(numbers, dtype=torch.int64).unsqueeze(0).to(model.device)
    packing = Packing.of_lengths([len(block) for block in blocks.values()])
    ends, before = packing.ends(model.device), gather(state, slots)

    def read() -> tuple[Tensor, State]:
        # A single sequence needs no packing, and then nothing is laid out anew.
        hidden, after = model.hidden(tokens, before, packing if len(packing) > 1 else None)
        return model.logits(hidden[0, ends]), after

    logits, after = first_compiled(model, ("prompts", len(packing) > 1), read)
    scatter_(state, slots, after)
    return logits


@torch.no_grad()
def decode_(
    model: LM,
    logits: Float[Tensor, "b v"],
    state: State,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    *,
    stop: Iterable[int] = (),
    max_tokens: int,
) -> Iterator[Written]:
    """Write up to `max_tokens` tokens for every row of `state`, which is updated in place.

    When the loop has ended or was closed, the state has read all that was yielded; until then some of a state of
    several rows may be put off.

    `positions` are the numbers of tokens that the rows have read. Yields after each step, for every row still writing,
    its new token and the logits after it. A row ends at a token in `stop`, which is read and yielded too.
    """
    ends, device = frozenset(stop), model.device
    filters = Filters.of(samplings, device) if any(s.temperature > 0 for s in samplings) else None
    draws = _draws(samplings, positions, max_tokens, device)
    write = _write_captured if worth_capturing(model, max_tokens) else _write
    yield from write(model, logits, state, filters, most_kept(samplings), draws, ends)


def _draws(
    samplings: Sequence[Sampling], positions: Sequence[int], count: int, device: torch.device
) -> Iterator[Float[Tensor, " b"]]:
    """The random numbers that decide the tokens of each row, token by token, copied to the device in blocks."""
    seeds = [s.seed for s in samplings]
    for start in range(0, count, DRAWN):
        block = uniforms(seeds, [position + start for position in positions], min(DRAWN, count - start))
        yield from torch.from_numpy(block).to(device).unbind(1)


def _write(
    model: LM, logits: Float[Tensor, "b v"], state: State, filters: Filters | None, most: int,
    draws: Iterator[Tensor], ends: frozenset[int],
) -> Iterator[Written]:  # fmt: skip
    """Step by step, without the rows that have ended."""
    rows, slots, device = list(range(len(logits))), None, model.device
    for u in draws:
        chosen = greedy(logits) if filters is None else choose(logits, gather(u, slots), gather(filters, slots), most)
        logits = model.step_(chosen, state, slots)
        # The one place where a device is waited for.
        tokens = chosen.tolist()
        yield {row: (token, after) for row, token, after in zip(rows, tokens, logits, strict=True)}
        kept = [i for i, token in enumerate(tokens) if token not in ends]
        if not kept:
            return
        if len(kept) < len(rows):
            rows = [rows[i] for i in kept]
            slots, logits = torch.tensor(rows, device=device), logits[torch.tensor(kept, device=device)]


def _write_captured(
    model: LM, logits: Float[Tensor, "b v"], state: State, filters: Filters | None, most: int,
    draws: Iterator[Tensor], ends: frozenset[int],
) -> Iterator[Written]:  # fmt: skip
    """Step by step as a graph. It steps rows that have ended too, whose states are put back at the end."""
    graph, ended = DecodeGraph(model, logits, state, filters, most), dict[int, State]()
    slot = [torch.tensor([row], device=model.device) for row in range(len(logits))]
    try:
        for u in draws:
            tokens, after = graph.step(u)
            after = after.clone()
            writing = [row for row in range(len(tokens)) if row not in ended]
            yield {row: (tokens[row], after[row]) for row in writing}
            ended |= {row: gather(graph.state, slot[row]) for row in writing if tokens[row] in ends}
            if len(ended) == len(tokens):
                return
    finally:
        for row, kept in ended.items():
            scatter_(graph.state, slot[row], kept)
        graph.settle_()
