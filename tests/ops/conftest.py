"""How many programs of kernels fill a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function: pretend that it takes as many programs to fill the GPU."""
    from everstate.ops import triton_segments
    from everstate.ops.ssd import triton as ssd
    from everstate.ops.trapezoid import triton as trapezoid

    def pretend(programs: int) -> None:
        for module in (triton_segments, ssd, trapezoid):
            monkeypatch.setattr(module, "processors", lambda device: programs)

    return pretend
