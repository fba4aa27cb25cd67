"""Calls that are worked out once for their sizes, and after that only filled with addresses.

What a function does in Python before its launches, from strides to grids, follows from the dtypes, shapes and strides
of its tensors and from its numbers, and takes the host longer than a GPU needs for small kernels. A `replayed` function
runs as it is when it is first called with such arguments: that makes tables and compiles kernels, all at the same time,
because a function that only writes new memory can be asked beforehand which it will launch. The second time each
piece of memory, launch and operation of PyTorch is written down, and from then on that list is gone through.

What a list cannot say, such as a number read from the device, makes a function run as it is for good.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from everstate.core.kernels import is_overlapping
from everstate.ops.triton_launch import (
    Ready,
    Tiles,
    compile_together,
    current_device,
    here,
    launch_known,
    launches_are_known,
    stream_of,
    watching,
)

R = TypeVar("R")

MOST, ADDRESSES = 512, 64
"""Lists that are kept of a function, and descriptions of a tensor."""

SHARED = 64 * 2**20
"""Bytes of a tensor that only launches use, up to which it shares one piece with others, held until the call ends. In
front of larger ones the host's time does not count, but memory does, and each is given back when it has been read."""
ALIGNED = 512
"""Bytes between which memory begins in a shared piece, as PyTorch's allocator has it."""

_NEW, _PLAIN = object(), object()
"""What has been called once, and what runs as it is."""

_lists: list[dict[tuple[Any, ...], Any]] = []
"""What each function has."""

_aten = torch.ops.aten
_EMPTY = frozenset(
    {
        _aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default,
        _aten.new_empty_strided.default,
    }
)  # fmt: skip


def replayed(function: Callable[..., R]) -> Callable[..., R]:
    """Let a function of tensors, lists of numbers and constants be replayed.

    What it returns is new memory. Besides its arguments it reads nothing but tables of whole numbers, which never
    change.
    """
    known: dict[tuple[Any, ...], Any] = {}
    _lists.append(known)

    @wraps(function)
    def call(*args: Any) -> R:
        if here.launcher is not None or not launches_are_known():
            return function(*args)
        held: list[Any] = []
        addresses: list[int] = []
        device = current_device()
        key: list[Any] = [device, is_overlapping(), torch.is_autocast_enabled("cuda")]
        for value in args:
            kind = type(value)
            if kind is Tensor or kind is nn.Parameter:
                address = value.data_ptr()
                held.append(value)
                addresses.append(address)
                key += value.dtype, value.shape, value.stride(), value.get_device(), address & 15
            else:
                key.append(tuple(value) if kind is list else value)
        made = tuple(key)
        found = known.get(made)
        if type(found) is Replay:
            return found.run(held, addresses, stream_of(device))
        if found is _PLAIN:
            return function(*args)
        if found is None:
            if len(known) >= MOST:
                known.clear()
            known[made] = _NEW
            return compile_together(function, *args)
        result, replay = _record(function, args, held)
        known[made] = replay or _PLAIN
        return result

    return call


def forget() -> None:
    """Begin anew, as tests do that change constants on which launches depend."""
    for known in _lists:
        known.clear()


def _record(function: Callable[..., R], args: tuple[Any, ...], inputs: list[Tensor]) -> tuple[R, Replay | None]:
    """Call the function, and write down what it does if that can be."""
    recorder = _Recorder(inputs)
    with watching(recorder), recorder:
        result = function(*args)
    return result, recorder.finish(result)


