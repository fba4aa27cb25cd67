"""Kernels of peers that Triton tunes: all candidates are compiled at once, not one after the other, each before it is
timed. Tuning a Mamba-3 of mamba_ssm on a GPU takes minutes otherwise; what it finds is the same."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from everstate.core.env import cpu_threads
from everstate.core.kernels import has_triton


@contextmanager
def compiled_together() -> Iterator[None]:
    """Inside the block, where Triton is installed, a kernel to be tuned is compiled for all settings on all cores."""
    if not has_triton():
        yield
        return
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    choose = Autotuner.prune_configs

    def choose_and_compile(tuner: Any, given: dict[str, Any]) -> list[Any]:
        """Of a kernel that has not been tuned for such arguments, what Triton asks just before it times candidates."""
        candidates = choose(tuner, given)
        # One that cannot be compiled is told when it is timed.
        with ThreadPoolExecutor(cpu_threads()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for candidate in candidates:
                settings = {**given, **candidate.all_kwargs(), "warmup": True}
                tuner.fn.run(*tuner.nargs.values(), **settings)
        return candidates

    Autotuner.prune_configs = choose_and_compile
    try:
        yield
    finally:
        Autotuner.prune_configs = choose
