"""The benchmarks of training and of prefill, at sizes that take seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from everstate.bench import models, prefill, train
from everstate.bench.build import build
from everstate.bench.kernels import norm_error
from everstate.bench.peer import PEER_NAME, Peer, available, name_with_kernels
from everstate.bench.report import package_version
from everstate.cli import build as build_cli
from everstate.models import LM, ModelConfig
from everstate.ops.norm import lean

RUNNER = CliRunner()


def bench(*arguments: str) -> dict:
    ran = RUNNER.invoke(build_cli(), ["bench", *arguments])
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.output.splitlines()[-1])


def test_a_quick_run_trains_every_model_beside_its_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "REPEATS", 1)
    monkeypatch.setattr(train, "GATE_SHAPE", (1, 70))
    output = tmp_path / "train.json"
    models = [option for model in train.MODELS for option in ("-m", model)]
    result = bench("train", "--quick", *models, "--output", str(output))
    assert json.loads(output.read_text()) == result
    rows = {row["name"]: row for row in result["rows"]}
    assert all(row["passed"] and row["seconds"] > 0 and row["first_s"] > 0 for row in rows.values())
    assert {f"{model} 2 x 70" for model in train.MODELS} <= set(rows)
    assert ("  transformers Llama 2 x 70" in rows) == (package_version("transformers") is not None)
    assert any("mamba_ssm" in sentence for sentence in result["left_out"])


def test_the_sizes_are_those_of_the_peers() -> None:
    from everstate.models.cost import cost

    for kind in ("mamba2", "mamba3", "attention"):
        assert 355e6 < cost(train.config_of(kind, quick=False)).parameters < 375e6


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from everstate.ops import OPS

    monkeypatch.setattr(train, "peers_of", lambda *arguments: {})
    broken = next(i for i in OPS["rms_norm"].implementations if i.backend == "torch")

    def wrong(x: torch.Tensor, weight: torch.Tensor, **settings: float) -> torch.Tensor:
        scaled = weight * 1.01 if x.dtype == torch.float32 else weight
        return lean.rms_norm(x, scaled, **settings)

    monkeypatch.setattr(broken, "_function", wrong)
    plan = train.Plan("mamba2", train.config_of("mamba2", quick=True), train.QUICK_SHAPES, "cpu", False)
    (row,) = train.steps(plan, [])
    assert not row.gate.passed and row.timing is None


def test_a_step_lowers_the_mean_loss_of_all_tokens() -> None:
    config = train.config_of("mamba3", quick=True)
    plan = train.Plan("mamba3", config, train.QUICK_SHAPES, "cpu", False)
    trainee, tokens = train.ours(plan), train.random_tokens(plan, 2, 9)
    model = trainee.model
    assert isinstance(model, LM)
    logits, _ = model(tokens[:, :-1], model.init_state(2))
    expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    losses = [trainee(tokens).item() for _ in range(20)]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0]


def test_a_quick_run_reads_a_prompt_beside_its_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "REPEATS", 1)
    monkeypatch.setattr(models, "VOCABULARY", 64)
    result = bench("prefill", "--quick", "-m", "mamba2-130m", "-m", "mamba3-1.3b", "-m", "granite4-h-tiny")
    names = [row["name"] for row in result["rows"] if not row["name"].startswith(" ")]
    assert names == ["mamba2-130m 300", "mamba3-1.3b 300", "granite4-h-tiny 300"]
    assert all(row["passed"] and row["seconds"] > 0 for row in result["rows"])
    peers = [row["name"] for row in result["rows"] if row["name"].startswith(" ")]
    works = available("mamba2") and "mamba_ssm" not in name_with_kernels()  # as `needs_peer` says
    assert peers == ([f"  {name_with_kernels()}"] if works else [])


def test_peers_that_fail_or_differ_are_left_out_of_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*tokens: Tensor) -> Any:
        raise RuntimeError("out of memory\nand more")

    noise = lambda tokens: torch.randn(*tokens.shape, 64, generator=torch.Generator().manual_seed(0))
    makers = {"unbuilt": fails, "failing": lambda: (fails, fails), "other": lambda: (noise, noise)}
    monkeypatch.setattr(prefill, "REPEATS", 1)
    monkeypatch.setattr(models, "VOCABULARY", 64)
    monkeypatch.setattr(prefill, "peers_of", lambda *arguments: makers.items())
    left_out: list[str] = []
    config = models.config_of("mamba2-130m", quick=True)
    (row,) = prefill.prefills("mamba2-130m", config, True, "cpu", left_out)
    assert row.timing is not None
    assert left_out[:2] == ["unbuilt: out of memory", "failing: out of memory"]
    assert left_out[2].startswith("other: its outputs differ from ours by 1e+00")


def test_the_peer_has_the_precision_of_our_model(needs_peer: None) -> None:
    model = build(ModelConfig(d_model=64, vocab_size=11, layout="2 * (mamba2)"), "cpu", torch.bfloat16)
    tokens = torch.arange(70).unsqueeze(0) % 11
    hidden = Peer(model).hidden(tokens)
    assert hidden.dtype == torch.bfloat16
    error = norm_error(hidden, prefill.hidden_of(model, tokens))
    assert 1e-4 < error <= prefill.ALLOWED[torch.bfloat16]


def test_the_peer_says_whose_kernels_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    assert name_with_kernels() == f"{PEER_NAME}, pure PyTorch"
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    assert name_with_kernels() == f"{PEER_NAME} with mamba_ssm"


@pytest.mark.parametrize("command", ["prefill", "train"])
def test_an_unknown_model_is_refused_with_the_known_ones(command: str) -> None:
    ran = RUNNER.invoke(build_cli(), ["bench", command, "--quick", "--model", "mamba7-7b"])
    assert ran.exit_code != 0
    assert "'mamba7-7b' is not one of" in str(ran.exception or ran.output)


def test_a_model_to_measure_is_a_model() -> None:
    config = ModelConfig(d_model=32, vocab_size=11, layout="3 * (mamba2 mlp)", tie_embeddings=False)
    made, expected = build(config, "cpu", torch.float32), LM(config)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert all(p.isfinite().all() for p in made.parameters())
    assert torch.equal(made.layers[0].mixer.in_proj.weight, made.layers[4].mixer.in_proj.weight)
    ratio = made.layers[0].mixer.out_proj.weight.std() / expected.layers[0].mixer.out_proj.weight.std()
    assert ratio.item() == pytest.approx(1.0, rel=0.05)
