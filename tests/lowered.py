"""What Triton makes of the kernels of an op for a Hopper GPU, found without one: `python -m tests.lowered OP VARIANT`.

Triton 3.6 may change the order of numbers where a loop sums a tile, as it was loaded, along its last dimension: sums of
some rows then have numbers of others (mended in triton-lang/triton#11186). The interpreter does not know that pass. It
is said of each kernel whether it has such a sum. In a process of its own, because the interpreter and the compiler
exclude each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from everstate.core.kernels import interpreting
from everstate.ops import OPS, triton_launch, use
from everstate.ops.example import EXAMPLES, Draw

LENGTH = 131
REORDERED = "allow_reorder"


class Hopper:
    """All that the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Lowered(Exception):  # noqa: N818
    """No error: enough is known, the kernel need not become machine code."""


@contextmanager
def lowering() -> Iterator[dict[str, str]]:
    """Inside the block kernels are lowered instead of launched: name of each -> its layouts and operations."""
    found: dict[str, str] = {}
    lower, launch = CUDABackend.make_ttgir, JITFunction.run
    latest = ""

    def lower_and_stop(module: Any, *args: Any) -> None:
        found[latest] = found.get(latest, "") + str(lower(module, *args))
        raise Lowered

    def launch_nothing(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **sizes: Any) -> None:
        nonlocal latest
        latest = kernel.fn.__name__
        try:
            launch(kernel, *args, grid=grid, warmup=True, **sizes)
        except Lowered:
            return
        raise AssertionError(f"{latest} came from a cache")

    CUDABackend.make_ttgir, JITFunction.run = staticmethod(lower_and_stop), launch_nothing
    triton.runtime.driver.set_active(Hopper())
    known, triton_launch._KNOWN = triton_launch._KNOWN, False  # nothing is compiled that could be known
    with interpreting():
        yield found
    CUDABackend.make_ttgir, JITFunction.run, triton_launch._KNOWN = staticmethod(lower), launch, known


def lowered(name: str, variant: str) -> dict[str, str]:
    """The kernels of an op, forward and backward, for the arguments that the laws draw."""
    example = EXAMPLES[name][variant](Draw(dtype=torch.float32), 2, LENGTH, 2)
    leaf = lambda v: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
    given = {k: each(leaf, v) for k, v in {**example.timed, **example.fixed, "state": example.state}.items()}
    with lowering() as found, use("triton"):
        y, _ = OPS[name](**given)
        leaves = [t for v in given.values() for t in (v if isinstance(v, tuple) else [v]) if isinstance(t, Tensor)]
        torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    return found


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """A value, or the parts of a tuple such as the parameters of a layer, through `function`."""
    return type(value)(*map(function, value)) if hasattr(value, "_fields") else function(value)


if __name__ == "__main__":
    for kernel, text in lowered(*sys.argv[1:]).items():
        print(kernel, "reordered" if REORDERED in text else "in order")
