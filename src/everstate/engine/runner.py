"""The two loops of inference: reading prompts in blocks, and writing token by token. Both in constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.errors import RequestError
from everstate.core.packing import Packing
from everstate.core.state import gather, scatter_
from everstate.engine.sampler import Filters, Sampling, choose, greedy, uniforms
from everstate.mixers import State
from everstate.models import LM

BLOCK = 512
"""Tokens of each prompt read at once: longer blocks cost more memory and gain no speed."""
DRAWN = 64
"""Random numbers of each row that are made at once and copied to the device."""


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
        blocks = {row: block for row in rows if (block := list(islice(sources[row], BLOCK)))}
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
    slots = torch.tensor(list(blocks), device=model.device)
    tokens = torch.tensor([[token for block in blocks.values() for token in block]], device=model.device)
    packing = Packing.of_lengths([len(block) for block in blocks.values()])
    # A single sequence needs no packing, and then nothing is laid out anew.
    hidden, after = model.hidden(tokens, gather(state, slots), packing if len(packing) > 1 else None)
    scatter_(state, slots, after)
    return model.logits(hidden[0, packing.ends(model.device)])


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
) -> Iterator[dict[int, tuple[int, Float[Tensor, " v"]]]]:
    """Write up to `max_tokens` tokens for every row of `state`, which is updated in place.

    `positions` are the numbers of tokens that the rows have read. Yields after each step, for every row still writing,
    its new token and the logits after it. A row ends at a token in `stop`, which is read and yielded too.
    """
    ends, rows, device = frozenset(stop), list(range(len(samplings))), model.device
    filters, draws = Filters.of(samplings, device), torch.empty(0)
    random, seeds = any(s.temperature > 0 for s in samplings), [s.seed for s in samplings]
    slots: Tensor | None = None
    for written in range(max_tokens):
        if not random:
            chosen = greedy(logits)
        else:
            if written % DRAWN == 0:
                starts = [position + written for position in positions]
                draws = torch.from_numpy(uniforms(seeds, starts, min(DRAWN, max_tokens - written))).to(device)
            chosen = choose(logits, gather(draws[:, written % DRAWN], slots), gather(filters, slots))
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
