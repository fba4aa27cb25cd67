"""Golden values of the learning rate."""

from __future__ import annotations

import pytest

from everstate.train.schedule import Decay, learning_rate


def rate(step: int, decay: Decay, *, steps: float = 110.0, warmup: int = 10, cooldown: float = 0.2) -> float:
    return learning_rate(step, steps, lr=1.0, min_lr=0.1, warmup=warmup, decay=decay, cooldown=cooldown)


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [
        ("cosine", 0, 0.1),
        ("cosine", 4, 0.5),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 60, 0.55),
        ("cosine", 85, 0.1 + 0.9 * (1 - 2**-0.5) / 2),
        ("cosine", 110, 0.1),
        ("cosine", 500, 0.1),
        ("linear", 35, 0.775),
        ("linear", 110, 0.1),
        ("wsd", 10, 1.0),
        ("wsd", 90, 1.0),
        ("wsd", 100, 0.55),
        ("wsd", 110, 0.1),
        ("constant", 9, 1.0),
        ("constant", 110, 1.0),
    ],
)
def test_golden_values(decay: Decay, step: int, expected: float) -> None:
    assert rate(step, decay) == pytest.approx(expected, rel=1e-12)


def test_no_warm_up_begins_at_the_full_rate() -> None:
    assert rate(0, "linear", warmup=0) == 1.0


def test_a_run_that_is_all_warm_up_never_decays() -> None:
    assert rate(4, "cosine", steps=5.0, warmup=10) == 0.5
