"""Latent attention is the attention of the keys and values that it never expands."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from everstate.core.state import nbytes
from everstate.mixers import build_mixer
from everstate.mixers.mla import MLA

SIZES = {"nheads": 3, "d_latent": 8, "d_nope": 4, "d_shared": 2, "d_value": 7}


def build(**settings: int | bool) -> MLA:
    mixer = build_mixer({"type": "mla", **SIZES, **settings}, 16, dtype=torch.float64)
    assert isinstance(mixer, MLA)
    return mixer


@pytest.mark.parametrize("settings", [{}, {"q_rank": 5, "bias": True}], ids=str)
def test_it_is_attention_with_expanded_keys_and_values(settings: dict[str, int | bool]) -> None:
    mixer = build(**settings)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if mixer.q_proj is None:
        assert mixer.q_a_proj is not None and mixer.q_a_norm is not None and mixer.q_b_proj is not None
        q = mixer.q_b_proj(mixer.q_a_norm(mixer.q_a_proj(x)))
    else:
        q = mixer.q_proj(x)
    latent, k_shared = mixer.kv_a_proj(x).split([8, 2], -1)
    k_nope, v = mixer.kv_b_proj(mixer.kv_a_norm(latent)).unflatten(-1, (3, 11)).split([4, 7], -1)
    k = torch.cat([k_nope, k_shared.unsqueeze(2).expand(-1, -1, 3, -1)], -1)
    q, k, v = (t.transpose(1, 2) for t in (q.unflatten(-1, (3, 6)), k, v))
    wanted = mixer.out_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    got, _ = mixer(x, mixer.init_state(2, context=9))
    torch.testing.assert_close(got, wanted)


def test_a_token_costs_one_latent_vector_and_one_shared_key() -> None:
    mixer = build()
    assert nbytes(mixer.init_state(1, context=20)) - nbytes(mixer.init_state(1, context=19)) == (8 + 2) * 8
