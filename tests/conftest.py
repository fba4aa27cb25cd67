"""Fixtures that every test file may use."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is imported
INTERPRETED = not HAS_GPU and find_spec("triton") is not None


class KernelsAsTheyAre(MetaPathFinder):
    """Keeps the hook that checks shapes away from kernels: Triton reads their source, not what a decorator made."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        ours = package.startswith("everstate.") and name.startswith("triton")
        return PathFinder.find_spec(fullname, path) if ours else None


def pytest_sessionstart() -> None:
    sys.meta_path.insert(0, KernelsAsTheyAre())  # ahead of the hook, which is there by now
    if INTERPRETED:
        from tests.interpreter import hasten

        hasten()


def pytest_collection_finish() -> None:
    """All that was imported stays: the collector of garbage need not pass over it again and again."""
    gc.collect()
    gc.freeze()


# Threads that wait for each other on busy cores take many times as long. numpy, which the interpreter computes with, is
# here already with its own: this is for the processes that pytest-xdist starts.
torch.set_num_threads(1)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

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
    # A compiler keeps what earlier tests had it trace, and gives up after eight functions that look alike.
    torch._dynamo.reset()
    if HAS_GPU:
        from everstate.ops.triton_replay import forget  # not before the hook that checks shapes is there

        forget()
        yield torch.device("cuda")
        return
    pytest.importorskip("triton")
    from everstate.core.kernels import interpreting  # not before the hook that checks shapes is there

    with interpreting():
        yield torch.device("cpu")


@pytest.fixture
def hopper(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A Hopper GPU, or this processor as if it were one: the kernels imitated."""
    from everstate.core.kernels import capability
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
def deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of Mamba-2 are deferred, however small and on any device: by PyTorch where no kernel serves."""
    from everstate.mixers import mamba2
    from everstate.ops import mamba2_step_

    monkeypatch.setattr(mamba2, "pays", lambda state: True)
    monkeypatch.setattr(type(mamba2_step_), "serving", lambda *arguments, **settings: "triton")
