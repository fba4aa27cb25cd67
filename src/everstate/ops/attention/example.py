"""Arguments of attention for the laws and the benchmarks."""

from __future__ import annotations

from typing import Any

from everstate.ops.attention import AttentionState, Rope, attention_step_
from everstate.ops.example import Draw, Example, Variants

READ = 20
"""Tokens that were read before are fewer than this."""


def _example(draw: Draw, batch: int, length: int, sequences: int, groups: int, **settings: Any) -> Example:
    heads, headdim = 4, 3
    capacity = settings.get("window") or length + READ
    return Example(
        timed={
            "q": draw.normal(batch, length, heads, headdim),
            "k": draw.normal(batch, length, groups, headdim),
            "v": draw.normal(batch, length, groups, headdim),
        },
        state=AttentionState(
            k=draw.normal(sequences, capacity, groups, headdim),
            v=draw.normal(sequences, capacity, groups, headdim),
            pos=draw.integers(sequences, high=READ),
        ),
        fixed=settings,
        step=attention_step_,
    )


def _full(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, groups=4)


def _grouped(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, groups=2, scale=0.7)


def _fresh(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _full(draw, batch, length, sequences)
    return example._replace(state=example.state._replace(pos=example.state.pos * 0))


def _window(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, groups=4, window=7)


def _wide_window(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, groups=2, window=70)


def _rope(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, groups=2, rope=Rope(theta=50.0, rotary_dim=2))


def _rope_window(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    rope = Rope(theta=50.0, interleaved=True, rotary_dim=2)
    return _example(draw, batch, length, sequences, groups=1, rope=rope, window=7)


def _softcap(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, groups=2, softcap=1.5)


def _softcap_window(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _example(draw, batch, length, sequences, groups=1, softcap=1.5, window=7)


attention: Variants = {
    "full": _full,
    "grouped, scale": _grouped,
    "fresh": _fresh,
    "window": _window,
    "wide window": _wide_window,
    "rope": _rope,
    "rope, window": _rope_window,
    "softcap": _softcap,
    "softcap, window": _softcap_window,
}
