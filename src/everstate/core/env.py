"""The only file that reads environment variables."""

from __future__ import annotations

import os


def cpu_threads() -> int:
    """Threads a CPU run should take: what the operating system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