class _Part(NamedTuple):
    """A view of a tensor, which is the one at `source` among the arguments and all that has been made."""

    source: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Numbers from the first of the source."""
    whole: bool

    def of(self, held: list[Any]) -> Tensor:
        base: Tensor = held[self.source]
        return base if self.whole else base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


class _Memory:
    """New memory, the tensor at `at`."""

    def __init__(self, at: int, like: Tensor) -> None:
        size, stride = tuple(like.shape), like.stride()
        self._make = partial(torch.empty_strided, size, stride, dtype=like.dtype, device=like.device)
        self.at, self.nbytes, self.device = at, like.untyped_storage().nbytes(), like.device

    def do(self, held: list[Any], addresses: list[int], stream: int) -> None:
        made = held[self.at] = self._make()
        addresses[self.at] = made.data_ptr()


class _Shared:
    """New memory that only launches use, in one piece: what is needed at the same time lies apart."""

    def __init__(self, memory: dict[int, _Memory], last: dict[int, int]) -> None:
        """`memory` is by the step that makes it; `last` has by the place of a tensor the last step that uses it."""
        placed: list[tuple[int, int, int]] = []
        self._offsets: list[tuple[int, int]] = []
        for made, part in memory.items():
            size, begin = -(-part.nbytes // ALIGNED) * ALIGNED, 0
            for other, end in sorted((other, end) for other, end, read in placed if read >= made):
                if begin + size <= other:
                    break
                begin = max(begin, end)
            placed.append((begin, begin + size, last[part.at]))
            self._offsets.append((part.at, begin))
        size = max(end for _, end, _ in placed)
        device = next(iter(memory.values())).device
        self._make = partial(torch.empty, size, dtype=torch.uint8, device=device)

    def do(self, held: list[Any], addresses: list[int], stream: int) -> None:
        piece = self._make()
        held.append(piece)
        base = piece.data_ptr()
        for at, offset in self._offsets:
            addresses[at] = base + offset


class _Operation:
    """An operation of PyTorch; `new` says where those of its results belong that are memory of their own."""

    def __init__(
        self, operation: Callable[..., Any], args: list[Any], named: dict[str, Any], new: list[int | None]
    ) -> None:
        self.operation, self.args, self.named, self.new = operation, args, named, new

    def do(self, held: list[Any], addresses: list[int], stream: int) -> None:
        result = self.operation(
            *[_filled(value, held) for value in self.args],
            **{name: _filled(value, held) for name, value in self.named.items()},
        )
        for made, at in zip(_leaves(result), self.new, strict=True):
            if at is not None:
                held[at] = made
                addresses[at] = made.data_ptr()


class _Tile:
    """What the copy engine wants to know of a tensor: it follows from the address, so what has been made is kept."""

    def __init__(self, at: int, source: int, offset: int, rest: tuple[Any, ...]) -> None:
        self.at, self.source, self.offset, self._rest = at, source, offset, rest
        self._known: dict[int, Any] = {}

    def described(self, address: int) -> Any:
        """The description of a tensor that is there."""
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= ADDRESSES:
                self._known.clear()
            found = self._known[address] = _describe(address, *self._rest)
        return found


class _Launch:
    """A launch whose arguments are all there but addresses."""

    def __init__(self, ready: Ready, grid: tuple[int, ...]) -> None:
        self.ready, self.grid = ready, (*grid, 1, 1)[:3]
        self.given: list[Any] = []
        self.pointers: list[tuple[int, int, int]] = []
        self.tiles: list[_Tile] = []

    def do(self, held: list[Any], addresses: list[int], stream: int) -> None:
        given = self.given.copy()
        for at, source, offset in self.pointers:
            given[at] = addresses[source] + offset
        for tile in self.tiles:
            given[tile.at] = tile.described(addresses[tile.source] + tile.offset)
        self.ready.start(self.grid, stream, given)


class Replay:
    """What a call does, step by step."""

    def __init__(self, steps: list[tuple[Any, list[int]]], made: int, result: Any, tables: list[Tensor]) -> None:
        """Each step is there with the tensors that nobody reads after it; `made` is how many they make."""
        self._steps = [(step.do, tuple(freed)) for step, freed in steps]
        self._nothing, self._nowhere = [None] * made, [0] * made
        self._result = result
        self._tables = tables  # kept, because launches have their addresses

    def run(self, held: list[Any], addresses: list[int], stream: int) -> Any:
        """What the function would have returned for these tensors, which are at these addresses."""
        held += self._nothing
        addresses += self._nowhere
        for do, freed in self._steps:
            do(held, addresses, stream)
            for at in freed:
                held[at] = None
        return _filled(self._result, held)


class _Recorder(TorchDispatchMode):
    """Sees all that a function does: memory and operations of PyTorch, and launches."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self._kept = list(inputs)  # all that there is of tensors: no two of them may lie in one place
        self._sources = {_storage(t): at for at, t in enumerate(inputs)}
        self._can = len(self._sources) == len(inputs)  # two arguments in one memory: which is meant?
        self._inputs = len(inputs)
        self._steps: list[Any] = []
        self._last: dict[int, int] = {}
        self._as_tensors: set[int] = set()  # what more than launches use
        self._tables: list[Tensor] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        here.launcher = None  # what an operation does inside is its own
        try:
            made = operation(*args, **named)
        finally:
            here.launcher = self
        if operation in _EMPTY:
            self._steps.append(_Memory(len(self._kept), made))
            self._add(made)
        elif not _is_view(operation):
            values, more = [self._part(v) for v in args], {name: self._part(v) for name, v in named.items()}
            leaves = _leaves(made)
            if not all(isinstance(t, Tensor) for t in leaves):
                self._can = False  # a number from the device
                return made
            places = count(len(self._kept))
            new = [None if _storage(t) in self._sources else next(places) for t in leaves]
            if new.count(None) < len(new) or operation._schema.is_mutable:
                self._steps.append(_Operation(operation, values, more, new))
            for t, place in zip(leaves, new, strict=True):
                if place is not None:
                    self._add(t)
        return made

    def launched_in_tritons_way(self) -> None:
        """Of such a launch nothing is known."""
        self._can = False

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        """Launch a kernel, and write down how."""
        ready = launch_known(kernel, grid, args, settings)
        if ready.run is ready.compiled.run:
            self._can = False
            return
        step, metas = _Launch(ready, grid), iter(getattr(ready.compiled.metadata, "tensordesc_meta", None) or ())
        for value in args:
            if isinstance(value, Tiles):
                self._add_tile(step, value, next(metas, None))
            elif isinstance(value, Tensor):
                self._add_pointer(step, value)
            else:
                step.given.append(value)
        step.given += ready.constants
        if step.tiles:
            step.ready = ready._replace(run=_bare(ready.run))
        self._steps.append(step)

    def finish(self, result: Any) -> Replay | None:
        """The list of all steps, if it says what the function does."""
        answer = self._part(result)
        wanted = {part.source for part in _leaves(answer) if isinstance(part, _Part)}
        if not self._can or any(source < self._inputs for source in wanted):
            return None
        shared = {at: step for at, step in enumerate(self._steps) if self._may_share(step)}
        kept = wanted | {step.at for step in shared.values()}
        freed: dict[int, list[int]] = {}
        for source, last in self._last.items():
            if source >= self._inputs and source not in kept:
                freed.setdefault(last, []).append(source)
        steps = [(step, freed.get(at, [])) for at, step in enumerate(self._steps) if at not in shared]
        if shared:
            steps.insert(0, (_Shared(shared, self._last), []))
        return Replay(steps, len(self._kept) - self._inputs, answer, self._tables)

    def _may_share(self, step: Any) -> bool:
        """Whether a step makes memory of which nobody needs to have the tensor."""
        return (
            isinstance(step, _Memory)
            and step.at not in self._as_tensors
            and step.nbytes <= SHARED
            and step.device == self._kept[0].device
        )

    def _add(self, made: Tensor) -> None:
        """A tensor that is memory of its own."""
        self._can = self._can and made.data_ptr() % 16 == 0
        self._sources[_storage(made)] = len(self._kept)
        self._last[len(self._kept)] = len(self._steps) - 1
        self._kept.append(made)

    def _find(self, t: Tensor) -> int | None:
        """Where the memory of a tensor comes from."""
        source = self._sources.get(_storage(t))
        if source is not None:
            self._last[source] = len(self._steps)
        return source

    def _part(self, value: Any) -> Any:
        """A value with tensors replaced by what finds them again."""
        if isinstance(value, (tuple, list)):
            parts = [self._part(each) for each in value]
            return tuple(parts) if isinstance(value, tuple) else parts
        if not isinstance(value, Tensor):
            return value
        source = self._find(value)
        if source is None:
            self._keep(value)
            return value
        self._as_tensors.add(source)
        base, size, stride = self._kept[source], tuple(value.shape), value.stride()
        self._can = self._can and base.dtype == value.dtype
        offset = int(value.storage_offset() - base.storage_offset())
        return _Part(source, size, stride, offset, (size, stride, offset) == (tuple(base.shape), base.stride(), 0))

    def _place(self, t: Tensor) -> tuple[int, int] | None:
        """Source and offset in bytes; None for a table, whose address stays what it is."""
        source = self._find(t)
        if source is not None:
            return source, t.data_ptr() - self._kept[source].data_ptr()
        self._keep(t)
        return None

    def _keep(self, t: Tensor) -> None:
        """Memory of somebody else, which may only be a table: its address stays what it is."""
        self._can = self._can and not (t.is_floating_point() or t.is_complex())
        self._tables.append(t)

    def _add_pointer(self, step: _Launch, t: Tensor) -> None:
        place = self._place(t) if t.numel() else None
        if place is not None:
            step.pointers.append((len(step.given), *place))
        step.given.append(t.data_ptr())

    def _add_tile(self, step: _Launch, tiles: Tiles, meta: dict[str, Any] | None) -> None:
        place = self._place(tiles.base)
        if place is None or meta is None or meta["fp4_padded"]:
            self._can = False
            return
        sizes = list(tiles.shape), list(tiles.strides)
        kind, padding = _kind_of(meta["elem_type"]), int(tiles.padding == "nan")
        rest = meta["swizzle"], meta["elem_size"], kind, meta["block_size"], *sizes, padding
        step.tiles.append(_Tile(len(step.given), *place, rest))
        step.given += None, *tiles.shape, *tiles.strides


