"""Launches of kernels in a few microseconds of the host, and small whole numbers without Triton's own functions.

Triton looks at every argument of a launch, and at the world around it, which takes longer than many kernels take on a
GPU. Here the answer of the first launch is kept under what it depends on: dtypes, whether addresses and numbers are
multiples of 16, constants. A finer key than Triton's costs an entry and is never wrong.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import cache
from threading import local
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from everstate.ops.triton_common import INTERPRETED, TRIED

R = TypeVar("R")

COMPILERS = 16
"""Threads that compile kernels: all of a call at once, because the largest may come last."""

# How a compiled kernel is run is no interface of Triton: versions not tried are asked in the ordinary way.
_KNOWN = TRIED and not INTERPRETED.value


class Form:
    """How tiles look: their sides, and for kernels in Gluon how they lie in shared memory."""

    def __init__(self, *block: int, layout: Any = None) -> None:
        self.block, self.layout = block, layout


@cache
def form(*block: int) -> Form:
    """The one form of these sides, for kernels that do not ask how tiles lie."""
    return Form(*block)


class Tiles(NamedTuple):
    """A tensor as the copy engine of a GPU sees it: `TensorDescriptor`, without its checks at every launch."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    form: Form
    padding: str = "zero"
    round_f32_to_tf32: bool = False  # Triton asks from 3.7 on

    @property
    def checked(self) -> TensorDescriptor | HopperDescriptor:
        """The descriptor of Triton, which raises `AssertionError` for what the copy engine cannot take."""
        sizes = list(self.shape), list(self.strides), list(self.form.block)
        if self.form.layout is None:
            return TensorDescriptor(self.base, *sizes)
        return HopperDescriptor(self.base, *sizes, self.form.layout)


