"""What a step computes: the carried state, the borders of documents, accumulation, clipping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everstate.core.errors import ConfigError
from everstate.data import Batch, Document, Loader, Texts
from everstate.models import LM, ModelConfig
from everstate.ops import linear_cross_entropy
from everstate.tokenizers import ByteTokenizer
from everstate.train.lanes import segment_loss
from everstate.train.optim import parameter_groups
from everstate.train.run import Run

from .conftest import SSM, MakeRecipe

TEXTS = ("a state is a value. " * 9, "so it can be named, forked, saved. " * 4, "b", "and moved, and resumed! " * 3)


def documents(*texts: str) -> Texts:
    return Texts([Document(str(i), text) for i, text in enumerate(texts)])


def tiny() -> LM:
    return LM(ModelConfig(d_model=16, vocab_size=258, layout="2 * ssm", mixers={"ssm": SSM}), dtype=torch.float64)


def token_losses(model: LM, batches: list[Batch], lanes: int) -> list[Tensor]:
    """The loss of each token of each batch, states carried from batch to batch."""
    carry, losses = model.init_state(lanes), []
    for batch in batches:
        state = batch.first_states(carry, model.init_state(len(batch.packing)))
        hidden, after = model.hidden(batch.tokens, state, batch.packing)
        losses.append(linear_cross_entropy(hidden, model.head_weight, batch.targets)[0])
        carry = batch.last_states(after)
    return losses


def test_segments_with_a_carried_state_lose_what_the_whole_document_loses() -> None:
    model = tiny()
    pieces = list(Loader(documents(TEXTS[0]), ByteTokenizer(), lanes=1, seq_len=17, epochs=1))
    (whole,) = Loader(documents(TEXTS[0]), ByteTokenizer(), lanes=1, seq_len=1000, epochs=1)
    assert len(pieces) > 5
    expected, _ = segment_loss(model, whole, model.init_state(1))
    assert torch.allclose(torch.cat(token_losses(model, pieces, 1)).sum(), expected, rtol=1e-12, atol=0)


def test_a_run_carries_states_only_if_asked(make_recipe: MakeRecipe) -> None:
    """With a learning rate of 0 the mean loss of the steps is that of the document, if states are passed."""
    model, means = tiny(), {}
    (whole,) = Loader(documents(TEXTS[0]), ByteTokenizer(), lanes=1, seq_len=1000, epochs=1)
    steps, rest = divmod(whole.packing.total, 17)
    expected = torch.cat(token_losses(model, [whole], 1))[: steps * 17].mean().item()
    assert rest < 17
    for passing in (True, False):
        recipe = make_recipe(
            data={"lanes": 1, "seq_len": 17},
            train={"accumulate": 1, "dtype": "float64", "state_passing": passing, "weight_decay": 0.0},
        )
        run = Run(recipe, ByteTokenizer(), documents(TEXTS[0]))
        for _ in range(steps):
            run.step_(0.0)
        means[passing] = run.sums[0].item() / steps
    assert abs(means[True] - expected) < 1e-12
    assert abs(means[False] - expected) > 1e-6


def test_documents_do_not_meet() -> None:
    """Another text of the same length in the place of one document: the losses of all others stay bit-equal."""
    model = tiny()

    def read(*texts: str) -> tuple[list[Batch], Tensor]:
        batches = list(Loader(documents(*texts), ByteTokenizer(), lanes=2, seq_len=40, epochs=1))
        return batches, torch.cat(token_losses(model, batches, 2))

    batches, losses = read(*TEXTS)
    others, changed = read(TEXTS[0], TEXTS[1].swapcase(), *TEXTS[2:])
    inside = []  # the packed sequences that are of the other document: something differs in them
    for one, other in zip(batches, others, strict=True):
        sequences = one.packing.sequence_ids(torch.device("cpu"))
        inside.append(torch.isin(sequences, sequences[(one.tokens != other.tokens)[0]]))
    touched = torch.cat(inside)
    assert touched.any()
    assert not (losses == changed)[touched].all()
    assert torch.equal(losses[~touched], changed[~touched])


def test_a_step_is_adamw_on_the_clipped_gradient_of_the_mean_over_all_batches(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train={"accumulate": 3, "dtype": "float64", "clip": 0.5, "state_passing": False})
    run = Run(recipe, ByteTokenizer(), documents(*TEXTS))
    model = tiny()
    model.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    loader = Loader(documents(*TEXTS), ByteTokenizer(), lanes=2, seq_len=24, seed=0)
    for _ in range(2):
        batches = [next(loader) for _ in range(3)]
        sums = [segment_loss(model, b, model.init_state(len(b.packing)))[0] for b in batches]
        loss = torch.stack(sums).sum() / sum(batch.targets.numel() for batch in batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5
        optimizer.step()
        optimizer.zero_grad()
        run.sums.zero_()
        run.step_(1e-2)
        assert torch.allclose(run.sums, torch.stack([loss.detach(), norm]), rtol=1e-10)
    for one, other in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-12)
    assert run.tokens == 2 * 3 * 2 * 24


def test_a_device_that_is_not_there_is_refused_in_one_line(make_recipe: MakeRecipe) -> None:
    for name, sentence in (
        ("gpu", "names no device"),
        ("cuda:99", "train.device = 'cuda:99', and PyTorch sees .* here; give cpu"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Run(make_recipe(train={"device": name}), ByteTokenizer(), documents(*TEXTS))


def test_a_run_in_bfloat16_learns_what_one_in_float32_learns(make_recipe: MakeRecipe) -> None:
    """Rates at which no step of bfloat16 weights would show: only their float32 copies add them up."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = Run(make_recipe(train={"dtype": dtype}), ByteTokenizer(), documents(*TEXTS))
        assert run.model.dtype == getattr(torch, dtype)
        for _ in range(30):
            run.sums.zero_()
            run.step_(3e-4)
        losses[dtype] = run.sums[0].item()
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu_learns_what_one_on_a_cpu_learns(dtype: str, make_recipe: MakeRecipe) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    losses = {}
    for device in ("cpu", "cuda"):
        run = Run(make_recipe(train={"device": device, "dtype": dtype}), ByteTokenizer(), documents(*TEXTS))
        for _ in range(10):
            run.step_(1e-2)
        losses[device] = run.sums[0].item()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4 if dtype == "float32" else 0.05)
