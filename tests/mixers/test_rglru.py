"""The recurrence of Griffin, and where a sequence begins."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, sigmoid, softplus

from everstate.core.packing import Packing
from everstate.core.state import concat, equal
from everstate.mixers import build_mixer
from everstate.mixers.rglru import RGLRU


def build() -> RGLRU:
    mixer = build_mixer({"type": "rglru", "nheads": 2}, 8, dtype=torch.float64)
    assert isinstance(mixer, RGLRU)
    return mixer


def inputs(length: int) -> Tensor:
    return torch.randn(1, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_it_is_the_recurrence_of_the_paper() -> None:
    mixer, x = build(), inputs(6)
    y, u = mixer.in_proj(x[0]).chunk(2, -1)
    padded = pad(u, (0, 0, 3, 0))
    u = sum((padded[j : j + 6] * mixer.conv_weight[:, j] for j in range(4)), start=mixer.conv_bias)
    gates = [torch.block_diag(*gate.weight) for gate in (mixer.recurrence_gate, mixer.input_gate)]
    r, i = (sigmoid(u @ gate) for gate in gates)  # fresh from `init_`, the biases are zero
    a = torch.exp(-8 * softplus(mixer.a_param) * r)
    h, hs = torch.zeros(8, dtype=torch.float64), []
    for t in range(6):
        h = a[t] * h + (1 if t == 0 else (1 - a[t] ** 2).sqrt()) * i[t] * u[t]
        hs.append(h)
    got, after = mixer(x, mixer.init_state(1))
    torch.testing.assert_close(got[0], mixer.out_proj(torch.stack(hs) * gelu(y, approximate="tanh")))
    torch.testing.assert_close(after.h[0], h)
    assert after.pos.tolist() == [6]


def test_a_packed_sequence_begins_only_where_its_state_has_read_nothing() -> None:
    mixer, x = build(), inputs(13)
    _, read = mixer(x[:, :4], mixer.init_state(1))
    fresh = mixer.init_state(1)
    row, packing = torch.cat([x[:, 4:9], x[:, 9:]], 1), Packing.of_lengths([5, 4])
    got, after = mixer(row, concat([read, fresh]), packing)
    (first, one), (second, other) = mixer(x[:, 4:9], read), mixer(x[:, 9:], fresh)
    torch.testing.assert_close(got, torch.cat([first, second], 1))
    assert after.pos.tolist() == [9, 4]
    torch.testing.assert_close(after.h, torch.cat([one.h, other.h]))
    # A state of zeros that has read a token is not the start of a sequence.
    silent = fresh._replace(pos=fresh.pos + 1)
    assert not equal(mixer(x, silent)[1].h, mixer(x, fresh)[1].h)
