"""Runs kernels written in Gluon without a GPU: their Python source, with tensors of PyTorch for tiles.

Triton's interpreter does not know Gluon. Here layouts mean nothing, a copy is done when it is asked for, and the groups
of warps of a program are threads that meet at barriers, so a kernel that waits for what nobody sends fails here too.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import constexpr
from triton.runtime.interpreter import InterpretedFunction

PATIENCE = 60.0
"""Seconds after which a wait is a deadlock."""

_program = threading.local()


class Pointer:
    def __init__(self, flat: Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat, offset
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.offset + offset)


class Either:
    """Pointers that lead each into one of two tensors."""

    def __init__(self, first: Tensor, one: Pointer, other: Pointer) -> None:
        self.first, self.one, self.other = first, one, other

    def __add__(self, offset: Any) -> Either:
        return Either(self.first, self.one + offset, self.other + offset)

    def __getitem__(self, at: Any) -> Either:
        pointers = (
            Pointer(p.flat, torch.as_tensor(p.offset).expand(self.first.shape)[at]) for p in (self.one, self.other)
        )
        return Either(self.first[at], *pointers)


class Shared:
    """A piece of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype, self.shape, self.layout = data, data.dtype, data.shape, None

    def index(self, at: int) -> Shared:
        return Shared(self.data[at])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def recast(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        return Shared(self.data.view(dtype).view(*shape))

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data.narrow(0, start, length))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype and value.shape == self.shape
        self.data.copy_(value)


class Barrier:
    """Counts arrivals and bytes; when all are there its phase changes."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def meet(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += size
            assert self.missing >= 0
            if self.missing == 0 and self.bytes == 0:
                self.missing, self.phase = self.count, self.phase ^ 1
                self.changed.notify_all()

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def wait(self, phase: int) -> None:
        """Until the phase of this parity has ended; the one before the first counts as odd and ended."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != phase, PATIENCE), "deadlock"


class Barriers(list[Barrier]):
    def index(self, at: int) -> Barrier:  # type: ignore[override]
        return self[at]


class Descriptor:
    def __init__(self, given: Any) -> None:
        self.base = given.base.as_strided(given.shape, given.strides)
        self.block, self.layout, self.dtype = given.block_shape, given.layout, given.base.dtype
        size = torch.Size(self.block).numel() * self.base.element_size()
        self.block_type = SimpleNamespace(nbytes=size, shape=list(self.block))

    def window(self, place: Sequence[int], tile: Tensor) -> tuple[Tensor, Tensor]:
        """What of the tensor lies where the tile is, and that part of the tile."""
        ends = [min(int(at) + n, size) for at, n, size in zip(place, self.block, self.base.shape, strict=True)]
        there = [slice(int(at), end) for at, end in zip(place, ends, strict=True)]
        here = [slice(0, end - int(at)) for at, end in zip(place, ends, strict=True)]
        assert list(tile.shape) == list(self.block) and all(part.start >= 0 for part in there)
        return self.base[tuple(there)], tile[tuple(here)]


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barriers(Barrier() for _ in range(shape[0])) if len(shape) == 2 else Barrier()
    # What nobody has written shows.
    return Shared(torch.full(tuple(shape), torch.nan if dtype.is_floating_point else -1, dtype=dtype))


def _copy_in(source: Descriptor, place: Sequence[int], barrier: Barrier, target: Shared) -> None:
    there, here = source.window(place, target.data)
    target.data.zero_()
    here.copy_(there)
    barrier.meet(0, -source.block_type.nbytes)


def _copy_out(target: Descriptor, place: Sequence[int], source: Shared) -> None:
    there, here = target.window(place, source.data)
    there.copy_(here)


