"""One long stream through one session: what it holds and what a token costs, early and late.

A state is a value, so the session is forked at every mark, and the forks are timed afterwards in turns, in one process:
what else runs on the machine then slows all marks alike.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from everstate.engine import Session
from everstate.models.cost import kv_cache_bytes, sequence_layers

ROUNDS = 9
TOKENS_PER_ROUND = 32


class Mark(NamedTuple):
    """The stream after `tokens` tokens.

    state_bytes: held by the session. resident_bytes: held by the whole process.
    read_ms: time to read one token since the mark before, in blocks. write_ms: median time to write one token.
    kv_cache_bytes: what a Transformer of the same width and as many sequence layers would hold, in bfloat16; computed.
    """

    tokens: int
    state_bytes: int
    resident_bytes: int
    read_ms: float
    write_ms: float
    kv_cache_bytes: int


def measure(
    session: Session, tokens: Iterable[int], marks: Sequence[int], *, on_mark: Callable[[int], None] = lambda _: None
) -> list[Mark]:
    """Read `tokens` up to the last of the ascending `marks`, and measure at each; `on_mark` hears of each one."""
    stream = iter(tokens)
    forks, resident, reading = [], [], []
    for mark in marks:
        count, started = mark - session.tokens_read, time.perf_counter()
        session.read_tokens(islice(stream, count))
        reading.append(1000 * (time.perf_counter() - started) / count)
        forks.append(session.fork())
        resident.append(resident_bytes())
        on_mark(mark)
    layers = sequence_layers(session.model)
    caches = [kv_cache_bytes(session.model.config.d_model, layers, mark) for mark in marks]
    held = [fork.state_bytes for fork in forks]
    return [Mark(*row) for row in zip(marks, held, resident, reading, _write_ms(forks), caches, strict=True)]


def _write_ms(sessions: Sequence[Session]) -> list[float]:
    """Median milliseconds per written token of each session, timed in turns."""
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS + 1):
        for session, taken in zip(sessions, times, strict=True):
            started = time.perf_counter()
            written = sum(1 for _ in session.fork().write_tokens(TOKENS_PER_ROUND))
            taken.append(1000 * (time.perf_counter() - started) / written)
    # The first round warms up.
    return [statistics.median(taken[1:]) for taken in times]


def resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, the most it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
