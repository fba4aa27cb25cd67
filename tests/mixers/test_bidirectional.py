"""The bidirectional wrapper: what the second direction sees, and what cannot be asked of it."""

from __future__ import annotations

import pytest
import torch

from everstate.core.errors import RequestError
from everstate.core.packing import Packing
from everstate.mixers import build_mixer
from everstate.mixers.bidirectional import reversed_gaps, reversed_order

TABLE = {"type": "bidirectional", "mixer": {"type": "s4d", "d_state": 4, "mode": "scan"}}


def test_the_second_direction_reads_the_reversed_sequence() -> None:
    mixer = build_mixer(TABLE, 3, dtype=torch.float64)
    x = torch.randn(2, 10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, state = mixer(x, mixer.init_state(2))
    start = mixer.forwards.init_state(2)
    one, other = mixer.forwards(x, start)[0], mixer.backwards(x.flip(1), start)[0].flip(1)
    assert torch.allclose(y, one + other, rtol=1e-14)
    assert state == ()


def test_shared_weights_make_the_layer_blind_to_direction() -> None:
    mixer = build_mixer({**TABLE, "shared": True}, 3, dtype=torch.float64)
    x = torch.randn(2, 10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = mixer.init_state(2)
    assert torch.allclose(mixer(x.flip(1), start)[0], mixer(x, start)[0].flip(1), rtol=1e-14)


def test_time_runs_backwards_too() -> None:
    packing = Packing.of_lengths([3, 1, 2])
    order = reversed_order(6, packing, torch.device("cpu"))
    assert order.tolist() == [2, 1, 0, 3, 5, 4]
    gaps = reversed_gaps(torch.tensor([[9.0, 2.0, 3.0, 9.0, 9.0, 4.0]]), order, packing)
    assert gaps.tolist() == [[1.0, 3.0, 2.0, 1.0, 1.0, 4.0]]


def test_a_step_is_refused() -> None:
    mixer = build_mixer(TABLE, 3)
    with pytest.raises(RequestError, match="whole sequences"):
        mixer.step_(torch.zeros(1, 3), mixer.init_state(1))