class Ready(NamedTuple):
    """A compiled kernel."""

    run: Callable[..., None]
    first: tuple[Any, ...]
    """What `run` takes between the stream and the arguments."""
    as_one: bool
    """Whether it takes the arguments as one sequence."""
    constants: tuple[Any, ...]
    kernel: Any
    """Kept, so that no other gets its id."""
    compiled: Any

    def start(self, grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        """Launch a grid of three numbers. `values` are the arguments, and after them `constants`."""
        if self.as_one:
            self.run(*grid, stream, *self.first, values)
        else:
            self.run(*grid, stream, *self.first, *values)


class Launcher(Protocol):
    """Who is asked in the place of `launch`."""

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        """Launch a kernel, or do something else."""


class Watcher(Launcher, Protocol):
    """Who wants to know of every launch, those that do not go through `launch` too."""

    def launched_in_tritons_way(self) -> None:
        """Be told of one of those."""


class NotCompiled(Exception):  # noqa: N818
    """No error: a kernel is launched for the first time."""


class _Trying:
    """Raises `NotCompiled` for a kernel that nobody has launched."""

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        launch_known(kernel, grid, args, settings, compile_new=False)


class _Rehearsal:
    """Compiles kernels, and launches none."""

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        _in_tritons_way(kernel.warmup, args, {"grid": grid, **settings})


class _Compilers(ThreadPoolExecutor):
    """Threads that make kernels ready to be launched: until Triton 3.6 what launches each is C, for the compiler of the
    system, which it would ask at the first launch, one after the other."""

    def __init__(self) -> None:
        # A thread begins with the first GPU.
        super().__init__(COMPILERS, initializer=torch.cuda.set_device, initargs=(current_device(),))

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        """Compile a kernel, and load it with what launches it."""

        def ready() -> Any:
            kernel = compile_kernel()
            kernel._init_handles()
            return kernel

        return super().submit(ready)


class _Here(local):
    launcher: Launcher | None = None


here = _Here()
"""Of each thread, who launches its kernels, if it is not `launch`."""

_ready: dict[tuple[Any, ...], Ready] = {}


def launches_are_known() -> bool:
    """Whether kernels are launched without asking Triton, and nobody watches who would be told by Triton."""
    return _KNOWN and not knobs.runtime.launch_enter_hook.calls


@contextmanager
def _launching(launcher: Launcher) -> Iterator[None]:
    """Ask `launcher` in the place of `launch` inside the `with` block."""
    here.launcher = launcher
    try:
        yield
    finally:
        here.launcher = None


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of all launches of this thread inside the `with` block, those that do not go through `launch` too.

    It stands in the chain of Triton's hooks meanwhile; other threads then launch in Triton's way.
    """

    def triton_way(metadata: Any) -> None:
        if here.launcher is watcher:
            watcher.launched_in_tritons_way()

    knobs.runtime.launch_enter_hook.add(triton_way)
    try:
        with _launching(watcher):
            yield
    finally:
        knobs.runtime.launch_enter_hook.remove(triton_way)


def compile_together(function: Callable[..., R], *args: Any) -> R:
    """`function(*args)`, whose kernels are compiled at the same time, where they are not yet.

    It is called until it wants to launch a kernel that is not compiled; then to see which kernels there are, without
    running them; and then once more. So it must not matter what it has changed, and nothing may be looked up by what a
    kernel has written, which may be anything. Where a graph is captured, which would hold all of this, and where
    launches go the ordinary way, it is only called.
    """
    if torch.cuda.is_current_stream_capturing() or not launches_are_known():
        return function(*args)
    with suppress(NotCompiled), _launching(_Trying()):
        return function(*args)
    # What fails here fails again below, and is reported from there.
    with suppress(Exception):
        _rehearse(function, args)
    return function(*args)


def _rehearse(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from triton.runtime._async_compile import AsyncCompileMode  # not in every Triton

    def compile_all() -> None:
        with _Compilers() as pool, AsyncCompileMode(pool, ignore_errors=True):
            function(*args)

    with _launching(_Rehearsal()):
        # In a context of its own: Triton's mode would outlast an interruption.
        copy_context().run(compile_all)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """`kernel[grid](*args, **settings)`. Constants of the kernel are given by name, behind all other arguments."""
    launcher = here.launcher
    if launcher is not None:
        launcher.launch(kernel, grid, args, settings)
    elif launches_are_known():
        launch_known(kernel, grid, args, settings)
    else:
        _in_tritons_way(kernel[grid], args, settings)


def _in_tritons_way(call: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """Call a function of Triton with arguments as it takes them."""
    given = (a.checked if type(a) is Tiles else a for a in args)
    # From Triton 3.10 on a product and a sum are one instruction only where a launch asks for it.
    return call(*given, enable_fp_fusion=True, **settings)


def launch_known(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any], *, compile_new: bool = True
) -> Ready:
    """Launch as the first launch that was alike found out. Without `compile_new` there must have been one."""
    device = current_device()
    key: list[Any] = [id(kernel), device, tuple(settings), tuple(settings.values())]
    given: list[Any] = []
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            # The address itself: of a tensor the launcher would ask the driver whether it is one of a GPU.
            address = value.data_ptr()
            key += value.dtype, value.is_cuda, address & 15 == 0
            value = address
        elif kind is int:
            key.append(value if value < 2 else (value & 15 == 0, value >> 31))
        elif kind is Tiles:
            key += value.base.dtype, value.form
        else:
            assert value is None or kind is float, f"an argument of type {kind.__name__}"
            key.append(kind)  # a number that is not whole is never a constant
        given.append(value)
    made = tuple(key)
    known = _ready.get(made)
    if known is None:
        if not compile_new:
            raise NotCompiled
        known = _ready[made] = _compile(kernel, grid, args, settings)
        return known
    given += known.constants
    known.start((*grid, 1, 1)[:3], stream_of(device), given)
    return known


def _compile(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> Ready:
    """Launch in Triton's way, and return what the next such launch needs to know."""
    compiled = _in_tritons_way(kernel[grid], args, settings)
    own, rest = kernel.params[: len(args)], kernel.params[len(args) :]
    assert len(grid) <= 2 and not any(parameter.is_constexpr for parameter in own)
    constants = tuple(settings[parameter.name] for parameter in rest)
    launcher, hooks = compiled.run, (compiled.packed_metadata, None, None, None)
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        # It wants memory of its own, which the launcher gets for it.
        return Ready(launcher, (compiled.function, *hooks), False, constants, kernel, compiled)
    kinds, scratch = (launcher.launch_cooperative_grid, launcher.launch_pdl), (None, None)
    as_one = hasattr(launcher, "arg_annotations")  # from Triton 3.7 on, where one function launches all kernels
    last = (*hooks, *scratch, launcher.arg_annotations, launcher.kernel_signature) if as_one else (*scratch, *hooks)
    return Ready(launcher.launch, (compiled.function, *kinds, *last), as_one, constants, kernel, compiled)


def current_device() -> int:
    """The GPU that launches go to."""
    device: int = driver.active.get_current_device()
    return device


def stream_of(device: int) -> int:
    """The stream that launches go to."""
    stream: int = driver.active.get_current_stream(device)
    return stream


def cdiv(whole: int, part: int) -> int:
    """The number of parts that cover the whole; `triton.cdiv` takes the host microseconds."""
    return -(-whole // part)


def power_of_2(size: int) -> int:
    """The smallest power of two that is not smaller than a size of at least 1; `triton.next_power_of_2` likewise."""
    return 1 << (size - 1).bit_length()
