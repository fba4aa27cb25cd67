"""Calls that are worked out once for their sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
NUMBERS = 24


class Adding:
    """A kernel on the CPU: `out[i] = x[i] + n` for 24 numbers, by their addresses."""

    as_one = False
    """Whether its launcher takes arguments as one, as from Triton 3.7 on."""

    def __init__(self) -> None:
        self.params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in ("x", "out", "n", "SIZE")]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def ask(x: Any, out: Any, n: float, *, SIZE: int, enable_fp_fusion: bool = True) -> Any:
            triton.knobs.runtime.launch_enter_hook(None)
            described = isinstance(x, Described)
            add((x.base if described else x).data_ptr(), out.data_ptr(), n)
            sizes = {"global_scratch_size": 0, "profile_scratch_size": 0}
            kinds = {"launch_cooperative_grid": False, "launch_pdl": False}
            if self.as_one:
                kinds |= {"arg_annotations": (), "kernel_signature": b""}
            run = SimpleNamespace(launch=wrapped(run_described) if described else run_plain, **sizes, **kinds)
            meta = {"swizzle": 3, "elem_size": 4, "elem_type": 0, "block_size": [24], "fp4_padded": False}
            metadata = SimpleNamespace(tensordesc_meta=[meta] if described else None)
            return SimpleNamespace(run=run, function=1, packed_metadata=(4, 1, 0), metadata=metadata)

        return ask


class Described:
    """What a tensor is for the copy engine."""

    def __init__(self, base: Tensor, *sizes: Any) -> None:
        self.base = base


def add(x: int, out: int, n: float) -> None:
    read, write = ((ctypes.c_float * NUMBERS).from_address(address) for address in (x, out))
    for i in range(NUMBERS):
        write[i] = read[i] + n


def spread(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a launcher was given, with the arguments of the kernel each for itself."""
    if not Adding.as_one:
        return given
    *first, annotations, signature, values = given
    assert (annotations, signature) == ((), b"")
    return *first, *values


def run_plain(columns: int, rows: int, depth: int, stream: int, *given: Any) -> None:
    assert (columns, rows, depth, stream) == (3, 1, 1, 7)
    *_, x, out, n, size = spread(given)
    assert size == 8
    add(x, out, n)


def run_described(*given: Any) -> None:
    *_, x, shape, stride, out, n, size = spread(given)
    assert (shape, stride, size) == (NUMBERS, 1, 8)
    add(x, out, n)


def wrapped(launcher: Callable[..., None]) -> Callable[..., None]:
    """As Triton does it: the tensor is described at each launch."""

    def inner(*given: Any) -> None:
        *first, tiles, out, n, size = (*given[:-1], *given[-1]) if Adding.as_one else given
        values = tiles.base.data_ptr(), *tiles.shape, *tiles.strides, out, n, size
        launcher(*first, *([values] if Adding.as_one else values))

    return inner


@pytest.fixture(autouse=True, params=[False, True], ids=["Triton 3.6", "Triton 3.7"])
def imitation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from everstate.ops import triton_launch, triton_replay

    monkeypatch.setattr(Adding, "as_one", request.param)
    describe = "fill_tma_descriptor_tiled" if request.param else "fill_tma_descriptor"
    utils = SimpleNamespace(**{describe: lambda address, *rest: address})
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7, utils=utils)
    monkeypatch.setattr(triton_launch, "_KNOWN", True)
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton_replay, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton_launch, "_ready", {})
    monkeypatch.setattr(triton_launch, "TensorDescriptor", Described)
    monkeypatch.setattr(triton_replay, "compile_together", lambda function, *args: function(*args))


