"""The kernels of `trapezoid_scan` for Hopper GPUs: on one, or imitated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.ops import trapezoid_scan, triton_segments, use
from everstate.ops.example import Example
from tests.imitation import Shared, imitated
from tests.ops.test_trapezoid_triton import agree_on_parts, draw, errors, outcome


def call(example: Example, packing: Packing | None = None) -> Any:
    from everstate.ops.trapezoid import triton as kernels

    ends = [] if packing is None else list(packing.cu_seqlens)
    fixed = {**dict.fromkeys(("B_bias", "C_bias", "mimo_x", "D")), **example.fixed}
    interleaved = fixed.pop("interleaved", True)
    state = (t.float() for t in example.state)
    return kernels.Call(kernels.Arguments(*example.timed.values(), *state, **fixed), interleaved, ends)


def agree(example: Example, **settings: Any) -> None:
    assert call(example, **settings).hopper is not None
    expected = outcome(REFERENCE, example, torch.float64, **settings)
    plain = errors(outcome("torch", example, **settings), expected)
    for error, least in zip(errors(outcome("triton", example, **settings), expected), plain, strict=True):
        # Keys, queries and states are rounded before their products, in the plain form only results are; and sweeps
        # run in Triton's interpreter, which cuts where a GPU rounds.
        cut = 1.2e-2 if example.state.ssm.device.type == "cpu" else 6e-3
        assert error <= 1.6 * least + cut, (error, least)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "d_state", "dtype"),
    [
        (1, 130, 2, 1, 128, torch.bfloat16), (2, 66, 4, 2, 64, torch.bfloat16), (2, 7, 2, 1, 128, torch.float16),
        (1, 1, 4, 1, 64, torch.bfloat16),
    ],
)  # fmt: skip
def test_any_length(
    batch: int, length: int, heads: int, groups: int, d_state: int, dtype: torch.dtype, hopper: torch.device
) -> None:
    agree(draw(hopper, batch, length, heads, 64, groups, d_state, dtype=dtype))


@pytest.mark.parametrize("programs", [1, 8])
def test_halves_that_turn_and_no_biases(programs: int, hopper: torch.device, fill: Callable[[int], None]) -> None:
    """In one segment and in several, whose states the forward pass keeps with pairs side by side."""
    fill(programs)
    example = draw(hopper, 1, 140, 2, 64, 1, 64, dtype=torch.bfloat16)
    assert len(call(example).plan.segments) == (1 if programs == 1 else 3)
    agree(example._replace(fixed={"interleaved": False}))


@pytest.mark.parametrize("name", ["B_bias", "C_bias"])
def test_one_bias(name: str, hopper: torch.device) -> None:
    example = draw(hopper, 1, 70, 2, 64, 1, 64, dtype=torch.bfloat16)
    agree(example._replace(fixed={name: example.fixed[name]}))


@pytest.mark.parametrize("programs", [2, 8])
def test_segments_and_parts_of_the_heads(programs: int, hopper: torch.device, fill: Callable[[int], None]) -> None:
    fill(programs)
    example = draw(hopper, 1, 200, 4, 64, 1, 64, dtype=torch.bfloat16)
    assert len(call(example).plan.segments) == (1 if programs == 2 else 4)
    agree(example)


@pytest.mark.parametrize(("batch", "length", "segments"), [(3, 130, 3), (1, 330, 3)])
def test_programs_that_walk_several_times(
    batch: int, length: int, segments: int, hopper: torch.device, fill: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fill(segments)
    name = "everstate.ops.trapezoid.triton_hopper"
    kernels = [triton_segments.import_module(name), triton_segments.import_module(name + "_sweep")]
    example = draw(hopper, batch, length, 2, 64, 1, 64, dtype=torch.bfloat16)
    assert len(call(example).plan.segments) == segments
    outcomes = []
    for programs in (1, 2, segments):
        for module in kernels:
            monkeypatch.setattr(module, "processors", lambda device, programs=programs: programs)
        outcomes.append(outcome("triton", example))
    assert all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other, strict=True))


def test_parts_of_segments_cover_all_but_the_last() -> None:
    from everstate.ops.trapezoid.triton_tables import pieces

    rows, of_segments = pieces((0, 200, 264, 1100), 2, 3, torch.device("cpu"))
    # Sequences of 4, 1 and 14 chunks: segments of 2 + 2, of 1 and of 7 + 7.
    assert [row[:3] for row in rows.tolist()] == [[0, 1, 0], [1, 1, 0], [5, 3, 2], [8, 3, 2], [11, 1, 2]]
    assert of_segments.tolist() == [[0, 2], [2, 0], [2, 0], [2, 3], [5, 0]]


def test_rows_that_the_copy_engine_cannot_move(hopper: torch.device) -> None:
    example = draw(hopper, 2, 66, 2, 64, 1, 64, dtype=torch.bfloat16)
    with use("triton"), torch.no_grad():
        expected, _ = trapezoid_scan(**example.timed, state=example.state, **example.fixed)
        for name in ("omega", "B", "C"):
            wide = torch.nn.functional.pad(example.timed[name].detach(), (3, 2))
            example.timed[name] = wide[..., 3:-2]
        y, _ = trapezoid_scan(**example.timed, state=example.state, **example.fixed)
    assert torch.equal(y, expected)


def test_both_ways_to_make_cosines_and_sines() -> None:
    """By walking and by products with ones, for turns of up to 50 whole ones a token."""
    kernels = imitated("everstate.ops.trapezoid.triton_hopper_angles")
    generator = torch.Generator().manual_seed(0)
    dt, rates = torch.rand(64, generator=generator), 100 * torch.randn(64, 32, generator=generator)
    before = torch.randint(-(2**31), 2**31, (32,), generator=generator).int()
    angles = (dt[:, None] * rates).double().cumsum(0) + before.double() * (math.tau / 2**32)
    expected = torch.stack([angles.cos(), angles.sin()], -1)
    both, four = Shared(rates.expand(2, 64, 32).contiguous()), Shared(dt.expand(4, 64).contiguous())
    side_by_side = Shared(torch.zeros(2, 64, 64, dtype=torch.float16))
    kernels.trig_by_walking(before, both, four, side_by_side, 0, 1, 32, 64)
    c, s = (Shared(torch.zeros(64, 32, dtype=torch.float16)) for _ in range(2))
    kernels.trig_by_products(c, s, dt, rates, before, 1)
    for made in (side_by_side.data[1].unflatten(1, (32, 2)), torch.stack([c.data, s.data], -1)):
        assert (made - expected).abs().max() < 4e-4


def test_angles_of_long_sequences_are_right(hopper: torch.device) -> None:
    """The sum of thousands of turns in one direction, of which a float32 would lose three digits."""
    length = 16384 if hopper.type == "cuda" else 130
    example = draw(hopper, 1, length, 2, 64, 1, 64, dtype=torch.bfloat16)
    dt, omega = example.timed["dt"].detach(), example.timed["omega"].detach().abs() + 1.0
    example.timed["omega"] = omega
    with use("triton"), torch.no_grad():
        _, after = trapezoid_scan(**example.timed, state=example.state, **example.fixed)
    turned = (dt.unsqueeze(-1) * omega.unsqueeze(2)).double().sum(1) + example.state.angle.double()
    assert (torch.polar(torch.ones_like(turned), turned - after.angle.double()) - 1).abs().max() < 1e-5


def test_outputs_without_gradients(hopper: torch.device, fill: Callable[[int], None]) -> None:
    fill(2)
    agree_on_parts(draw(hopper, 1, 130, 2, 64, 1, 64, dtype=torch.bfloat16))


def test_packed_sequences_of_whole_chunks(hopper: torch.device, fill: Callable[[int], None]) -> None:
    fill(4)
    agree(draw(hopper, 1, 192, 2, 64, 1, 64, dtype=torch.bfloat16, sequences=2), packing=Packing([0, 64, 192]))


def test_others_are_left_to_the_other_kernels(hopper: torch.device) -> None:
    sizes = {"heads": 2, "headdim": 64, "groups": 1, "d_state": 128, "dtype": torch.bfloat16}
    for changes in (
        {"headdim": 32}, {"d_state": 32}, {"groups": 2}, {"rank": 2}, {"pairs": 64}, {"dtype": torch.float32}
    ):  # fmt: skip
        assert call(draw(hopper, 1, 64, **{**sizes, **changes})).hopper is None
    assert call(draw(hopper, 1, 65, **sizes, sequences=2), Packing([0, 30, 65])).hopper is None


def test_sequences_do_not_meet(hopper: torch.device) -> None:
    example = draw(hopper, 2, 70, 2, 64, 1, 64, dtype=torch.bfloat16)
    before = outcome("triton", example)
    for name in ("x", "A", "lam", "B", "C"):
        example.timed[name][1] = torch.nan
    after = outcome("triton", example)
    shared = [5 + len(example.timed) + i for i in range(3)]  # gradients of biases and D
    for at, (a, b) in enumerate(zip(before, after, strict=True)):
        assert at in shared or torch.equal(a[0], b[0]), at


def test_an_output_does_not_depend_on_what_comes_later(hopper: torch.device) -> None:
    example = draw(hopper, 1, 130, 2, 64, 1, 64, dtype=torch.bfloat16)
    with use("triton"):
        before, _ = trapezoid_scan(**example.timed, state=example.state, **example.fixed)
        for value in example.timed.values():
            value[:, 40:] *= 0.5
        after, _ = trapezoid_scan(**example.timed, state=example.state, **example.fixed)
    # Token 39 adds with the next one, but nothing to its own output.
    assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before, after)


def test_the_same_call_gives_the_same_bits(hopper: torch.device) -> None:
    cuda = hopper.type == "cuda"
    example = draw(hopper, *((8, 1030, 32) if cuda else (1, 130, 2)), 64, 1, 64, dtype=torch.bfloat16)
    first, *others = (outcome("triton", example) for _ in range(20 if cuda else 2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
