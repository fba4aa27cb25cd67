"""What layers share: long inputs are read in segments on a CPU, and nobody can tell."""

from __future__ import annotations

import pytest
import torch

from everstate.core.packing import Packing
from everstate.mixers import base, build_mixer


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "mamba3"])
def test_segments_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"type": kind, "d_state": 8} | ({} if kind == "mamba1" else {"headdim": 8})
    mixer = build_mixer(table, 16, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 23, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    delta_t = torch.rand(2, 23, generator=generator, dtype=torch.float64) + 0.5

    def read() -> list[torch.Tensor]:
        y, state = mixer(x, mixer.init_state(2), None, delta_t)
        return [y, *state, *torch.autograd.grad(y.square().sum(), x)]

    whole = read()
    lengths = []
    mixer.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    monkeypatch.setattr(base, "CPU_SEGMENT", 10)
    segments = read()
    assert lengths == [10, 10, 3, 23]
    for one, other in zip(segments, whole, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    packing = Packing.of_lengths([15, 8])
    assert not base.is_long(x[:1], packing)
