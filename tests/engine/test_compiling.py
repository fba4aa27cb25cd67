"""Kernels of a model that are compiled together when it is first used. That they are the right ones shows on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everstate.core.state import tensors
from everstate.engine import Sampling, compiling
from everstate.engine import runner as engine
from everstate.engine.compiling import first_compiled
from everstate.mixers import MIXERS
from everstate.models import LM, ModelConfig
from tests.engine.test_graphs import LAYOUTS


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The results of what was called with its kernels compiled together, by models that say they are on a GPU."""
    pytest.importorskip("triton")
    from everstate.ops import triton_launch

    results: list[int] = []

    def compile_together(function: Callable[[], int]) -> int:
        results.append(function())
        return results[-1]

    monkeypatch.setattr(triton_launch, "compile_together", compile_together)
    monkeypatch.setattr(LM, "device", torch.device("cuda"))
    return results


class Theirs(nn.RMSNorm):
    """A norm that is not of the library."""


def model(layout: str = "mamba2", **mixers: Any) -> LM:
    return LM(ModelConfig(d_model=32, vocab_size=50, layout=layout, mixers=mixers))


def test_only_the_first_use_of_each_kind(together: list[int]) -> None:
    one, other = model(), model()
    uses = [(one, "prompt"), (one, "prompt"), (one, 3), (other, 3), (one, 3)]
    assert [first_compiled(each, use, lambda i=i: i) for i, (each, use) in enumerate(uses)] == [0, 1, 2, 3, 4]
    assert together == [0, 2, 3]


def test_not_where_values_decide(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do not run leave anything behind, and who looked at that could do anything."""
    monkeypatch.setitem(MIXERS._targets, "theirs", "tests.engine.test_graphs:Theirs")
    assert first_compiled(model("theirs", theirs={"type": "theirs"}), "prompt", lambda: 1) == 1
    assert first_compiled(model("moe"), "prompt", lambda: 2) == 2  # on the CPU that it is on, PyTorch counts its tokens
    assert together == []


def test_a_cpu_compiles_nothing(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "device", torch.device("cpu"))
    assert first_compiled(model(), "prompt", lambda: 1) == 1 and together == []


def test_not_where_somebody_looks_on(together: list[int]) -> None:
    """Who collects what parts of a model are given must not get what no kernel has written."""
    watched, normed = model(), model()
    watched.layers[0].mixer.register_forward_pre_hook(lambda module, args: None)
    normed.norm = Theirs(32)
    assert [first_compiled(each, "prompt", lambda: 1) for each in (watched, normed)] == [1, 1]
    assert together == []


def test_a_model_is_looked_through_once(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of a prompt asks; a model that is never rehearsed must not pay for that each time."""
    looked: list[LM] = []
    monkeypatch.setattr(compiling, "asks_host_nothing", lambda model: bool(looked.append(model)))
    one = model()
    assert [first_compiled(one, "prompt", lambda: 1) for _ in range(3)] == [1, 1, 1]
    assert len(looked) == 1 and together == []


def test_a_first_use_that_fails_was_none(together: list[int]) -> None:
    one = model()

    def fails() -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        first_compiled(one, "prompt", fails)
    assert first_compiled(one, "prompt", lambda: 1) == 1 and together == [1]


def test_a_model_that_is_gone_is_forgotten(together: list[int]) -> None:
    before = len(compiling._used)
    first_compiled(model(), "prompt", lambda: 1)
    gc.collect()
    assert len(compiling._used) <= before


def written(model: LM) -> list[Tensor]:
    """Tokens and logits after two prompts, and the state at the end."""
    state = model.init_state(2, context=64)
    logits = engine.prefill_(model, [[1, 2, 3], [4, 5]], state)
    steps = engine.decode_(model, logits, state, [Sampling(temperature=0.0)] * 2, [3, 2], max_tokens=20)
    rows = [step[row] for step in steps for row in (0, 1)]
    return [torch.tensor([token for token, _ in rows]), *(after.clone() for _, after in rows), *tensors(state)]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are forgotten, and memory that none of them has written holds what is no index of anything."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from everstate.ops import triton_launch, triton_replay

    lm = LM(ModelConfig(d_model=64, vocab_size=200, layout=layout), device="cuda")
    expected, rehearse, rehearsed = written(lm), triton_launch._rehearse, []

    def watched(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        rehearse(function, args)
        rehearsed.append(function.__module__)

    monkeypatch.setattr(triton_launch, "_ready", {})
    monkeypatch.setattr(triton_launch, "_rehearse", watched)
    triton_replay.forget()
    compiling._used.clear()
    # Each stream has memory of its own, and PyTorch hands out 32 in turn.
    for stream in (torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(32))):
        with torch.cuda.stream(stream):
            huge = [torch.full((size,), 2**62, device="cuda") for size in [2**22, *[2**16] * 64]]
            del huge
    assert all(torch.equal(got, want) for got, want in zip(written(lm), expected, strict=True))
    assert rehearsed.count("everstate.engine.runner") == rehearsed.count("everstate.engine.graphs") == 1
