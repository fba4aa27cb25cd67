"""What the laws cannot say of Mamba-1: its initial values, its published size, its errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from everstate.core.errors import ConfigError
from everstate.mixers import build_mixer
from everstate.mixers.mamba1 import Mamba1
from everstate.models import LM, ModelConfig


def build(d_model: int = 40, **table: object) -> Mamba1:
    mixer = build_mixer({"type": "mamba1", **table}, d_model)
    assert isinstance(mixer, Mamba1)
    return mixer


def test_initial_values() -> None:
    mixer = build()
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(80, 16))
    assert torch.equal(mixer.D, torch.ones(80))
    dt = softplus(mixer.dt_bias)
    assert dt.min() >= 0.999e-3
    assert dt.max() <= 1.001e-1
    assert dt.log().std() > 1  # spread evenly over two decades, for which it is 1.33
    assert 0.9 * 3**-0.5 < mixer.dt_proj.weight.abs().max() <= 3**-0.5


def test_dt_has_a_floor() -> None:
    dt = softplus(build(dt_min=1e-6, dt_max=1e-5).dt_bias)
    assert torch.allclose(dt, torch.full_like(dt, 1e-4))


class Shifted(nn.Module):
    """As an adapter is, which stands around a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + 3


def shift(mixer: Mamba1) -> None:
    mixer.dt_proj = Shifted(mixer.dt_proj)  # type: ignore[assignment]


def hook(mixer: Mamba1) -> None:
    mixer.dt_proj.register_forward_hook(lambda part, args, dt: dt + 3)


@pytest.mark.parametrize("change", [shift, hook])
def test_what_somebody_does_with_dt_is_done_in_a_step_too(change: Callable[[Mamba1], None]) -> None:
    mixer, x = build(), torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    before, _ = mixer(x, mixer.init_state(2))
    change(mixer)
    after, _ = mixer(x, mixer.init_state(2))
    state = mixer.init_state(2)
    with torch.no_grad():
        stepped = torch.stack([mixer.step_(token, state) for token in x.unbind(1)], 1)
    torch.testing.assert_close(stepped, after, rtol=1e-4, atol=1e-5)
    assert (after - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize(("d_model", "given", "rank"), [(40, "auto", 3), (48, "auto", 3), (49, "auto", 4), (48, 5, 5)])
def test_dt_rank(d_model: int, given: object, rank: int) -> None:
    assert build(d_model, dt_rank=given).dt_rank == rank


def test_the_published_130m_model_has_its_published_size() -> None:
    model = LM(ModelConfig(d_model=768, vocab_size=50280, layout="24 * (mamba1)"), device="meta")
    assert sum(p.numel() for p in model.parameters()) == 129_135_360


def test_norms_act_on_dt_B_and_C() -> None:
    mixer = build(dt_bc_norm="weightless")
    for part in mixer._select(torch.randn(2, 5, 80, generator=torch.Generator().manual_seed(0)))[1:]:
        assert torch.allclose(part.square().mean(-1), torch.ones(2, 5), atol=1e-3)
    names = {name for name, _ in build(dt_bc_norm="learned").named_parameters()}
    assert {"dt_norm.weight", "B_norm.weight", "C_norm.weight"} <= names


@pytest.mark.parametrize("table", [{"dt_rank": 0}, {"dt_rank": "full"}, {"dt_bc_norm": "layer"}, {"d_stat": 16}])
def test_errors_name_the_key(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(table))):
        build(**table)
