"""Selection, refusal and forcing of implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import Op, anywhere, on
from everstate.ops import OPS, use

ONES = torch.ones(2)


def doubled(x: Tensor) -> Tensor:
    """Twice x."""
    return 2 * x


def added(x: Tensor) -> Tensor:
    return x + x


def only_long(x: Tensor) -> str | None:
    return None if len(x) > 2 else f"wants more than 2 numbers, was given {len(x)}"


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Op[[Tensor], Tensor]:
    made = Op(doubled)
    monkeypatch.setitem(OPS, "doubled", made)
    made.add("torch", f"{__name__}:added", only_long)
    made.add("triton", "no.such.module:function", on("cuda"))
    return made


def test_an_op_without_implementations_is_its_reference() -> None:
    assert torch.equal(Op(doubled)(ONES), 2 * ONES)


def test_the_first_that_accepts_serves(double: Op[[Tensor], Tensor]) -> None:
    assert double.explain(ONES) == {
        "torch": "wants more than 2 numbers, was given 2",
        "triton": "runs on cuda, the input is on cpu",
        "reference": "accepts",
    }
    assert double.explain(torch.ones(3))["torch"] == "accepts"
    assert (double.serving(ONES), double.serving(torch.ones(3))) == ("reference", "torch")
    assert torch.equal(double(ONES), 2 * ONES)


def test_a_forced_backend_that_refuses_quotes_its_sentence(double: Op[[Tensor], Tensor]) -> None:
    with use("torch"), pytest.raises(BackendError, match="wants more than 2 numbers, was given 2"):
        double(ONES)
    with use("torch"):
        assert double.serving(ONES) is None
    with use("torch", "reference"):
        assert double.serving(ONES) == "reference"
        assert torch.equal(double(ONES), 2 * ONES)


def test_forcing_ends_with_its_block(double: Op[[Tensor], Tensor]) -> None:
    with pytest.raises(BackendError), use("triton"):
        double(ONES)
    assert torch.equal(double(ONES), 2 * ONES)


def test_an_unknown_backend_is_named_with_what_there_is() -> None:
    with pytest.raises(BackendError, match="'cudnn'.*reference"), use("cudnn"):
        pass


def test_a_missing_implementation_is_said() -> None:
    with use("torch"), pytest.raises(BackendError, match="has no such implementation"):
        Op(doubled)(ONES)


def test_torch_compile_traces_through_the_selection() -> None:
    double = Op(doubled)
    double.add("torch", f"{__name__}:added", anywhere)
    double.load()
    compiled = torch.compile(lambda x: double(x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(ONES), 2 * ONES)
