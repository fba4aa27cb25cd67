"""The figures of a test count for nothing, and the other tests want their cores."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other on busy cores take ten times as long."""
    from everstate.bench import decode, ops, prefill, train

    for module in (decode, ops, prefill, train):
        monkeypatch.setattr(module, "cpu_threads", lambda: 1)
