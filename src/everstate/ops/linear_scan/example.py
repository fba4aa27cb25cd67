"""Arguments of the linear scan for the laws and the benchmarks."""

from __future__ import annotations

import torch

from everstate.ops.example import Draw, Example, Variants
from everstate.ops.linear_scan import linear_step_


def _real(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return Example(
        timed={"a": draw.uniform(batch, length, 3, 4, low=-0.5), "b": draw.normal(batch, length, 3, 4)},
        state=draw.normal(sequences, 3, 4),
        step=linear_step_,
    )


def _complex(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    radius, angle = draw.uniform(batch, length, 5), draw.uniform(batch, length, 5, high=6.28)
    return Example(
        timed={"a": torch.polar(radius, angle), "b": draw.complex(batch, length, 5)},
        state=draw.complex(sequences, 5),
        step=linear_step_,
    )


def _real_decay(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    example = _complex(draw, batch, length, sequences)
    return example._replace(timed={**example.timed, "a": draw.uniform(batch, length, 5)})


def _wide(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _widened(_real(draw, batch, length, sequences))


def _wide_complex(draw: Draw, batch: int, length: int, sequences: int) -> Example:
    return _widened(_complex(draw, batch, length, sequences))


def _widened(example: Example) -> Example:
    """With one time step of at least 4 KB; very short examples stay narrow, because gradcheck pays for every number."""
    times = 1 if example.timed["a"].shape[1] <= 3 else 512 // example.state[0].numel() + 1
    return example._replace(
        timed={name: value.repeat_interleave(times, -1) for name, value in example.timed.items()},
        state=example.state.repeat_interleave(times, -1),
    )


linear_scan: Variants = {
    "real": _real,
    "complex": _complex,
    "real decay of a complex state": _real_decay,
    "wide": _wide,
    "wide complex": _wide_complex,
}
