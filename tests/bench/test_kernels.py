"""The gates of the benchmark of kernels; what it times needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from everstate.bench import examples, kernels
from everstate.bench.peer_ops import run_op
from everstate.bench.report import Row
from everstate.bench.shapes import GPU_SHAPES, SHAPES, STEPS, op_of
from everstate.bench.timing import Gate, Timing
from everstate.bench.triton_first_call import first_call
from everstate.core.errors import ConfigError
from everstate.core.state import tensors
from everstate.ops import OPS
from everstate.ops.example import Draw, Example


@pytest.mark.parametrize("name", ["ssd_scan", "attention, packed", "experts"])
def test_the_gate_sees_a_kernel_and_its_gradients(name: str, kernel_device: torch.device) -> None:
    example = examples.lower(GPU_SHAPES[name](Draw(dtype=torch.float32, device=kernel_device), 64, 70))
    assert next(iter(example.timed.values())).dtype == torch.bfloat16
    assert 1e-4 < kernels.gate_error(op_of(name), example) <= 2 * kernels.ALLOWED[torch.bfloat16]


@pytest.mark.parametrize("name", GPU_SHAPES)
def test_kernels_take_what_is_measured(name: str, kernel_device: torch.device) -> None:
    example = examples.cut(examples.lower(GPU_SHAPES[name](Draw(dtype=torch.float32, device=kernel_device), 128, 6)), 2)
    state = {} if example.state is None else {"state": example.state}
    verdicts = OPS[op_of(name)].explain(**example.timed, **state, **example.fixed)
    assert verdicts["triton"] == "accepts"


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_sees_a_step(name: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    op, shape = op_of(name), STEPS[name]
    example = examples.lower(shape(Draw(dtype=torch.float32, device=kernel_device), 64, 1))
    token = {key: value[:, 0] for key, value in example.timed.items()} | example.fixed
    pool = examples.in_precision(example.state, dtype)
    assert tensors(pool)[0].dtype == dtype
    assert OPS[op].explain(**token, state=pool)["triton"] == "accepts"
    assert 1e-4 < kernels.step_error(op, token, pool) <= kernels.ALLOWED[torch.bfloat16]


def test_an_op_without_kernels_is_not_measured() -> None:
    with pytest.raises(ConfigError, match="lti_conv is not measured on a GPU; give one or more of: ssd_scan; "):
        kernels.run(quick=True, output=None, now=datetime.now(UTC), device="cpu", only=["lti_conv"])


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scans(*arguments: object) -> Iterator[Row]:
        yield Row("one", 1, Gate(0.0, 1.0), None)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "scans", scans)
    output = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        kernels.run(quick=True, output=output, now=datetime.now(UTC), device="cpu", only=["ssd_scan", "linear_scan"])
    kept = json.loads(output.read_text())
    assert [row["name"] for row in kept["rows"]] == ["one"]
    assert kept["stopped_by"] == "KeyboardInterrupt"


def test_first_calls_that_fail_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_call(name: str, d_inner: int, total: int, batch: int, device: str) -> float:
        if name == "rotary":
            raise ChildProcessError("no memory")
        return 10.0 * batch

    monkeypatch.setattr(kernels, "first_call", first_call)
    left_out: list[str] = []
    assert kernels.first_calls("ssd_scan", 64, 640, "cuda", left_out) == {"ssd_scan": 320.0}
    assert kernels.first_calls("experts", 64, 640, "cuda", left_out) == {"experts": 10.0} and not left_out
    assert kernels.first_calls("rotary", 64, 640, "cuda", left_out) == {}
    assert left_out == ["rotary, first call: no memory"]


def test_a_first_call_is_made_by_a_process_of_its_own() -> None:
    with pytest.raises(ChildProcessError, match="KeyError: 'no_op'"):
        first_call("no_op", 64, 640, 2, "cpu")


@pytest.mark.gpu
def test_a_first_call_is_timed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert first_call("rotary", 128, 512, 2, "cuda") > 0


def test_errors_of_complex_numbers() -> None:
    one = torch.tensor([3.0 + 4.0j])
    assert kernels.norm_error(one.conj(), one) == pytest.approx(8 / 5)
    assert examples.widen(one).dtype == torch.complex128


def test_what_a_step_of_a_paged_cache_has_written() -> None:
    example = examples.cut(STEPS["attention_step_, paged"](Draw(dtype=torch.float32), 8, 3), 3)
    token = {key: value[:, 0] for key, value in example.timed.items()} | example.fixed
    with torch.no_grad():
        OPS["attention_step_"](**token, state=example.state)
    k, v, pos = kernels.written(example.state, token)
    assert torch.equal(k, token["k"]) and torch.equal(v, token["v"]) and pos.tolist() == [256 * 8 // 3 + 1] * 3


def test_tokens_are_cut_into_sequences() -> None:
    example = examples.cut(SHAPES["ssd_scan"](Draw(), 128, 12), 4)
    assert example.timed["x"].shape[:2] == (4, 3)
    assert example.state.shape[0] == 4
    packed = examples.cut(GPU_SHAPES["attention, packed"](Draw(), 128, 12), 4)
    assert packed.timed["q"].shape[:2] == (1, 12)
    assert packed.fixed["packing"].lengths == (3, 3, 3, 3)
    assert packed.state.pos.tolist() == [0, 0, 0, 0]


def test_experts_are_measured_with_few_tokens_too() -> None:
    assert kernels.sizes("ssd_scan", 512) == [(32, 16), (8, 64), (1, 512)]
    assert kernels.sizes("experts", 512) == [(1, 512), (1, 64), (1, 16), (1, 4), (1, 1)]
    few = examples.first(GPU_SHAPES["experts"](Draw(), 128, 12), 4)
    assert {value.shape[:2] for value in few.timed.values()} == {(1, 4)}


def test_every_sequence_of_a_paged_cache_has_blocks_of_its_own() -> None:
    example = examples.cut(STEPS["attention_step_, paged"](Draw(), 8, 3), 3)
    pages, state = example.fixed["pages"], example.state
    assert sorted(pages.flatten().tolist()) == list(range(len(state.k)))
    read = 256 * 8 // 3
    assert state.pos.tolist() == [read] * 3
    # Ours and the peer step the same pool, once more each than they are timed.
    assert pages.shape[1] * state.k.shape[1] > read + 2 * (kernels.REPEATS + 1)
    assert kernels.moved(state) == 2 * 3 * read * 128 * 8  # keys and values of one group of 128, float64


def test_a_peer_that_computes_something_else_is_left_out() -> None:
    same = partial(run_op, "ssd_scan")
    example = SHAPES["ssd_scan"](Draw(dtype=torch.float32), 128, 12)
    assert kernels.scan_disagreement("ssd_scan", "same", same, example) is None
    reason = kernels.scan_disagreement("ssd_scan", "other", lambda one: [2 * same(one)[0]], example)
    assert reason == "ssd_scan of other: its outputs differ from ours by 1e+00, of norms"


def fails(example: Example) -> list[Tensor]:
    raise RuntimeError("\nnot on this GPU\nand more")


def test_a_peer_that_fails_is_left_out() -> None:
    example = SHAPES["ssd_scan"](Draw(dtype=torch.float32), 128, 12)
    assert kernels.scan_disagreement("ssd_scan", "peer", fails, example) == "ssd_scan of peer: not on this GPU"
    left_out: list[str] = []
    # Forward alone works.
    forward_only = lambda one: fails(one) if torch.is_grad_enabled() else run_op("ssd_scan", one)
    assert [kind for kind, _ in kernels.working("ssd_scan", "peer", forward_only, example, left_out)] == ["forward"]
    assert left_out == ["ssd_scan of peer, with backward: not on this GPU"]


def test_ours_is_compared_with_the_fastest_peer() -> None:
    gate, ours, slow, fast = Gate(0.0, 1.0), Timing((1.0, 1.0)), Timing((4.0, 4.0)), Timing((2.0, 2.0))
    first, *others = kernels.beside("op", 8, gate, ours, {"slow": slow, "fast": fast})
    assert (first.ratio, first.ratio_of) == (2.0, "fast's speed")
    assert [(row.name, row.timing) for row in others] == [("  slow", slow), ("  fast", fast)]
    (alone,) = kernels.beside("op", 8, gate, ours, {})
    assert alone.ratio is None


@pytest.mark.gpu
def test_a_quick_run_passes_its_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    # Peers tune for minutes.
    monkeypatch.setattr(kernels, "peers_of", lambda op, example: {})
    result = kernels.run(quick=True, output=tmp_path / "kernels.json", now=datetime.now(UTC), device="cuda")
    assert result["passed"]
    assert all("seconds" in row for row in result["rows"])
