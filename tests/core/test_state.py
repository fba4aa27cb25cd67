"""The algebra of states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from everstate.core import state


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


class Nothing(NamedTuple):
    pass


def example(rows: int = 3) -> tuple[Pair, Nothing, tuple[Pair]]:
    pair = Pair(torch.arange(2.0 * rows).view(rows, 2), torch.arange(rows))
    return pair, Nothing(), (pair._replace(two=pair.two + 10),)


def test_names_sizes_and_rows() -> None:
    assert [name for name, _ in state.named_tensors(example())] == ["0.one", "0.two", "2.0.one", "2.0.two"]
    assert state.nbytes(example()) == 2 * (6 * 4 + 3 * 8)
    assert state.batch_size(example()) == 3
    assert state.batch_size(Nothing()) == 0


def test_map_keeps_the_types() -> None:
    mapped = state.map_state(lambda t: t + 1, example())
    assert [type(part) for part in mapped] == [Pair, Nothing, tuple]
    assert torch.equal(mapped[0].two, torch.tensor([1, 2, 3]))


def test_gather_then_scatter_changes_only_those_rows() -> None:
    pool, slots = example(), torch.tensor([2, 0])
    rows = state.map_state(lambda t: t + 100, state.gather(pool, slots))
    state.scatter_(pool, slots, rows)
    assert pool[0].two.tolist() == [100, 1, 102]
    assert pool[2][0].two.tolist() == [110, 11, 112]


def test_without_slots_the_pool_itself_is_meant() -> None:
    pool = example()
    assert state.gather(pool, None) is pool
    state.scatter_(pool, None, state.map_state(lambda t: t * 0, pool))
    assert all(not t.any() for t in state.tensors(pool))


def test_forks_share_nothing() -> None:
    original, fork = example(), state.clone(example())
    assert state.equal(original, fork)
    fork[0].one[0, 0] = -1
    assert not state.equal(original, fork)


def test_concat_and_repeat() -> None:
    assert state.concat([example(2), example(1)])[0].two.tolist() == [0, 1, 0]
    assert state.repeat(example(2), 2)[0].two.tolist() == [0, 0, 1, 1]


def test_equal_looks_at_names_shapes_and_bits() -> None:
    assert not state.equal((Pair(torch.ones(1), torch.ones(1)),), Pair(torch.ones(1), torch.ones(1)))
    assert not state.equal(Pair(torch.ones(1), torch.ones(1)), Pair(torch.ones(1), torch.ones(2)))


def test_detach_cuts_the_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    assert not state.detach(Pair(weight * 2, weight * 3)).one.requires_grad