class Counted:
    """A replayed function that counts how often it runs as it is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        from everstate.ops.triton_replay import replayed

        def counted(*args: Any) -> Any:
            self.runs += 1
            return function(*args)

        self.runs, self.function, self.replayed = 0, function, replayed(counted)

    def check(self, make: Callable[[], tuple[Any, ...]], runs: int, calls: int = 5) -> None:
        """Whether every call gives what the function gives, and how often it runs."""
        self.runs = 0
        kept = []
        for _ in range(calls):
            args = make()
            got, expected = self.replayed(*args), self.function(*args)
            kept.append((got, expected))
        for got, expected in kept:  # no call writes into what another gave
            assert type(got) is type(expected)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert self.runs == runs


def plus(x: Tensor, out: Tensor, n: float, *, tiles: bool = False) -> None:
    from everstate.ops.triton_launch import Tiles, form, launch

    launch(Adding_of_all, (3,), Tiles(x, (NUMBERS,), (1,), form(NUMBERS)) if tiles else x, out, n, SIZE=8)


Adding_of_all = Adding()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(NUMBERS), torch.randn(2, NUMBERS)


def test_memory_launches_and_views() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, None]:
        pair = torch.empty(2, NUMBERS)
        plus(x, pair[1], 1.5)
        plus(y[1], pair[0], 0.5, tiles=True)
        between = torch.empty_like(x)
        plus(pair[1], between, 2.5)
        out = y.new_empty(4, 6)
        plus(between, out, 3.5)
        return out.view(3, 8), pair.T, None

    Counted(function).check(inputs, runs=2)


def test_operations_of_pytorch() -> None:
    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        out, zeros = torch.empty_like(x), torch.zeros_like(x)
        plus(zeros, out, 1.5)
        product = (y @ y.T).double()
        out[:3] += x[:3]
        return [product, *torch.stack([out, x]).unbind(0), out.view(4, 6).T.contiguous(), y.sum(0)[2:]]

    Counted(function).check(inputs, runs=2)


def test_an_operation_made_of_launches_is_one_operation() -> None:
    @torch.library.custom_op("everstate::of_a_test", mutates_args=())
    def inner(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        plus(x, out, 1.5)
        return out

    Counted(lambda x, y: inner(x) + inner(y[1])).check(inputs, runs=2)


def test_a_table_stays_where_it_is() -> None:
    table, places = torch.arange(NUMBERS, dtype=torch.int32), torch.tensor([3, 1])

    def function(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        plus(table, out, 0.0)
        out[places] += x[:2]
        return out

    Counted(function).check(inputs, runs=2)


WEIGHT = torch.ones(NUMBERS)


def reads_a_number(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    plus(x, out, x.max().item())
    return out


def reads_what_may_change(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    plus(WEIGHT, out, 1.5)
    return out


def computes_with_what_may_change(x: Tensor, y: Tensor) -> Tensor:
    return x + WEIGHT


def launches_in_tritons_way(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    Adding_of_all[(3,)](x, out, 1.5, SIZE=8)
    return out


def gives_an_argument(x: Tensor, y: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    "function",
    [
        reads_a_number, reads_what_may_change, computes_with_what_may_change, launches_in_tritons_way,
        gives_an_argument,
    ],
)  # fmt: skip
def test_what_a_list_cannot_say_runs_as_it_is(function: Callable[..., Any]) -> None:
    Counted(function).check(inputs, runs=5)


def test_arguments_in_one_memory_run_as_they_are() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        plus(y[0], out, 1.5)
        return out

    counted = Counted(function)

    def make() -> tuple[Tensor, Tensor]:
        y = torch.randn(2, NUMBERS)
        return y[1], y

    counted.check(make, runs=5)


def test_each_kind_of_call_has_its_own_list() -> None:
    def function(x: Tensor, y: Tensor, n: float, ends: list[int]) -> Tensor:
        out = torch.empty(len(ends), NUMBERS)
        for row in out:
            plus(y[0], row, n)
        return out

    counted = Counted(function)
    for n in (1.5, 2.5):
        for ends in ([1], [1, 2]):
            counted.check(lambda n=n, ends=ends: (*inputs(), n, ends), runs=2)
    rows = lambda: (torch.randn(NUMBERS), torch.randn(2, 2 * NUMBERS)[:, NUMBERS:], 1.5, [1])
    counted.check(rows, runs=2)
    apart = lambda: (torch.randn(NUMBERS), torch.randn(2, 2 * NUMBERS)[:, 1 : NUMBERS + 1], 1.5, [1])
    counted.check(apart, runs=2)  # as far apart, but not on multiples of 16 bytes


def chain(x: Tensor, y: Tensor) -> Tensor:
    made = [torch.empty_like(x) for _ in range(4)]
    for a, b in pairwise((x, *made)):
        plus(a, b, 1.5)
    return made[-1]


def listed(function: Callable[..., Any]) -> Any:
    """The list of a function of `inputs()`, which gives what the function gives."""
    from everstate.ops import triton_replay

    Counted(function).check(inputs, runs=2)
    (found,) = triton_replay._lists[-1].values()
    assert isinstance(found, triton_replay.Replay)
    return found


def test_memory_is_given_back_when_it_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from everstate.ops import triton_replay

    monkeypatch.setattr(triton_replay, "SHARED", 0)
    replay, held = listed(chain), list(inputs())
    replay.run(held, [t.data_ptr() for t in held], 7)
    assert [at for at, t in enumerate(held) if t is None] == [2, 3, 4]
    assert len(held) == 6


def test_memory_that_only_launches_use_shares_one_piece() -> None:
    from everstate.ops.triton_replay import ALIGNED

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first, second, summed, out = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        third = torch.empty(2, 4 * NUMBERS)
        plus(x, first, 1.5)
        plus(first, second, 2.5)
        plus(y[0], summed, 0.5)
        plus(second, third[1, NUMBERS:], 3.5)
        fourth = torch.empty_like(x)
        plus(third[1, NUMBERS:], fourth, 0.5)
        plus(fourth, out, 0.5)
        return out, summed * 2

    replay, given = listed(function), inputs()
    addresses = [t.data_ptr() for t in given]
    held: list[Any] = list(given)
    replay.run(held, addresses, 7)
    piece = held[-1]
    first, second, summed, out, third, fourth = ((address - piece.data_ptr()) // ALIGNED for address in addresses[2:8])
    assert (first, second, third, fourth) == (0, 1, 2, 0)  # what has been read makes room
    assert len(piece) == 4 * ALIGNED
    assert not {summed, out} & set(range(4))


def test_large_memory_is_given_back_beside_a_shared_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from everstate.ops import triton_replay

    def function(x: Tensor, y: Tensor) -> Tensor:
        large, small, out = torch.empty(2, NUMBERS), torch.empty_like(x), torch.empty_like(x)
        plus(x, large[1], 1.5)
        plus(large[1], small, 2.5)
        plus(small, out, 0.5)
        return out

    monkeypatch.setattr(triton_replay, "SHARED", 6 * NUMBERS)
    replay, held = listed(function), list(inputs())
    addresses = [t.data_ptr() for t in held]
    replay.run(held, addresses, 7)
    assert [at for at, t in enumerate(held) if t is None] == [2, 3]
    assert addresses[3] == held[-1].data_ptr()
    assert [freed for _, freed in replay._steps] == [(), (), (), (), (2,), ()]


def test_lists_can_be_forgotten() -> None:
    from everstate.ops.triton_replay import forget

    counted = Counted(lambda x, y: x + y)
    counted.check(inputs, runs=2)
    forget()
    counted.check(inputs, runs=2)
