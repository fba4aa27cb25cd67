"""Weights of 8 bits and states of 16: what they cost in quality, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from everstate.checkpoints import export, save
from everstate.core.errors import CheckpointError, RequestError
from everstate.core.state import nbytes, tensors
from everstate.models import LM, ModelConfig
from everstate.ops import TrapezoidState

LAYOUTS = ["2 * (mamba2 mlp)", "mamba1 attention", "mamba3 mla", "s5 moe"]


def model(layout: str = "2 * (mamba2 mlp)", dtype: torch.dtype = torch.float32, tie: bool = True) -> LM:
    both = {"type": "parallel", "mixers": {"ssm": {"type": "mamba2"}, "mlp": {"type": "mlp"}}}
    mixers = {"both": both} if layout == "both" else {}
    config = ModelConfig(d_model=64, vocab_size=50, layout=layout, tie_embeddings=tie, mixers=mixers)
    return LM(config, dtype=dtype)


def logits(lm: LM) -> Tensor:
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return lm(tokens, lm.init_state(2, context=64))[0].float()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounded_weights_change_little(layout: str, tie: bool) -> None:
    lm = model(layout, tie=tie)
    before = logits(lm)
    assert not lm.quantised
    lm.quantize_()
    after = logits(lm)
    assert lm.quantised and lm.dtype is torch.float32
    assert 0 < (after - before).norm() <= 0.03 * before.norm()
    assert torch.equal(logits(lm.quantize_()), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_a_forward_of_one_token(dtype: torch.dtype) -> None:
    lm = model("mamba2 attention mlp", dtype).quantize_()
    tokens = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = lm(tokens, lm.init_state(3, context=64))[0][:, -1].float()
        state = lm.init_state(3, context=64)
        steps = [lm.step_(now, state) for now in tokens.unbind(1)]
    assert steps[-1].dtype is dtype
    assert (steps[-1].float() - expected).norm() <= (1e-5 if dtype is torch.float32 else 2e-2) * expected.norm()


def test_weights_of_8_bits_are_half_as_many_bytes() -> None:
    lm = model(dtype=torch.bfloat16)
    count = lambda: sum(p.numel() * p.element_size() for n, p in lm.named_parameters() if "proj.weight" in n)
    before = count()
    lm.quantize_()
    assert 2 * count() == before


def test_they_are_not_saved(tmp_path: Path) -> None:
    lm = model("mamba2").quantize_()
    with pytest.raises(CheckpointError, match="8-bit weights cannot be saved"):
        save(lm, None, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="8-bit weights cannot be saved"):
        export(lm, tmp_path / "exported", "mamba2")
    assert not list(tmp_path.iterdir())


def test_rows_of_zeros_stay_zeros() -> None:
    lm = model("mamba2")
    with torch.no_grad():
        lm.embedding.weight[3] = 0
    assert bool((logits(lm.quantize_())[..., 3] == 0).all())


@pytest.mark.parametrize("layout", ["mamba1", "mamba2", "mamba3", "both"])
def test_states_of_16_bits_are_half_as_many_bytes_and_change_little(layout: str) -> None:
    lm = model(layout)
    tokens = torch.randint(50, (2, 60), generator=torch.Generator().manual_seed(0))
    exact, low = lm.init_state(2), lm.init_state(2, dtype=torch.bfloat16)
    angles = [part.angle for part in exact if isinstance(part, TrapezoidState)]
    assert 2 * nbytes(low) == nbytes(exact) + nbytes(tuple(angles))
    for now in tokens.unbind(1):
        expected, got = lm.step_(now, exact), lm.step_(now, low)
    assert {t.dtype for t in tensors(low)} == ({torch.bfloat16, torch.float32} if angles else {torch.bfloat16})
    assert 0 < (got - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("layout", ["mamba1", "mamba2", "mamba3", "both"])
def test_a_segment_reads_what_a_state_of_16_bits_holds(layout: str) -> None:
    lm = model(layout)
    tokens = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(0))
    state = lm.init_state(2, dtype=torch.bfloat16)
    for now in tokens[:, :20].unbind(1):
        lm.step_(now, state)
    with torch.no_grad():
        got, _ = lm(tokens[:, 20:], state)
        expected = lm(tokens, lm.init_state(2))[0][:, 20:]
    assert (got - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_that_cannot_step_such_states_says_so(dtype: torch.dtype) -> None:
    with pytest.raises(RequestError, match=f"cannot keep its state in {dtype}"):
        model("mamba2 s5" if dtype is torch.bfloat16 else "mamba2").init_state(1, dtype=dtype)


def test_the_mixer_beside_another_that_cannot_step_such_states_is_named() -> None:
    both = {"type": "parallel", "mixers": {"ssm": {"type": "mamba2"}, "old": {"type": "s5"}}}
    lm = LM(ModelConfig(d_model=64, vocab_size=50, layout="both", mixers={"both": both}))
    with pytest.raises(RequestError, match=r"S5 cannot keep its state in torch.bfloat16"):
        lm.init_state(1, dtype=torch.bfloat16)


def test_attention_in_16_bits_keeps_its_cache() -> None:
    state = model("mamba2 attention", torch.bfloat16).init_state(1, context=8, dtype=torch.bfloat16)
    assert {t.dtype for t in tensors(state)} == {torch.bfloat16, torch.int64}
