"""Packing: where sequences lie in a row, and that laying out and taking back lose nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstate.core.errors import RequestError
from everstate.core.packing import Packing, first_tokens

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_pad_and_unpad_are_inverse(lengths: list[int]) -> None:
    packing = Packing.of_lengths(lengths)
    row = torch.arange(1, packing.total * 2 + 1).view(1, packing.total, 2)
    padded = packing.pad(row, fill=-1.0)
    assert padded.shape == (len(lengths), max(lengths), 2)
    assert int((padded == -1).sum()) == 2 * (len(lengths) * max(lengths) - packing.total)
    assert torch.equal(packing.unpad(padded), row)


def test_indices() -> None:
    packing = Packing(torch.tensor([0, 2, 3, 6]))
    assert packing.lengths == (2, 1, 3)
    assert packing.starts(CPU).tolist() == [0, 2, 3]
    assert packing.ends(CPU).tolist() == [1, 2, 5]
    assert packing.sequence_ids(CPU).tolist() == [0, 0, 1, 2, 2, 2]
    assert packing.positions(CPU).tolist() == [0, 1, 0, 0, 1, 2]
    assert first_tokens(1, 6, packing, CPU).tolist() == [[True, False, True, True, False, False]]
    assert first_tokens(2, 3, None, CPU).tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("cu_seqlens", [[0], [1, 2], [0, 3, 3], [0, 3, 2], []])
def test_impossible_packings_are_refused(cu_seqlens: list[int]) -> None:
    with pytest.raises(RequestError, match="no empty sequence"):
        Packing(cu_seqlens)


def test_a_packing_that_does_not_fit_is_refused() -> None:
    packing = Packing.of_lengths([2, 3])
    packing.check(1, 5, 2)
    with pytest.raises(RequestError, match="one row of 5 tokens.*1 x 6"):
        packing.check(1, 6)
    with pytest.raises(RequestError, match=r"3 rows.*init_state\(2\)"):
        packing.check(1, 5, 3)
