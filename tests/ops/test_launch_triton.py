"""How kernels are launched, and sums over what their programs found."""

from __future__ import annotations

import re
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import everstate.ops


class Kernel:
    """Counts how often Triton is asked, and what is run without asking it."""

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.compiled: list[Any] = []
        self.run: list[tuple[Any, ...]] = []
        self.params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in ("x", "n", "SIZE")]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def ask(*args: Any, **settings: Any) -> Any:
            self.asked.append((grid, args, settings))
            launcher = SimpleNamespace(
                launch=lambda *given: self.run.append(given), launch_cooperative_grid=False, launch_pdl=True,
                global_scratch_size=0, profile_scratch_size=0, **self.described,
            )  # fmt: skip
            return SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")

        return ask

    def warmup(self, *args: Any, grid: tuple[int, ...], **settings: Any) -> None:
        from triton.runtime._async_compile import active_mode

        assert active_mode.get() is not None
        self.compiled.append((grid, args, settings))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    from everstate.ops import triton_launch

    pretended = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(triton_launch, "_KNOWN", True)
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=pretended))
    monkeypatch.setattr(triton_launch, "_ready", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Kernel()


def aligned(offset: int = 0) -> Tensor:
    memory = torch.zeros(64)
    return memory[(-memory.data_ptr() % 16) // 4 + offset :]


def test_triton_is_asked_once(kernel: Kernel) -> None:
    from everstate.ops.triton_launch import launch

    launch(kernel, (3,), aligned(), 32, SIZE=8, num_warps=4)
    other = nn.Parameter(aligned())
    launch(kernel, (5, 2), other, 48, SIZE=8, num_warps=4)
    assert [grid for grid, _, _ in kernel.asked] == [(3,)]
    first = ("function", False, True, None, None, "metadata", None, None, None)
    assert kernel.run == [(5, 2, 1, 7, *first, other.data_ptr(), 48, 8)]


def test_a_launcher_of_all_kernels_takes_arguments_as_one(kernel: Kernel) -> None:
    """As Triton has it from 3.7 on."""
    from everstate.ops.triton_launch import launch

    kernel.described = {"arg_annotations": "annotations", "kernel_signature": "signature"}
    x = aligned()
    for _ in range(2):
        launch(kernel, (3,), x, 32, SIZE=8)
    first = ("function", False, True, "metadata", None, None, None, None, None, "annotations", "signature")
    assert kernel.run == [(3, 1, 1, 7, *first, [x.data_ptr(), 32, 8])]


def test_a_product_and_a_sum_are_one_instruction(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns where a launch does not say so, and 3.10 will do it no more."""
    from everstate.ops import triton_launch
    from everstate.ops.triton_launch import compile_together, launch

    compile_together(lambda x: launch(kernel, (3,), x, 32, SIZE=8), aligned())
    monkeypatch.setattr(triton_launch, "_KNOWN", False)
    launch(kernel, (3,), aligned(), 32, SIZE=8)
    assert [settings["enable_fp_fusion"] for *_, settings in (*kernel.compiled, *kernel.asked)] == [True] * 3


def test_nobody_else_launches_kernels() -> None:
    """`KERNEL[grid](...)` would leave it to Triton's version whether a product and a sum are one instruction."""
    directly = re.compile(r"kernel\[.+\]\(")
    files = [file for file in Path(everstate.ops.__file__).parent.rglob("*.py") if file.name != "triton_launch.py"]
    assert [file for file in files if directly.search(file.read_text())] == []


@pytest.mark.parametrize(
    "change",
    [
        {"x": None}, {"x": aligned(1)}, {"x": aligned().bfloat16()}, {"n": 1}, {"n": 33}, {"n": 2**31}, {"n": 1.5},
        {"SIZE": 16}, {"num_warps": 8},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_compiled_kernel_depends_on_is_looked_at(kernel: Kernel, change: dict[str, Any]) -> None:
    from everstate.ops.triton_launch import launch

    given: dict[str, Any] = {"x": aligned(), "n": 32, "SIZE": 8, "num_warps": 4}
    for each in (given, {**given, **change}):
        launch(kernel, (1,), each["x"], each["n"], SIZE=each["SIZE"], num_warps=each["num_warps"])
    assert len(kernel.asked) == 2 and not kernel.run


def test_tiles_of_another_form_are_another_kernel(kernel: Kernel) -> None:
    from everstate.ops.triton_launch import Tiles, form, launch

    x = aligned()[:32].view(4, 8)
    for sides in ((2, 8), (4, 8), (2, 8)):
        launch(kernel, (1,), Tiles(x, x.shape, x.stride(), form(*sides)), 32, SIZE=8)
    assert [args[0].block_shape for _, args, _ in kernel.asked] == [[2, 8], [4, 8]]
    assert len(kernel.run) == 1


def test_kernels_of_a_function_are_compiled_together(kernel: Kernel) -> None:
    from everstate.ops.triton_launch import compile_together, launch

    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(len(kernel.compiled))
        launch(kernel, (3,), x, 32, SIZE=8)
        launch(kernel, (3,), x, 32, SIZE=16)
        return x + 1

    x = aligned()
    assert torch.equal(compile_together(function, x), x + 1)
    # Up to the first that is not compiled; to see which there are; and as it is.
    assert calls == [0, 0, 2]
    assert [settings["SIZE"] for _, _, settings in kernel.compiled] == [8, 16]
    assert [settings["SIZE"] for _, _, settings in kernel.asked] == [8, 16] and not kernel.run
    compile_together(function, x)
    assert calls == [0, 0, 2, 2] and len(kernel.asked) == len(kernel.run) == 2


def test_threads_leave_kernels_ready_to_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU of who asks: a thread begins with the first."""
    from everstate.ops import triton_launch

    devices: list[int] = []
    threads: list[int] = []
    monkeypatch.setattr(triton_launch, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    compiled = SimpleNamespace(_init_handles=lambda: threads.append(get_ident()))
    with triton_launch._Compilers() as pool:
        assert pool.submit(lambda: compiled).result() is compiled
    assert devices == [1] and len(threads) == 1 and get_ident() not in threads


def test_what_is_captured_is_only_called(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from everstate.ops.triton_launch import compile_together, launch

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    compile_together(lambda x: launch(kernel, (3,), x, 32, SIZE=8), aligned())
    assert len(kernel.asked) == 1 and not kernel.compiled


def test_where_launches_go_the_ordinary_way_functions_are_only_called(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Triton that has not been tried may compile in threads in another way, and who watches launches sees them."""
    from everstate.ops import triton_launch
    from everstate.ops.triton_launch import compile_together, launch

    monkeypatch.setattr(triton_launch, "launches_are_known", lambda: False)
    compile_together(lambda x: launch(kernel, (3,), x, 32, SIZE=8), aligned())
    assert len(kernel.asked) == 1 and not kernel.compiled


def test_an_interruption_leaves_nothing_behind(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits for its threads Triton would stay in the mode in which it compiles in threads."""
    from triton.runtime import _async_compile

    from everstate.ops.triton_launch import compile_together, here, launch

    def interrupted(futures: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_async_compile, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_together(lambda x: launch(kernel, (3,), x, 32, SIZE=8), aligned())
    assert _async_compile.active_mode.get() is None and here.launcher is None


def test_what_fails_is_reported_by_the_function_itself(kernel: Kernel) -> None:
    from everstate.ops.triton_launch import compile_together, here, launch

    def function(x: Tensor) -> Tensor:
        launch(kernel, (3,), x, 32, SIZE=8)
        raise ValueError(f"asked {len(kernel.asked)} times")

    for times in (1, 1):
        with pytest.raises(ValueError, match=f"asked {times} times"):
            compile_together(function, aligned())
        assert here.launcher is None
    assert len(kernel.compiled) == 1


def test_numbers_without_triton() -> None:
    triton = pytest.importorskip("triton")
    from everstate.ops.triton_launch import cdiv, power_of_2

    for number in (1, 2, 3, 63, 64, 65, 1000):
        assert power_of_2(number) == triton.next_power_of_2(number)
        assert cdiv(number, 64) == triton.cdiv(number, 64)


@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (130, 7, 9), (300, 40)])
def test_sums_over_programs(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    from everstate.ops.triton_sums import total

    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    torch.testing.assert_close(total(parts, torch.float32), parts.sum(0))
    assert total(parts, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("headdim", [64, 48])
def test_sums_over_heads(headdim: int, kernel_device: torch.device) -> None:
    from everstate.ops.triton_sums import total_of_heads

    parts = torch.randn(200, 3, headdim, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    torch.testing.assert_close(total_of_heads(parts, torch.float32), parts.sum((0, 2)), rtol=1e-5, atol=1e-4)
