"""Mamba-2: a width of its own, and multipliers, which are those of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from everstate.core.state import clone, equal, tensors
from everstate.mixers import build_mixer, mamba2
from everstate.models import LM, ModelConfig
from everstate.ops import use
from everstate.ops.ssd import pending

TABLE = {"type": "mamba2", "d_state": 8, "headdim": 8, "d_inner": 24, "ngroups": 3, "bias": True}


def test_a_width_that_is_no_multiple_of_the_model() -> None:
    mixer = build_mixer(TABLE, 16, device="meta")
    assert mixer.out_proj.weight.shape == (16, 24)
    assert mixer.nheads == 3


def test_multipliers_are_those_of_the_weights() -> None:
    factors = (0.5, 0.6, 0.7, 0.8, 0.9)
    mixer = build_mixer(
        {**TABLE, "in_multiplier": 1.2, "multipliers": factors, "out_multiplier": 0.4}, 16, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    folded = build_mixer(TABLE, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.in_proj.bias.normal_(generator=generator)
        mixer.out_proj.bias.normal_(generator=generator)
        folded.load_state_dict(mixer.state_dict())
        scale = torch.cat([torch.full((n,), m) for n, m in zip((24, 24, 24, 24, 3), factors, strict=True)]).double()
        folded.in_proj.weight *= 1.2 * scale[:, None]
        folded.in_proj.bias *= scale
        folded.out_proj.weight *= 0.4
        folded.out_proj.bias *= 0.4
    x = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, mixer.init_state(2))[0], folded(x, folded.init_state(2))[0])


@pytest.mark.parametrize("table", [TABLE, {"type": "parallel", "mixers": {"a": TABLE, "b": {"type": "short_conv"}}}])
def test_a_deferred_state_is_stepped_read_and_settled(table: dict[str, Any], deferring: None) -> None:
    """As the state that it stands for, whose memory it shares."""
    mixer = build_mixer(table, 16, dtype=torch.float64)
    tokens = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain, state = mixer.init_state(2), mixer.init_state(2)
    deferred = mixer.deferred(state)
    assert len(tensors(deferred)) == len(tensors(state)) + 5
    with torch.no_grad():
        for token in tokens[:, :11].unbind(1):
            torch.testing.assert_close(mixer.step_(token, deferred), mixer.step_(token, plain))
        row, time = torch.tensor([1]), None if "mixers" in table else torch.tensor([1.7]).double()
        for token in tokens[:1, 11:14].unbind(1):
            stepped = (mixer.step_(token, pool, row, time) for pool in (deferred, plain))
            torch.testing.assert_close(*stepped)
        assert not torch.allclose(tensors(state)[1], tensors(plain)[1])
        read = clone(deferred)
        (got, after), (expected, known) = mixer(tokens[:, 14:], read), mixer(tokens[:, 14:], plain)
        torch.testing.assert_close(got, expected)
        mixer.settle_(after)
        torch.testing.assert_close([*tensors(after)[:2]], [*tensors(known)[:2]])
        assert equal(read, deferred)
        mixer.settle_(deferred)
    for one, other in zip(tensors(state), tensors(plain), strict=True):
        torch.testing.assert_close(one, other)


def test_states_are_deferred_where_it_pays(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = build_mixer({"type": "mamba2"}, 64, dtype=torch.bfloat16, device=hopper)
    state = mixer.init_state(2)
    with torch.no_grad():
        assert mixer.deferred(state) is state  # small
        monkeypatch.setattr(pending, "WORTH", state.ssm.nbytes)
        deferred = mixer.deferred(state)
        assert isinstance(deferred, mamba2.Deferred) and mixer.deferred(deferred) is deferred
        narrow = build_mixer({"type": "mamba2", "d_state": 64}, 128, dtype=torch.bfloat16, device=hopper)
        assert not isinstance(narrow.deferred(narrow.init_state(2)), mamba2.Deferred)  # not timed
        with use("torch"):
            assert mixer.deferred(state) is state
        wide = build_mixer({"type": "mamba2"}, 64, device=hopper)
        assert wide.deferred(state) is state  # inputs of 32 bits
        mixer.step_ = mixer.step_  # somebody else's
        assert mixer.deferred(state) is state


def test_layers_take_turns(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose parameters have gradients, in which somebody has put a module of their own."""
    monkeypatch.setattr(pending, "WORTH", 0)
    model = LM(ModelConfig(d_model=64, vocab_size=50, layout="3 * mamba2"), dtype=torch.bfloat16, device=hopper)
    model.layers[1].mixer = torch.nn.Sequential(model.layers[1].mixer)
    state = model.layers[0].mixer.init_state(2)
    parts = model.deferred((state, state, state))
    assert [isinstance(part, mamba2.Deferred) for part in parts] == [True, False, True]
    assert [int(parts[i].pending.waiting.max()) for i in (0, 2)] == [0, 2]
    model.settle_(parts)


@pytest.mark.gpu
def test_what_is_kept_for_a_convolution_lies_by_tap_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for device in ("cpu", "cuda"):
        conv = build_mixer({"type": "mamba2"}, 64, device=device).init_state(3).conv
        assert conv.shape == (3, 384, 3)
        assert conv.stride() == ((1152, 3, 1) if device == "cpu" else (1152, 1, 384))
