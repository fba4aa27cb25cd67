"""A token through a model: norms left to linear maps, and linear maps added where they are made, change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.state import clone, tensors
from everstate.mixers import MIXERS
from everstate.mixers.mamba2 import Mamba2
from everstate.models import LM, ModelConfig
from everstate.ops import Normed, linear, use

LAYOUTS = {
    "mamba2": {},
    "mamba1 mlp": {"norm": "rms1p"},
    "mamba3 attention": {"residual_multiplier": 0.4, "logit_multiplier": 0.5, "embedding_multiplier": 3.0},
    "mamba2 moe mamba2": {"tie_embeddings": False},
    "late mamba2": {"post_norm": ("late",), "mixers": {"late": {"type": "mlp"}}},
    "mamba2 mlp": {"norm": "layer"},
}


def built(layout: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64, **settings: Any) -> LM:
    return LM(ModelConfig(d_model=128, vocab_size=70, layout=layout, **settings), device=device, dtype=dtype)


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize(("layout", "settings"), LAYOUTS.items(), ids=LAYOUTS)
def test_kernels_step_as_pytorch_does(
    layout: str, settings: dict[str, Any], rows: int, kernel_device: torch.device
) -> None:
    model = built(layout, kernel_device, torch.bfloat16, **settings)
    ids = torch.randint(70, (2, rows), generator=torch.Generator().manual_seed(0)).to(kernel_device)
    state = model.init_state(rows, context=8)
    theirs = clone(state)
    for now in ids:
        got = model.step_(now, state)
        with use("torch", "reference"):
            expected = model.step_(now, theirs)
        assert (got - expected).float().norm() <= 2e-2 * expected.float().norm()
    for one, other in zip(tensors(state), tensors(theirs), strict=True):
        assert (one - other).float().norm() <= 2e-2 * other.float().norm() + 1e-3


def test_a_norm_is_left_to_the_next_linear_map(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    seen: list[bool] = []
    accepts = linear.implementations[0].accepts

    def looks(x: Tensor | Normed, *args: Any, **settings: Any) -> str | None:
        seen.append(isinstance(x, Normed) and x.squares is not None)
        return accepts(x, *args, **settings)

    monkeypatch.setattr(linear.implementations[0], "accepts", looks)
    model = built("mlp mlp", kernel_device, torch.bfloat16)
    model.step_(torch.tensor([1], device=kernel_device), model.init_state(1))
    assert seen == [False, True, True]  # of the embedding; of the second layer; of the head


class Doubled(Mamba2):
    """A layer of one's own that does more in its step, and as much in its forward."""

    def forward(self, *args: Any) -> Any:
        y, state = super().forward(*args)
        return 2 * y, state

    def step_(self, *args: Any) -> Tensor:
        return 2 * super().step_(*args)


def test_a_step_of_ones_own_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS._targets, "doubled", f"{__name__}:Doubled")
    model = built("mamba2 2 * (doubled)", mixers={"doubled": {"type": "doubled"}})
    ids, state = torch.randint(70, (2, 3), generator=torch.Generator().manual_seed(0)), model.init_state(2)
    whole, _ = model(ids, model.init_state(2))
    stepped = torch.stack([model.step_(now, state) for now in ids.unbind(1)], 1)
    torch.testing.assert_close(stepped, whole)
