"""Whether a Triton kernel can run here. Triton itself is imported only by the files that hold kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTERS = 1024
"""That `counters` gives at most: more than a GPU has multiprocessors."""

# A plain global, because torch.compile traces through it.
_interpreting = False
_overlapping = False
_kept: dict[Hashable, Tensor] | None = None


@contextmanager
def interpreting() -> Iterator[None]:
    """Let kernels accept CPU tensors inside the `with` block, for tests of their logic where there is no GPU.

    The environment must have said TRITON_INTERPRET=1 before the first kernel was imported.
    """
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


@contextmanager
def overlapping() -> Iterator[dict[Hashable, Tensor]]:
    """Let a kernel of one token start inside the `with` block while the one before it still runs.

    What it reads before that one has ended are weights and states of its own layer, so nothing may write these just
    before. A GPU of compute capability 9.0 or newer can; on others nothing changes. Gives the memory that all kernels
    launched in the block share, see `kept`: who captured them keeps it, and does not run them twice at a time. All
    threads of the process are in the block: no other may run kernels meanwhile.
    """
    global _overlapping, _kept
    before = _overlapping, _kept
    _overlapping, _kept = True, {}
    try:
        yield _kept
    finally:
        _overlapping, _kept = before


def kept(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """`make()`: inside `overlapping` what it gave there the first time for this key.

    It makes memory that kernels share, or what follows from weights alone.
    """
    if _kept is None:
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros (int32), which a kernel leaves as it found them; inside `overlapping` always the same."""
    assert count <= COUNTERS
    return kept(("counters", device), lambda: torch.zeros(COUNTERS, dtype=torch.int32, device=device))


def is_overlapping() -> bool:
    """Whether this is inside `overlapping`."""
    return _overlapping


def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device start before the kernel before them has ended."""
    return _overlapping and device.type == "cuda" and capability(device) >= (9, 0)


class KernelOp:
    """Launches of kernels as an operator of PyTorch, which compilers and autograd see as one; see `kernel_op`.

    The dispatcher takes longer for a call than a GPU for many kernels. So where nothing else looks on, the function is
    called as it is, and where only autograd does, as a `torch.autograd.Function`.
    """

    def __init__(self, function: Callable[..., Any], name: str, mutates: Iterable[str]) -> None:
        self._function = function
        self._op = torch.library.custom_op(name, function, mutates_args=mutates)
        self._differentiable: type[torch.autograd.Function] | None = None
        self.register_fake = self._op.register_fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`."""
        self._op.register_autograd(backward, setup_context=setup_context)
        returns = self._op._opoverload._schema.returns
        if any(isinstance(each.type, torch.ListType) for each in returns):
            return  # of a list, autograd alone does not know that it holds tensors

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._function(*args)
            setup_context(ctx, args, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._differentiable = type(self._op._name, (torch.autograd.Function,), parts)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(args):
            return self._op(*args)
        if not torch.is_grad_enabled():
            return self._function(*args)
        return self._op(*args) if self._differentiable is None else self._differentiable.apply(*args)


def kernel_op(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], KernelOp]:
    """Make a function that launches kernels the operator `everstate::name`, which changes the arguments `mutates`."""
    return lambda function: KernelOp(function, f"everstate::{name}", mutates)


_PLAIN = frozenset(
    {Tensor, nn.Parameter, type(None), bool, int, float, str, list, tuple, torch.Size, torch.dtype, torch.device}
)


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether more than autograd wants to see a call: a mode, a transform, or a tensor that only stands for one."""
    watched: bool = (
        not _PLAIN.issuperset(map(type, args))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
    return watched


def refusal(*inputs: Tensor | None, pairs: bool = False) -> str | None:
    """Why kernels cannot take these tensors (their device, their dtype), or None where they can.

    Kernels that read complex numbers as `pairs` of float32 take complex64 too.
    """
    device = next(tensor.device for tensor in inputs if tensor is not None)
    if device.type != "cuda" and not (_interpreting and device.type == "cpu"):
        return f"runs on a GPU, the input is on {device.type}"
    taken = (*DTYPES, torch.complex64) if pairs else DTYPES
    for t in inputs:
        if t is not None and t.dtype not in taken and (t.is_floating_point() or t.is_complex()):
            *most, last = (str(dtype).removeprefix("torch.") for dtype in (*taken, t.dtype))
            return f"takes {', '.join(most[:-1])} and {most[-1]}, not {last}"
    if not has_triton():
        return "needs the package triton, which comes with PyTorch for GPUs"
    if capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


# What a compiler cannot look into, and need not: the answers never change.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return _find_triton()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def capability(device: torch.device) -> tuple[int, int]:
    """Generation of a GPU: (9, 0) is Hopper. The interpreter can do what that can."""
    return _ask_capability(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def shared_memory(device: torch.device) -> int:
    """Bytes that the programs of one multiprocessor share, all of which one program may take."""
    return _ask_shared_memory(device)


@cache
def _find_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _ask_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def _ask_shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**62  # the interpreter has no such limit
    properties = torch.cuda.get_device_properties(device)
    # What a program has to ask for; the stubs of PyTorch do not know it.
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, which is how many programs it takes to fill it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