def _storage(t: Tensor) -> int:
    """What tells the memory of a tensor from that of others, as long as both are there."""
    cdata: int = t.untyped_storage()._cdata
    return cdata


def _is_view(operation: Any) -> bool:
    """Whether an operation makes nothing but another view of what there is."""
    infos = [argument.alias_info for argument in operation._schema.arguments]
    return any(info is not None and not info.is_write for info in infos)


def _leaves(value: Any) -> list[Any]:
    """What is in lists and tuples, without None."""
    if isinstance(value, (tuple, list)) and not isinstance(value, _Part):
        return [leaf for each in value for leaf in _leaves(each)]
    return [] if value is None else [value]


def _filled(value: Any, held: list[Any]) -> Any:
    """A value with the tensors that its parts stand for."""
    kind = type(value)
    if kind is _Part:
        return value.of(held)
    if kind is list:
        return [_filled(each, held) for each in value]
    return tuple(_filled(each, held) for each in value) if kind is tuple else value


def _kind_of(dtype: int) -> int:
    """The name that the driver of a GPU has for what the compiler calls a dtype."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST  # not in a Triton for other GPUs

    kind: int = TMA_DTYPE_DEVICE_TO_HOST[dtype]
    return kind


def _describe(address: int, *rest: Any) -> Any:
    """What the copy engine wants to know of the tensor at an address."""
    utils = driver.active.utils
    describe = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # until Triton 3.6
    return describe(address, *rest)


def _bare(run: Any) -> Callable[..., None]:
    """The launcher behind the function of Triton that describes tensors at each launch."""
    inner: Callable[..., None] = run.__closure__[run.__code__.co_freevars.index("launcher")].cell_contents
    return inner
