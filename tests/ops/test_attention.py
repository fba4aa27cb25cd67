"""Attention: what a window sees, the ring and its end, grouped heads, blocks, and what a backend refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everstate.core.errors import BackendError, RequestError
from everstate.core.packing import Packing
from everstate.ops import AttentionState, Rope, attention, attention_step_, rotary, use
from everstate.ops.attention.blocks import FEWEST, MOST
from tests.largest import Largest

HEADS, HEADDIM = 2, 4


def draw(length: int, *, batch: int = 1, groups: int = HEADS, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    normal = lambda n: torch.randn(batch, length, n, HEADDIM, generator=generator, dtype=torch.float64)
    return normal(heads), normal(groups), normal(groups)


def empty(capacity: int, *, batch: int = 1, groups: int = HEADS) -> AttentionState:
    zeros = torch.zeros(batch, capacity, groups, HEADDIM, dtype=torch.float64)
    return AttentionState(zeros, zeros.clone(), torch.zeros(batch, dtype=torch.int64))


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Token by token and head by head, from the definition of a window."""
    y = torch.empty_like(q)
    for t in range(q.shape[1]):
        first = max(0, t - window + 1)
        for h in range(q.shape[2]):
            scores = k[0, first : t + 1, h] @ q[0, t, h] / HEADDIM**0.5
            y[0, t, h] = torch.softmax(scores, 0) @ v[0, first : t + 1, h]
    return y


@settings(max_examples=40)
@given(
    backend=st.sampled_from(["sdpa", "torch", "reference"]),
    window=st.integers(1, 12),
    pieces=st.lists(st.integers(1, 15), min_size=1, max_size=4),
)
def test_a_window_sees_itself_and_what_is_before_it_however_it_is_read(
    backend: str, window: int, pieces: list[int]
) -> None:
    q, k, v = draw(sum(pieces))
    state, ys = empty(window), []
    with use(backend):
        for part in zip(*(t.split(pieces, 1) for t in (q, k, v)), strict=True):
            y, state = attention(*part, state, window=window)
            ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), by_hand(q, k, v, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [[17], [3, 14], [1] * 17, [5, 1, 11]])
def test_token_t_lies_in_slot_t_mod_s(pieces: list[int]) -> None:
    q, k, v = draw(17)
    state = empty(5)
    for part in zip(*(t.split(pieces, 1) for t in (q, k, v)), strict=True):
        if part[0].shape[1] == 1:
            attention_step_(*(t[:, 0] for t in part), state, window=5)
        else:
            _, state = attention(*part, state, window=5)
    assert state.pos.tolist() == [17]
    for t in range(12, 17):
        assert torch.equal(state.k[0, t % 5], k[0, t])
        assert torch.equal(state.v[0, t % 5], v[0, t])


@pytest.mark.parametrize("backend", ["sdpa", "torch", "reference"])
@pytest.mark.parametrize("rope", [Rope(), Rope(theta=50.0, interleaved=True, rotary_dim=2)])
def test_a_rope_turns_queries_and_keys_by_how_many_tokens_were_read_before_and_keeps_keys_so(
    backend: str, rope: Rope
) -> None:
    q, k, v = draw(9)
    turned = [rotary(t, torch.arange(9).unsqueeze(0), **rope._asdict()) for t in (q, k)]
    with use(backend):
        expected, after = attention(*turned, v, empty(9))
        y, state = attention(q[:, :8], k[:, :8], v[:, :8], empty(9), rope=rope)
        last = attention_step_(q[:, 8], k[:, 8], v[:, 8], state, rope=rope)
    torch.testing.assert_close(torch.cat([y, last.unsqueeze(1)], 1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "torch", "reference"])
def test_a_token_beyond_the_capacity_is_an_error_and_not_a_wrong_answer(backend: str) -> None:
    q, k, v = draw(9)
    whole, _ = attention(q, k, v, empty(0))
    with use(backend):
        y, state = attention(q[:, :8], k[:, :8], v[:, :8], empty(8))
        torch.testing.assert_close(y, whole[:, :8])
        for read in (lambda *token: attention(*token, state), lambda *t: attention_step_(*(u[:, 0] for u in t), state)):
            with pytest.raises(RequestError, match=r"read 8 tokens, its state holds 8, .* init_state\(.*context=N"):
                read(q[:, 8:], k[:, 8:], v[:, 8:])
    torch.testing.assert_close(attention(q[:, 8:], k[:, 8:], v[:, 8:], pad(state, 9))[0], whole[:, 8:])


def pad(state: AttentionState, capacity: int) -> AttentionState:
    """The same tokens in a larger ring that has not turned yet."""
    more = lambda ring: torch.cat([ring, empty(capacity - ring.shape[1]).k], 1)
    return AttentionState(more(state.k), more(state.v), state.pos)


