"""The gated short convolution, written out."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from everstate.mixers import build_mixer
from everstate.mixers.short_conv import ShortConv


def test_it_is_a_convolution_between_two_gates() -> None:
    mixer = build_mixer({"type": "short_conv", "bias": True}, 8, dtype=torch.float64)
    assert isinstance(mixer, ShortConv) and mixer.conv_bias is not None
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    B, C, u = mixer.in_proj(x).split(8, -1)
    padded = pad(B * u, (0, 0, 2, 0))
    conv = mixer.conv_bias + sum(padded[:, j : j + 7] * mixer.conv_weight[:, j] for j in range(3))
    got, after = mixer(x, mixer.init_state(2))
    torch.testing.assert_close(got, mixer.out_proj(C * conv))
    torch.testing.assert_close(after.conv, (B * u)[:, -2:].transpose(1, 2))
