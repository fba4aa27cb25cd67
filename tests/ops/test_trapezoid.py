"""What the laws cannot say of the trapezoid: where it meets SSD, its gauge, and what its state must carry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.ops import TrapezoidState, rotate, ssd_scan, trapezoid_scan, trapezoid_step_
from everstate.ops.example import EXAMPLES, Draw, Example
from everstate.ops.rotary.halves import deinterleave

LENGTH = 41


def example(variant: str, batch: int = 2, length: int = LENGTH) -> Example:
    return EXAMPLES["trapezoid_scan"][variant](Draw(), batch, length, batch)


def scan(given: Example, **more: Any) -> tuple[Tensor, TrapezoidState]:
    return trapezoid_scan(**{**given.timed, **given.fixed, "state": given.state, **more})


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_without_rotation_and_with_lam_1_it_is_plain_ssd() -> None:
    given = example("siso")
    timed = given.timed
    timed.update(lam=torch.ones_like(timed["lam"]), omega=torch.zeros_like(timed["omega"]))
    state = given.state._replace(angle=torch.zeros_like(given.state.angle))
    y, after = scan(given._replace(fixed={}, state=state))
    B, C = timed["B"].squeeze(2), timed["C"].squeeze(2)
    expected, ssm = ssd_scan(timed["x"], timed["A"] * timed["dt"], timed["dt"], B, C, state.ssm)
    torch.testing.assert_close(y.squeeze(2), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.ssm, ssm, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 4])
def test_it_is_ssd_with_a_look_ahead_in_outputs_and_gradients(rank: int) -> None:
    """MATH section 4: s[t] = gamma[t] + dt[t+1] (1 - lam[t+1]), strict triangle, own diagonal gamma q.k (float64)."""
    draw, (batch, length, heads, p, n) = Draw(), (2, 23, 2, 3, 4)
    x = draw.normal(batch, length, heads, p)
    dt, A = draw.uniform(batch, length, heads, low=0.1), -draw.uniform(batch, length, heads, low=0.1)
    lam = draw.uniform(batch, length, heads)
    k, q = (draw.normal(batch, length, rank, heads, n) for _ in "kq")
    leaves = [t.requires_grad_() for t in (x, dt, A, lam, k, q)]
    shapes = (batch, heads, p, n), (batch, rank, heads, n), (batch, heads, p), (batch, heads, 1)
    zero = TrapezoidState(*(torch.zeros(shape, dtype=x.dtype) for shape in shapes))
    y, after = trapezoid_scan.reference(x, dt, A, lam, torch.zeros(batch, length, 1, dtype=x.dtype), k, q, zero)

    gamma, owed = lam * dt, (1 - lam) * dt
    s = gamma + torch.cat([owed[:, 1:], torch.zeros_like(owed[:, :1])], 1)
    cs = (A * dt).cumsum(1)
    earlier, own = (torch.ones(length, length).tril(-1)[..., None], torch.eye(length, dtype=x.dtype)[..., None])
    decay = torch.exp(cs.unsqueeze(2) - cs.unsqueeze(1))
    weight = torch.where(earlier.bool(), decay, 0.0) * s.unsqueeze(1) + own * gamma.unsqueeze(1)
    expected = torch.einsum("bish,birhn,bsjhn,bshp->birhp", weight, q, k, x)
    final = torch.einsum("bsh,bsjhn,bshp->bhpn", torch.exp(cs[:, -1:] - cs) * s, k, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.ssm, final, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(y.square().sum() + after.ssm.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum() + final.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", ["siso", "mimo"])
def test_the_angle_is_a_gauge(variant: str) -> None:
    """A state turned back by its angle may start again from angle 0."""
    given = example(variant)
    state, interleaved = given.state, given.fixed.get("interleaved", True)
    cos, sin = torch.cos(-state.angle), torch.sin(-state.angle)
    restarted = state._replace(
        ssm=rotate(state.ssm, cos.unsqueeze(2), sin.unsqueeze(2), interleaved=interleaved),
        k=rotate(state.k, cos.unsqueeze(1), sin.unsqueeze(1), interleaved=interleaved),
        angle=torch.zeros_like(state.angle),
    )
    assert relative(scan(given, state=restarted)[0], scan(given)[0]) < 1e-14


@pytest.mark.parametrize("variant", ["siso", "mimo"])
@pytest.mark.parametrize("field", ["ssm", "k", "x", "angle"])
def test_nothing_of_the_state_may_be_dropped(variant: str, field: str) -> None:
    given = example(variant)
    poorer = given.state._replace(**{field: torch.zeros_like(getattr(given.state, field))})
    assert relative(scan(given, state=poorer)[0], scan(given)[0]) > 1e-2


def test_siso_is_mimo_of_rank_1_with_the_entries_in_another_order() -> None:
    given = example("siso")
    timed = {key: deinterleave(value) if key in "BC" else value for key, value in given.timed.items()}
    fixed = {key: deinterleave(value) if key.endswith("_bias") else value for key, value in given.fixed.items()}
    state = given.state._replace(ssm=deinterleave(given.state.ssm), k=deinterleave(given.state.k))
    ones = torch.ones(4, 1, 3, dtype=torch.float64)
    moved = given._replace(timed=timed, fixed={**fixed, "interleaved": False, "mimo_x": ones}, state=state)
    y, after = scan(moved)
    expected, final = scan(given)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.ssm, deinterleave(final.ssm), rtol=0, atol=1e-12)


def test_half_turns_count_modulo_2() -> None:
    """A one turns the state by pi and adds 1 to it: 1 - 1 + 1 - ... is the parity of the ones so far."""
    bits = torch.randint(2, (1, 1000), generator=torch.Generator().manual_seed(0))
    ones = bits.double().unsqueeze(-1)
    first = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1000, 1, 1, 2)
    zero = TrapezoidState(
        *(torch.zeros(s, dtype=torch.float64) for s in ((1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 1), (1, 1, 1)))
    )
    y, _ = trapezoid_scan(
        ones.unsqueeze(-1), dt=ones, A=torch.full_like(ones, -1e-15), lam=torch.ones_like(ones),
        omega=torch.full_like(ones, math.pi), B=first, C=first, state=zero,
    )  # fmt: skip
    torch.testing.assert_close(y.flatten(), (bits.cumsum(1) % 2).flatten().double(), rtol=0, atol=1e-9)


def test_a_float32_angle_stays_right_over_many_turns() -> None:
    """Almost half a turn per token, 5000 times."""
    draw, length, rate = Draw(dtype=torch.float32), 5000, torch.tensor(3.1)
    given = EXAMPLES["trapezoid_scan"]["siso"](draw, 1, length, 1)
    timed = {**given.timed, "dt": torch.ones(1, length, 4), "omega": rate.expand(1, length, 2)}
    _, after = scan(given._replace(timed=timed, state=given.state._replace(angle=torch.zeros(1, 4, 2))))
    exact = math.remainder(rate.item() * length, math.tau)
    assert (after.angle - exact).abs().max() < 1e-5
    naive = rate.expand(length).cumsum(0)[-1].item()
    assert abs(math.remainder(naive, math.tau) - exact) > 1e-4


@pytest.mark.parametrize("variant", ["siso", "mimo"])
def test_a_step_writes_into_a_pool_that_is_a_slice_of_a_larger_tensor(variant: str) -> None:
    given = example(variant, 3, 1)
    y, after = scan(given)
    large = [torch.stack([t, t], 1) for t in given.state]
    token = {key: value[:, 0] for key, value in given.timed.items()}
    got = trapezoid_step_(**token, state=TrapezoidState(*(t[:, 1] for t in large)), **given.fixed)
    torch.testing.assert_close(got, y[:, 0], rtol=0, atol=1e-12)
    for whole, before, expected in zip(large, given.state, after, strict=True):
        torch.testing.assert_close(whole[:, 1], expected, rtol=0, atol=1e-12)
        assert torch.equal(whole[:, 0], before)


@pytest.mark.parametrize("variant", ["siso", "mimo"])
def test_a_state_keeps_no_segment_alive(variant: str) -> None:
    given = example(variant)
    for state in (scan(given)[1], trapezoid_scan.reference(**given.timed, **given.fixed, state=given.state)[1]):
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state)
