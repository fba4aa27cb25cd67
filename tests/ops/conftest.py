"""Where the kernels for Hopper GPUs run, and how many of their programs fill it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from everstate.core.kernels import capability


@pytest.fixture
def hopper(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A Hopper GPU, or this processor as if it were one: the kernels imitated."""
    from everstate.ops import triton_segments

    if kernel_device.type == "cuda":
        if capability(kernel_device)[0] != 9:
            pytest.skip("needs a Hopper GPU")
        return kernel_device
    from tests.imitation import imitated

    monkeypatch.setattr(triton_segments, "INTERPRETED", False)
    monkeypatch.setattr(triton_segments, "import_module", imitated)
    return kernel_device


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
