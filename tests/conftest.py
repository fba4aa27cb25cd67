"""Fixtures that every test file may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from everstate.core.kernels import interpreting

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is imported

torch.set_num_threads(1)

# No test is timed: the machine is shared.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that memory read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel_device() -> Iterator[torch.device]:
    """Where tests of Triton kernels run: the GPU, or the CPU with Triton's interpreter."""
    if HAS_GPU:
        yield torch.device("cuda")
        return
    pytest.importorskip("triton")
    with interpreting():
        yield torch.device("cpu")
