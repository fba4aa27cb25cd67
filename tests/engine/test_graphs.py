"""Decoding as a device graph. The logic around the graph is tested everywhere, with an eager graph in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everstate.core.config import read_toml
from everstate.core.kernels import interpreting
from everstate.core.state import clone, tensors
from everstate.engine import Sampling, Session
from everstate.engine import runner as engine
from everstate.engine.graphs import DecodeGraph, worth_capturing
from everstate.mixers import MIXERS, mamba2
from everstate.mixers.mlp import MLP
from everstate.models import LM, ModelConfig
from everstate.ops import use
from everstate.tokenizers import ByteTokenizer

LAYOUTS = ["mamba1", "mamba2", "mamba3", "2 * (mamba2 mlp)", "mamba2 attention mlp", "mamba2 moe attention moe"]
TABLES = Path(__file__).parent.parent / "laws" / "variants"
VARIANTS = [
    {"type": path.stem, **table}
    for path in sorted(TABLES.glob("*.toml"))
    if path.stem != "bidirectional"  # cannot be stepped
    for table in read_toml(path).values()
]
SAMPLINGS = {
    "greedy": [Sampling(temperature=0.0)] * 3,
    "mixed": [Sampling(temperature=0.0), Sampling(seed=3, top_k=20), Sampling(seed=4, top_p=0.9)],
    "top k": [Sampling(seed=3, top_k=20), Sampling(seed=4, top_k=5, top_p=0.9), Sampling(temperature=0.0)],
}


class EagerGraph(DecodeGraph):
    """The same steps, each asked for anew."""

    def __init__(self, model: LM, logits: Any, state: Any, filters: Any, most: int) -> None:
        self.model, self.filters, self.most, self.state = model, filters, most, self.form(model, state)
        self.logits, self.chosen = logits.clone(), torch.zeros(len(logits), dtype=torch.int64)
        self.u = torch.zeros(len(logits), dtype=torch.float64)

    def step(self, u: Any) -> Any:
        self.u.copy_(u)
        self._choose()
        self.logits = self._read(self.state)
        return self.chosen.tolist(), self.logits


def decode(model: LM, samplings: list[Sampling], stop: set[int]) -> tuple[list[Any], Any]:
    state = model.init_state(3, context=64)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    logits = engine.prefill_(model, prompts, state)
    steps = engine.decode_(model, logits, state, samplings, [3, 2, 4], stop=stop, max_tokens=30)
    return [{row: (token, after.float().cpu()) for row, (token, after) in step.items()} for step in steps], state


def same(one: tuple[list[Any], Any], other: tuple[list[Any], Any], tolerance: float = 0.0) -> None:
    for here, there in zip(one[0], other[0], strict=True):
        assert {row: token for row, (token, _) in here.items()} == {row: token for row, (token, _) in there.items()}
        assert all((here[row][1] - there[row][1]).abs().max() <= tolerance for row in here)
    for mine, theirs in zip(tensors(one[1]), tensors(other[1]), strict=True):
        assert ((mine.float() - theirs.float()).abs() <= tolerance).all()


@pytest.fixture(params=[False, True], ids=["written", "deferred"])
def either_way(request: pytest.FixtureRequest) -> None:
    """States are written with every token, or wait for that."""
    if request.param:
        request.getfixturevalue("deferring")


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def frequent(steps: list[Any]) -> set[int]:
    """A token at which some row ends and others go on."""
    return {steps[4][0][0]}


@pytest.mark.parametrize("samplings", SAMPLINGS.values(), ids=SAMPLINGS)
def test_rows_that_have_ended_keep_their_state(
    samplings: list[Sampling], either_way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LM(ModelConfig(d_model=32, vocab_size=50, layout="mamba2 attention"))
    stop = frequent(decode(model, samplings, set())[0])
    expected = decode(model, samplings, stop)
    assert any(len(step) < 3 for step in expected[0])
    monkeypatch.setattr(engine, "worth_capturing", lambda model, tokens: True)
    monkeypatch.setattr(engine, "DecodeGraph", EagerGraph)
    same(decode(model, samplings, stop), expected, 1e-5)


def test_an_abandoned_loop_has_read_what_it_gave(either_way: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LM(ModelConfig(d_model=32, vocab_size=50, layout="mamba2"))
    monkeypatch.setattr(engine, "worth_capturing", lambda model, tokens: True)
    monkeypatch.setattr(engine, "DecodeGraph", EagerGraph)
    state = model.init_state(1)
    logits = engine.prefill_(model, [[1, 2]], state)
    expected, steps = clone(state), engine.decode_(model, logits, state, [Sampling()], [2], max_tokens=20)
    for _ in range(3):
        token, _ = next(steps)[0]
        model.step_(torch.tensor([token]), expected)
    steps.close()
    same(([], state), ([], expected), 1e-6)


def test_a_session_may_be_forked_while_it_writes(either_way: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LM(ModelConfig(d_model=32, vocab_size=300, layout="mamba2"))
    monkeypatch.setattr(engine, "worth_capturing", lambda model, tokens: True)
    monkeypatch.setattr(engine, "DecodeGraph", EagerGraph)
    session = Session(model, ByteTokenizer())
    session.read("one")
    writing = session.write_tokens(20, Sampling(temperature=0.0))
    text = [next(writing) for _ in range(5)]
    fork = session.fork()
    assert fork._logits is not None
    other = Session(model, ByteTokenizer())
    other.read("one")
    other.read_tokens(text)
    same(([], fork._state), ([], other._state), 1e-5)


def test_a_cpu_captures_nothing() -> None:
    assert not worth_capturing(LM(ModelConfig(d_model=32, vocab_size=50, layout="mamba2")), 1000)


class Theirs(MLP):
    """May ask for values on the host."""


@pytest.mark.parametrize("mixer", ["mamba2", "theirs"])
def test_mixers_of_somebody_else_are_not_captured(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS._targets, "theirs", f"{__name__}:Theirs")
    side_by_side = {"type": "parallel", "mixers": {"one": {"type": "mamba2"}, "two": {"type": mixer}}}
    config = ModelConfig(d_model=32, vocab_size=50, layout="mamba2 both", mixers={"both": side_by_side})
    model = LM(config)
    monkeypatch.setattr(LM, "device", torch.device("cuda"))
    assert worth_capturing(model, 16) == (mixer == "mamba2")
    assert not worth_capturing(model, 15)


def test_experts_that_pytorch_counts_on_the_host_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LM(ModelConfig(d_model=32, vocab_size=50, layout="mamba2 moe"))
    monkeypatch.setattr(LM, "device", torch.device("cuda"))
    with torch.no_grad(), interpreting():
        assert worth_capturing(model, 16)
        with use("torch", "reference"):
            assert not worth_capturing(model, 16)
    assert not worth_capturing(model, 16)  # no GPU: no kernel


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["rms", "rms1p", "layer"])
@pytest.mark.parametrize("table", VARIANTS, ids=lambda table: table["type"])
def test_every_mixer_can_be_captured(table: dict[str, Any], norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_gpu()
    config = ModelConfig(d_model=16, vocab_size=50, layout="2 * (x)", mixers={"x": table}, norm=norm)
    model = LM(config, device="cuda")
    assert worth_capturing(model, 30)
    captured = decode(model, SAMPLINGS["greedy"], set())
    monkeypatch.setattr(engine, "worth_capturing", lambda model, tokens: False)
    same(captured, decode(model, SAMPLINGS["greedy"], set()), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("samplings", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_writes_what_steps_write(
    layout: str, samplings: list[Sampling], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_gpu()
    model = LM(ModelConfig(d_model=64, vocab_size=200, layout=layout), device="cuda")
    assert worth_capturing(model, 30)
    captured = decode(model, samplings, set())
    stop = frequent(captured[0])
    stopped = decode(model, samplings, stop)
    monkeypatch.setattr(engine, "worth_capturing", lambda model, tokens: False)
    same(captured, decode(model, samplings, set()), 1e-4)
    same(stopped, decode(model, samplings, stop), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", ["2 * mamba2", "mamba2 mlp attention"])
def test_a_graph_that_defers_reads_what_steps_read(
    layout: str, state_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_gpu()
    monkeypatch.setattr(mamba2, "pays", lambda state: True)
    model = LM(ModelConfig(d_model=128, vocab_size=200, layout=layout), device="cuda", dtype=torch.bfloat16)
    state = model.init_state(20, context=64, dtype=state_dtype)
    logits = engine.prefill_(model, [[row + 1, row + 2] for row in range(20)], state)
    plain = clone(state)
    graph = DecodeGraph(model, logits, state, None)
    assert isinstance(graph.state[0], mamba2.Deferred)
    for _ in range(21):
        tokens, after = graph.step(torch.zeros(20))
        expected = model.step_(torch.tensor(tokens, device="cuda"), plain)
        assert (after.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()
    graph.settle_()
    for mine, theirs in zip(tensors(state), tensors(plain), strict=True):
        assert (mine.float() - theirs.float()).norm() <= 2e-2 * theirs.float().norm()
