"""Launches of kernels in a few microseconds of the host, and small whole numbers without Triton's own functions.

Triton looks at every argument of a launch, and at the world around it, in 20 to 40 us; that is longer than many kernels
take on a GPU. Here the answer of the first launch is kept under what it depends on: dtypes, whether addresses and
numbers are multiples of 16, constants. A finer key than Triton's costs an entry and is never wrong.
"""

from functools import cache
from typing import Any, NamedTuple

import triton
from torch import Tensor, nn
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from everstate.ops.triton_common import INTERPRETED

# How a compiled kernel is run is no interface of Triton: other versions are asked in the ordinary way.
_KNOWN = triton.__version__.startswith("3.6.") and not INTERPRETED.value

_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}


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

    @property
    def checked(self) -> TensorDescriptor | HopperDescriptor:
        """The descriptor of Triton, which raises `AssertionError` for what the copy engine cannot take."""
        sizes = list(self.shape), list(self.strides), list(self.form.block)
        if self.form.layout is None:
            return TensorDescriptor(self.base, *sizes)
        return HopperDescriptor(self.base, *sizes, self.form.layout)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """`kernel[grid](*args, **settings)`. Constants of the kernel are given by name, behind all other arguments."""
    if not _KNOWN or knobs.runtime.launch_enter_hook.calls:
        kernel[grid](*(a.checked if type(a) is Tiles else a for a in args), **settings)
        return
    device = driver.active.get_current_device()
    key = (id(kernel), device, *settings.items(), *map(_kind, args))
    known = _compiled.get(key)
    if known is None:
        _compiled[key] = _compile(kernel, grid, args, settings)
        return
    run, function, metadata, constants, _ = known
    columns, rows = (*grid, 1)[:2]
    stream = driver.active.get_current_stream(device)
    run(columns, rows, 1, stream, function, metadata, None, None, None, *args, *constants)


def _kind(value: Any) -> Any:
    """All of an argument that a compiled kernel depends on."""
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        return value.dtype, value.data_ptr() & 15 == 0
    if kind is int:
        return value if value < 2 else (value & 15 == 0, value >> 31)
    if kind is Tiles:
        return value.base.dtype, value.form
    assert value is None or kind is float, f"an argument of type {kind.__name__}"
    return kind  # a number that is not whole is never a constant


def _compile(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, ...]:
    """Launch in Triton's way, and return what the next such launch needs to know."""
    compiled = kernel[grid](*(a.checked if type(a) is Tiles else a for a in args), **settings)
    own, rest = kernel.params[: len(args)], kernel.params[len(args) :]
    assert len(grid) <= 2 and not any(parameter.is_constexpr for parameter in own)
    constants = tuple(settings[parameter.name] for parameter in rest)
    # With the kernel, so that no other gets its id.
    return compiled.run, compiled.function, compiled.packed_metadata, constants, kernel


def cdiv(whole: int, part: int) -> int:
    """The number of parts that cover the whole; `triton.cdiv` takes 5 us on the host."""
    return -(-whole // part)


def power_of_2(size: int) -> int:
    """The smallest power of two that is not smaller than a size of at least 1; `triton.next_power_of_2` likewise."""
    return 1 << (size - 1).bit_length()
