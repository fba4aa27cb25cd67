"""How kernels of peers are compiled before they are tuned."""

from __future__ import annotations

from typing import Any

import pytest

from everstate.bench.triton_tuning import compiled_together

triton = pytest.importorskip("triton")

SIZES = (1, 2, 4)


class Kernel:
    """What Triton tunes, and how it was called: its setting, and whether only to compile it."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    def run(self, x: float, *, grid: Any, warmup: bool, SIZE: int, **settings: Any) -> None:
        self.calls.append((SIZE, warmup))


def tuned(kernel: Kernel) -> Any:
    def empty(x: float, SIZE: int) -> None: ...

    def seconds(call: Any, quantiles: Any) -> list[float]:
        call()
        return [-kernel.calls[-1][0]] * 3

    settings = [triton.Config({"SIZE": size}) for size in SIZES]
    tuner = triton.autotune(settings, key=["x"], do_bench=seconds)(triton.jit(empty))
    tuner.fn = kernel
    return tuner


def test_all_candidates_are_compiled_before_one_is_timed() -> None:
    kernel = Kernel()
    tuner = tuned(kernel)
    with compiled_together():
        tuner[(1,)](0.5)
        compiled, timed = kernel.calls[: len(SIZES)], kernel.calls[len(SIZES) :]
        assert compiled == [(size, True) for size in SIZES]
        assert timed == [(size, False) for size in (*SIZES, max(SIZES))], "and last the fastest"
        tuner[(1,)](0.5)
        assert kernel.calls[2 * len(SIZES) + 1 :] == [(max(SIZES), False)], "what has been tuned is not compiled again"


def test_triton_is_as_before_behind_it() -> None:
    kernel = Kernel()
    with compiled_together():
        pass
    tuned(kernel)[(1,)](0.5)
    assert not any(compiled for _, compiled in kernel.calls)
