"""One token of attention over blocks that rows share out, against the same tokens in rings of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import RequestError
from everstate.core.kernels import interpreting
from everstate.core.state import clone, tensors
from everstate.ops import AttentionState, Rope, attention_step_, use

BACKENDS = ["reference", "torch", "sdpa", "triton"]
SIZE, PAGES, HEADS, GROUPS, HEADDIM = 8, 3, 4, 2, 16
CAPACITY = SIZE * PAGES


def made(backend: str, kernel_device: torch.device, read: list[int]) -> tuple[AttentionState, AttentionState, Tensor]:
    """Rings that have read so many tokens; the same in blocks, in no order and with others between; and their pages."""
    device = kernel_device if backend == "triton" else torch.device("cpu")
    dtype = torch.float32 if backend == "triton" else torch.float64
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype).to(device)
    rows, pos = len(read), torch.tensor(read, device=device)
    rings = AttentionState(*(normal(rows, CAPACITY, GROUPS, HEADDIM) for _ in "kv"), pos)
    count = rows * PAGES + 3
    pages = torch.randperm(count, generator=generator)[: rows * PAGES].view(rows, PAGES).to(device)
    blocks = [
        normal(count, SIZE, GROUPS, HEADDIM).index_put((pages,), t.unflatten(1, (PAGES, SIZE))) for t in rings[:2]
    ]
    return rings, AttentionState(*blocks, pos.clone()), pages


def tokens(state: AttentionState, rows: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, n, HEADDIM, generator=generator).to(state.k) for n in (HEADS, GROUPS, GROUPS)]


def step(
    backend: str, state: AttentionState, now: list[Tensor], slots: Tensor | None = None, **settings: Any
) -> Tensor:
    with use(backend), interpreting(), torch.no_grad():
        return attention_step_(*now, state, slots, **settings)


@pytest.mark.parametrize("settings", [{}, {"window": CAPACITY}, {"window": 11, "scale": 0.3, "rope": Rope()}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_say_what_rings_say(backend: str, settings: dict[str, Any], kernel_device: torch.device) -> None:
    """Over steps that cross from block to block, and around the end of a ring."""
    read = [0, SIZE - 1, 13] if not settings else [CAPACITY - 1, 3, 2 * CAPACITY + 6]
    rings, blocks, pages = made(backend, kernel_device, read)
    before = clone(blocks)
    for seed in range(3):
        now = tokens(rings, len(read), seed)
        expected = step(backend, rings, now, **settings)
        torch.testing.assert_close(step(backend, blocks, now, pages=pages, **settings), expected, rtol=1e-5, atol=1e-6)
    assert blocks.pos.tolist() == rings.pos.tolist()
    for one, other, held in zip(blocks[:2], before[:2], rings[:2], strict=True):
        assert torch.equal(one[pages].flatten(1, 2), held)
        others = torch.ones(len(one), dtype=torch.bool, device=one.device).index_fill(0, pages.flatten(), False)
        assert torch.equal(one[others], other[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_found_by_their_slots_and_share_what_they_only_read(backend: str, kernel_device: torch.device) -> None:
    rings, blocks, pages = made(backend, kernel_device, [SIZE + 2, 5, SIZE + 4])
    # The first block of row 2 is that of row 0: an ingested text that both go on from.
    pages[2, 0] = pages[0, 0]
    rings.k[2, :SIZE], rings.v[2, :SIZE] = rings.k[0, :SIZE], rings.v[0, :SIZE]
    slots = torch.tensor([2, 0], device=pages.device)
    now = tokens(rings, 2, 1)
    expected = step(backend, rings, now, slots)
    got = step(backend, blocks, now, slots, pages=pages.to(torch.int32))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert blocks.pos.tolist() == [SIZE + 3, 5, SIZE + 5]
    assert torch.equal(blocks.k[pages[2]].flatten(0, 1), rings.k[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_no_token_needs_may_be_anything(backend: str, kernel_device: torch.device) -> None:
    """Blocks that a row has not come to, and those that its window has left."""
    rings, blocks, pages = made(backend, kernel_device, [3, 2 * SIZE + 4])
    now = tokens(rings, 2, 2)
    expected = step(backend, rings, now, window=6)
    pages[0, 1:], pages[1, 0] = -1, 10_000
    torch.testing.assert_close(step(backend, blocks, now, pages=pages, window=6), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", "sdpa"])
@pytest.mark.parametrize(("read", "page"), [(SIZE, 1), (SIZE + 3, 0)])
def test_a_block_that_is_not_there_is_refused(backend: str, read: int, page: int, kernel_device: torch.device) -> None:
    _, blocks, pages = made(backend, kernel_device, [1, read])
    pages[1, page] = -1
    before = clone(blocks)
    with pytest.raises(RequestError, match=f"page {page} of row 1 is block -1, and the state has 9"):
        step(backend, blocks, tokens(blocks, 2, 3), pages=pages)
    assert all(torch.equal(one, other) for one, other in zip(tensors(blocks), tensors(before), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("read", "page", "block"), [(SIZE, 1, -1), (SIZE + 3, 0, 10_000)])
def test_where_no_error_can_be_raised_its_row_is_nan(
    backend: str, read: int, page: int, block: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the block to write to is not there, no other is written."""
    _, blocks, pages = made(backend, kernel_device, [1, read])
    pages[1, page] = block
    before = clone(blocks)
    if backend != "triton":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y = step(backend, blocks, tokens(blocks, 2, 3), pages=pages)
    assert y[0].isfinite().all() and y[1].isnan().all()
    written = {tuple(place) for place in (blocks.k != before.k).any(-1).any(-1).nonzero().tolist()}
    own = {(int(pages[0, 0]), 1)}
    assert written == (own if page == 1 else own | {(int(pages[1, 1]), 3)})