def test_a_state_without_room_reads_one_segment_and_no_second() -> None:
    q, k, v = draw(4)
    _, state = attention(q, k, v, empty(0))
    assert state.pos.tolist() == [4]
    with pytest.raises(RequestError, match="holds 0"):
        attention(q, k, v, state)
    with pytest.raises(RequestError, match="the 6 tokens before it"):
        attention(q, k, v, state, window=7)
    state = empty(0)
    torch.testing.assert_close(attention_step_(q[:, 0], k[:, 0], v[:, 0], state), v[:, 0])
    assert state.pos.tolist() == [1]


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_a_group_is_one_head_repeated(softcap: float | None) -> None:
    q, k, v = draw(20, heads=6, groups=2)
    repeated = (t.repeat_interleave(3, 2) for t in (k, v))
    y, _ = attention(q, k, v, empty(20, groups=2), softcap=softcap)
    expected, _ = attention(q, *repeated, empty(20, groups=6), softcap=softcap)
    torch.testing.assert_close(y, expected)


def test_a_soft_cap_bounds_the_scores() -> None:
    q, k, v = draw(2)
    y, _ = attention(1e6 * q, 1e6 * k, v, empty(2), softcap=1.0)
    signs = torch.sign(torch.einsum("hp,shp->hs", q[0, 1], k[0]))
    torch.testing.assert_close(y[0, 1], torch.einsum("hs,shp->hp", torch.softmax(signs, 1), v[0]))


def test_the_fused_backend_says_why_it_refuses_a_soft_cap() -> None:
    arguments = (*draw(2), empty(2))
    assert "soft cap" in attention.explain(*arguments, softcap=1.0)["sdpa"]
    assert {name for name, verdict in attention.explain(*arguments).items() if verdict == "accepts"} == {
        "sdpa", "torch", "reference",
    }  # fmt: skip
    with use("sdpa"), pytest.raises(BackendError, match="soft cap"):
        attention(*arguments, softcap=1.0)


@pytest.mark.parametrize("backend", ["sdpa", "torch"])
@pytest.mark.parametrize("window", [None, FEWEST + 9, MOST + 100])
def test_blocks_of_queries_are_the_whole(backend: str, window: int | None) -> None:
    length = MOST + FEWEST + 3
    q, k, v = draw(length + 30)
    first, second = slice(0, 30), slice(30, None)
    capacity = window or length + 30
    _, state = attention(q[:, first], k[:, first], v[:, first], empty(capacity), window=window)
    segment = q[:, second], k[:, second], v[:, second]
    with use("reference"):
        expected, after = attention(*segment, state, window=window)
    with use(backend):
        y, got = attention(*segment, state, window=window)
    torch.testing.assert_close((y, *got), (expected, *after))


@pytest.mark.parametrize("backend", ["sdpa", "torch"])
def test_memory_grows_with_the_length_alone_when_there_is_a_window(backend: str) -> None:
    window, length = 32, 1024
    q, k, v = (t.requires_grad_() for t in draw(length))
    with use(backend), Largest() as largest:
        attention(q, k, v, empty(window), window=window)[0].sum().backward()
    assert largest.elements <= max(q.numel(), FEWEST * (FEWEST + window) * HEADS) < length * length / 16


def test_scores_with_a_soft_cap_are_never_all_in_memory() -> None:
    q, k, v = draw(2 * MOST)
    with Largest() as largest:
        attention(q, k, v, empty(0), softcap=1.0)
    assert largest.elements == MOST * 2 * MOST * HEADS


@pytest.mark.parametrize("backend", ["sdpa", "torch"])
@pytest.mark.parametrize("window", [None, 7])
def test_where_positions_cannot_be_read_the_answers_are_the_same(
    backend: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU and a compiled graph attend to all slots of the ring, and hide those without a token."""
    q, k, v = draw(12, batch=2)
    state = empty(window or 12, batch=2)
    _, state = attention(*(t[:, :5] for t in (q, k, v)), state, window=window)
    ragged = state._replace(pos=torch.tensor([5, 3]))
    segment, token = [t[:, 5:11] for t in (q, k, v)], [t[:, 11] for t in (q, k, v)]
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=compiling: answer)
        with use(backend):
            y, after = attention(*segment, ragged, window=window)
            step = attention_step_(*token, after, window=window)
        results.append((y, step, *after))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["sdpa", "torch", "reference"])
def test_where_no_error_can_be_raised_a_lost_token_makes_nan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, k, v = draw(2, batch=3)
    state = empty(6, batch=3)._replace(pos=torch.tensor([5, 6, 0]))
    with use(backend):
        y, _ = attention(q, k, v, state)
        step = attention_step_(q[:, 0], k[:, 0], v[:, 0], state)
    assert [row.isnan().all().item() for row in y] == [False, True, False]
    assert [row.isnan().any().item() for row in y] == [False, True, False]
    assert [row.isnan().all().item() for row in step] == [False, True, False]


def test_packed_sequences_go_on_where_each_stood() -> None:
    q, k, v = draw(9)
    whole, _ = attention(q, k, v, empty(9))
    _, one = attention(*(t[:, :2] for t in (q, k, v)), empty(9))
    both = AttentionState(*(torch.cat(pair) for pair in zip(one, empty(9), strict=True)))
    again = [torch.cat([t[:, 2:], t[:, :4]], 1) for t in (q, k, v)]
    y, state = attention(*again, both, packing=Packing.of_lengths([7, 4]))
    torch.testing.assert_close(y, torch.cat([whole[:, 2:], whole[:, :4]], 1))
    assert state.pos.tolist() == [9, 4]