def _multiply(a: Shared | Tensor, b: Shared, added: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Tensor:
    left = a.data if isinstance(a, Shared) else a
    assert left.dtype == b.dtype and added.dtype == torch.float32 and left.shape[0] % 64 == 0
    product = left.float() @ b.data.float()
    return product + added if use_acc else product


def _wait(outstanding: int, deps: Sequence[Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def _specialize(parts: Sequence[tuple[Callable[..., None], Sequence[Any]]], warps: Any, registers: Any) -> None:
    at, count, failures = _program.at, _program.count, []

    def run(function: Callable[..., None], arguments: Sequence[Any]) -> None:
        _program.at, _program.count = at, count
        try:
            with torch.no_grad():
                function(*arguments)
        except BaseException as failure:
            failures.append(failure)  # raised again below

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Kernel:
    """A function of a kernel file; `kernel[grid](...)` runs its programs one after the other."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.arg_names = function, list(inspect.signature(function).parameters)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, enable_fp_fusion: bool, **sizes: int) -> None:
            given = [self.argument(a) for a in arguments]
            with torch.no_grad():
                for at in range(grid[0]):
                    _program.at, _program.count = at, grid[0]
                    self.function(*given, **sizes)

        return launch

    @staticmethod
    def argument(given: Any) -> Any:
        if isinstance(given, Tensor):
            # All of the memory behind the first number: a tensor may be part of wider rows.
            behind = given.untyped_storage().nbytes() // given.element_size() - given.storage_offset()
            return Pointer(given.as_strided((behind,), (1,)))
        return Descriptor(given) if hasattr(given, "block_shape") else given


def _jit(function: Callable[..., Any] | None = None, **settings: Any) -> Any:
    return Kernel if function is None else Kernel(function)


def _load(at: Pointer | Either, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    if isinstance(at, Either):
        return torch.where(at.first, _load(at.one, mask, other), _load(at.other, mask, other))
    if mask is None:
        return at.flat[at.offset].clone()
    place = torch.as_tensor(at.offset)
    mask, place = torch.broadcast_tensors(mask, place)
    out = torch.full(mask.shape, other, dtype=at.flat.dtype)
    out[mask] = at.flat[place[mask]]
    return out


def _store(at: Pointer, value: Any, mask: Tensor | None = None) -> None:
    place, value = at.offset, torch.as_tensor(value)
    if mask is not None:
        mask = mask.expand(value.shape)
        place, value = place[mask], value[mask]
    at.flat[place] = value.to(at.flat.dtype)


def _assembly(asm: str, constraints: str, args: Sequence[Tensor], dtype: torch.dtype, **settings: Any) -> Tensor:
    """What a piece of assembly does, told by an instruction in it."""
    if "prefetch" in asm:
        return args[0]
    if "shfl.sync.bfly" in asm:
        # Between threads of a warp: each row of a tile `[warp, row, n...]` is four of them.
        return args[0][:, torch.arange(8) ^ int(asm.split(",")[2]) // 4]
    if "and.b32 $0" in asm:
        return torch.where(args[1] != 0, args[0], 0)
    if "cos.approx" in asm or "sin.approx" in asm:
        return torch.cos(args[0]) if "cos" in asm else torch.sin(args[0])
    if "fma.rn" in asm:
        phase = torch.round(args[0].double() * (2**32 / math.tau)).to(torch.int64)
        return ((phase + 2**31) % 2**32 - 2**31).to(dtype)
    return args[0].to(dtype)


def _language() -> SimpleNamespace:
    layout = lambda *a, **k: None
    return SimpleNamespace(
        constexpr=int, float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16, int1=torch.bool,
        int16=torch.int16, int32=torch.int32, int64=torch.int64, static_range=range,
        NVMMADistributedLayout=layout, NVMMASharedLayout=layout, SwizzledSharedLayout=layout,
        SliceLayout=layout, DotOperandLayout=layout, BlockedLayout=layout, DistributedLinearLayout=layout,
        join=lambda a, b: torch.stack([a, b], -1), split=lambda t: t.unbind(-1),
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape), zeros_like=torch.zeros_like,
        broadcast=torch.broadcast_tensors, abs=torch.abs, exp=torch.exp, exp2=torch.exp2, log=torch.log,
        fma=lambda a, b, c: a * b + c,
        where=lambda c, a, b: Either(c, a, b) if isinstance(a, Pointer) else torch.where(c, a, torch.as_tensor(b)),
        sum=lambda t, axis: torch.sum(t, axis, dtype=t.dtype), max=torch.amax,
        associative_scan=lambda t, axis, combine: torch.cumsum(t, axis, dtype=t.dtype),
        maximum=lambda a, b: a.clamp(min=b),
        minimum=lambda a, b: min(a, b) if isinstance(a, int) else a.clamp(max=b), convert_layout=lambda t, layout: t,
        inline_asm_elementwise=_assembly,
        program_id=lambda axis: torch.tensor(_program.at), num_programs=lambda axis: _program.count,
        to_tensor=torch.as_tensor, load=_load, store=_store,
        allocate_shared_memory=_allocate, warp_specialize=_specialize,
    )  # fmt: skip


@cache
def imitated(name: str) -> ModuleType:
    """The module of kernels `name`, made to run here."""
    original = import_module(name)
    module = ModuleType(name)
    ours = _hopper_names()
    given = {key: _plain(name, key, value) for key, value in vars(original).items() if key not in ours}
    module.__dict__.update(given, **ours)
    source = inspect.getsource(original)
    beginnings = [source.find("\n\n\n" + word) for word in ("def ", "@gluon.jit")]
    start = min(at for at in beginnings if at >= 0)  # imports and constants stay as they are
    body = "\n" * source[:start].count("\n") + source[start:].replace(".type.layout", ".layout")
    # The annotations of this file are not evaluated, and so are not those of what it compiles.
    exec(compile(body, str(original.__file__), "exec"), module.__dict__)
    return module


def _plain(name: str, key: str, value: Any) -> Any:
    """What a module has from elsewhere: constants without their wrapping, kernel functions made to run here."""
    if isinstance(value, constexpr):
        return value.value
    function = getattr(value, "fn", None)
    home = getattr(function, "__module__", name)
    if home == name:
        return value
    return _shared(function) if _is_plain_triton(value) else vars(imitated(home))[key]


def _is_plain_triton(value: Any) -> bool:
    return isinstance(value, JITFunction | InterpretedFunction) and not isinstance(value, GluonJITFunction)


@cache
def _shared(function: Callable[..., Any]) -> Any:
    """A function written in plain Triton that kernels in Gluon use too."""
    known = vars(import_module(function.__module__))
    given: dict[str, Any] = {"tl": _language(), "triton": SimpleNamespace(jit=_jit)}
    for name in (known.keys() & function.__code__.co_names) - given.keys():
        value = known[name]
        given[name] = _shared(value.fn) if _is_plain_triton(value) else _plain(function.__module__, name, value)
    # Early returns and annotations are as in any function of Python.
    exec(compile("from __future__ import annotations\n" + inspect.getsource(function), __file__, "exec"), given)
    return given[function.__name__]


def _hopper_names() -> dict[str, Any]:
    barrier = SimpleNamespace(
        init=lambda bar, count: bar.init(count), wait=lambda bar, phase: bar.wait(phase),
        expect=lambda bar, size: bar.meet(1, size), arrive=lambda bar, count: bar.meet(count, 0),
        MBarrierLayout=lambda: "barrier",
    )  # fmt: skip
    return {
        "gl": _language(), "gluon": SimpleNamespace(jit=_jit, constexpr_function=lambda function: function),
        "fence_async_shared": lambda: None,
        "mma_v2": lambda a, b, added: a.float() @ b.float() + added, "thread_barrier": lambda: None,
        "warpgroup_mma": _multiply, "warpgroup_mma_wait": _wait, "mbarrier": barrier,
        "load_tile": lambda *copy: _copy_in(*copy),  # as it is then: a test may make some late
        "store_tile": _copy_out, "recast": Shared.recast, "tma": SimpleNamespace(store_wait=lambda pending: None),
    }  # fmt: skip
