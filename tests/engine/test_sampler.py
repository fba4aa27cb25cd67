"""Sampling: each filter keeps what it says, and a choice follows from seed and position."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstate.core.errors import RequestError
from everstate.engine.sampler import Filters, Sampling, choose, greedy, most_kept, uniforms

# Probabilities 0.4, 0.3, 0.2, 0.1, in another order.
LOGITS = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()


def sample(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    u = torch.from_numpy(uniforms([sampling.seed], [position], 1))[:, 0]
    return int(choose(logits[None], u, Filters.of([sampling])))


def support(sampling: Sampling) -> set[int]:
    return {sample(LOGITS, sampling, position) for position in range(300)}


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(temperature=0.0), {1}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_p=0.4), {1}),
        (Sampling(top_p=0.41), {1, 3}),
        (Sampling(top_p=0.75), {0, 1, 3}),
        (Sampling(min_p=0.6), {1, 3}),
        (Sampling(top_k=3, min_p=0.45), {0, 1, 3}),
        (Sampling(temperature=1e-4), {1}),
    ],
)
def test_filters_keep_what_they_say(sampling: Sampling, kept: set[int]) -> None:
    assert support(sampling) == kept


def test_frequencies_follow_the_probabilities() -> None:
    counts = Counter(sample(LOGITS, Sampling(), position) for position in range(4000))
    for token, p in enumerate([0.2, 0.4, 0.1, 0.3]):
        assert abs(counts[token] / 4000 - p) < 0.03


def test_top_p_is_taken_after_top_k() -> None:
    # The two likeliest, made to sum to one, are 4/7 and 3/7.
    assert support(Sampling(top_k=2, top_p=0.57)) == {1}


def test_a_choice_follows_from_seed_and_position() -> None:
    def text(seed: int) -> list[int]:
        return [sample(LOGITS, Sampling(seed=seed), position) for position in range(40)]

    assert text(3) == text(3)
    assert text(3) != text(4)
    assert text(3)[1:] != text(3)[:-1]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**50))
def test_the_random_numbers_are_those_of_numpy(seed: int, position: int) -> None:
    draw = lambda p: np.random.Generator(np.random.Philox(key=seed, counter=p)).random()
    assert uniforms([3, seed], [0, position], 3)[1].tolist() == [draw(position + i) for i in range(3)]


def test_rows_of_a_batch_are_each_chosen_as_if_alone() -> None:
    samplings = [
        Sampling(), Sampling(temperature=0.0), Sampling(top_k=5, seed=1), Sampling(top_p=0.5, seed=2),
        Sampling(temperature=0.5, top_k=9, top_p=0.9, min_p=0.02, seed=3),
    ]  # fmt: skip
    logits = torch.randn(len(samplings), 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    for position in range(50):
        u = torch.from_numpy(uniforms([s.seed for s in samplings], [position] * len(samplings), 1))[:, 0]
        together = choose(logits, u, Filters.of(samplings)).tolist()
        assert together == [sample(row, s, position) for row, s in zip(logits, samplings, strict=True)]
        assert together[1] == greedy(logits)[1]


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=9), st.integers(0, 9), st.floats(0.01, 1.0), st.integers(0, 99)
)
def test_any_setting_chooses_a_token(logits: list[float], top_k: int, top_p: float, seed: int) -> None:
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=0.5, temperature=0.7, seed=seed)
    assert 0 <= sample(torch.tensor(logits), sampling, seed) < len(logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.0},
        {"seed": -1},
        {"seed": 2**70},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=f"sampling: {next(iter(settings))}.*given"):
        Sampling(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picking_the_likeliest_is_sorting_all(dtype: torch.dtype) -> None:
    """In bfloat16 many logits are equal, and the first of them counts as likelier; so do 0 and -0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 300, generator=generator).to(dtype)
    logits[:, ::7], logits[:, 1::7] = 0.0, -0.0
    samplings = [Sampling(top_k=1 + i, top_p=1 - i / 100, temperature=0.1 + i / 10) for i in range(40)]
    u, filters = torch.rand(40, generator=generator, dtype=torch.float64), Filters.of(samplings)
    assert most_kept(samplings) == 40
    assert torch.equal(choose(logits, u, filters, 40), choose(logits, u, filters))


def test_few_are_kept_only_if_every_row_keeps_few() -> None:
    few, greedy, all_ = Sampling(top_k=9), Sampling(temperature=0.0), Sampling()
    assert [most_kept(s) for s in ([few, greedy], [few, all_], [greedy], [Sampling(top_k=2000)])] == [9, 0, 0, 0]
