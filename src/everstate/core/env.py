"""The only file that reads environment variables."""

from __future__ import annotations

import os


def cpu_threads() -> int:
    """Threads a CPU run should take: what the operating system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def let_idle_threads_sleep() -> None:
    """Make OpenMP threads give up their core soon where they wait, unless the user chose otherwise. Before torch.

    GNU's OpenMP lets a waiting thread spin for about a millisecond. On a machine that has something else to do it then
    keeps the very thread that it waits for from running, and small operations take ten times as long and more. After
    3000 turns the gain on a busy machine is tenfold, the loss on a quiet one about a third for the smallest models.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
