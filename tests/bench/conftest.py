"""The figures of a test count for nothing, and the other tests want their cores."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other on busy cores take ten times as long."""
    from everstate.bench import decode, ops, prefill, train

    for module in (decode, ops, prefill, train):
        monkeypatch.setattr(module, "cpu_threads", lambda: 1)


@pytest.fixture
def needs_peer() -> None:
    """Where transformers can compute on a CPU."""
    from everstate.bench.peer import name_with_kernels

    pytest.importorskip("transformers")
    if "mamba_ssm" in name_with_kernels():
        pytest.skip("transformers calls the kernels of mamba_ssm on a CPU too, where they fail")
