"""The Triton kernels of attention at sizes that the laws do not draw: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.core.state import clone, map_state, tensors
from everstate.ops import AttentionState, Rope, attention, attention_step_, use
from everstate.ops.attention import limits
from tests.ops.upstream import upstream_of


def draw(
    device: torch.device, batch: int, length: int, heads: int, groups: int, headdim: int, capacity: int,
    read: list[int], dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], AttentionState]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)
    timed = {name: normal(batch, length, n, headdim) for name, n in (("q", heads), ("k", groups), ("v", groups))}
    ring = [normal(len(read), capacity, groups, headdim) for _ in range(2)]
    return timed, AttentionState(*ring, torch.tensor(read, device=device))


def widen(timed: dict[str, Tensor], state: AttentionState) -> tuple[dict[str, Tensor], AttentionState]:
    exact = lambda t: t.double() if t.is_floating_point() else t.clone()
    return {name: t.double() for name, t in timed.items()}, map_state(exact, state)


def outputs_and_gradients(
    backend: str, timed: dict[str, Tensor], state: AttentionState, **settings: Any
) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in timed.items()}
    ring = [t.detach().clone().requires_grad_() for t in state[:2]]
    with use(backend):
        y, after = attention(**leaves, state=AttentionState(*ring, state.pos), **settings)
    made = [y, *after[:2]]
    upstream = upstream_of(made)
    gradients = torch.autograd.grad(made, [*leaves.values(), *ring], upstream)
    named = dict(zip([*leaves, "ring_k", "ring_v"], gradients, strict=True))
    return {"y": y, "after_k": after.k, "after_v": after.v, **named}


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def agree(timed: dict[str, Tensor], state: AttentionState, tolerance: float, **settings: Any) -> None:
    expected = outputs_and_gradients(REFERENCE, *widen(timed, state), **settings)
    for name, got in outputs_and_gradients("triton", timed, state, **settings).items():
        assert got.dtype == timed["q"].dtype
        assert error(got, expected[name]) <= tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("heads", "groups", "headdim", "settings"),
    [(4, 1, 128, {}), (2, 2, 64, {"window": 50}), (2, 1, 80, {"softcap": 3.0}), (2, 1, 256, {"window": 150})],
)
def test_sizes_of_real_layers(
    heads: int, groups: int, headdim: int, settings: dict[str, Any],
    dtype: torch.dtype, tolerance: float, kernel_device: torch.device,
) -> None:  # fmt: skip
    window = settings.get("window")
    timed, state = draw(kernel_device, 1, 200, heads, groups, headdim, window or 240, [window or 37], dtype)
    agree(timed, state, tolerance, **settings)


def test_packed_sequences_go_on_where_each_stood(kernel_device: torch.device) -> None:
    packing = Packing.of_lengths([1, 70, 150, 33])
    for capacity, read, window in ((0, [0] * 4, None), (200, [0, 3, 44, 150], None), (20, [0, 7, 44, 30], 20)):
        timed, state = draw(kernel_device, 1, packing.total, 4, 2, 32, capacity, read)
        if capacity:
            agree(timed, state, 1e-5, window=window, packing=packing)
        with use("triton"):
            y, after = attention(**timed, state=state, window=window, packing=packing)
        exact, expected = attention.reference(*widen(timed, state)[0].values(), state=state, window=window,
                                              packing=packing)  # fmt: skip
        assert error(y, exact) < 1e-5
        assert torch.equal(after.pos, expected.pos)


@pytest.mark.parametrize("settings", [{}, {"window": 40}, {"softcap": 4.0}])
def test_low_precision_loses_no_more_than_the_form_of_pytorch(
    settings: dict[str, Any], kernel_device: torch.device
) -> None:
    if kernel_device.type == "cpu":
        pytest.skip("the interpreter cuts numbers off to bfloat16 instead of rounding them")
    timed, state = draw(kernel_device, 1, 1000, 4, 2, 64, settings.get("window", 1020), [20], torch.bfloat16)
    exact = outputs_and_gradients(REFERENCE, *widen(timed, state), **settings)
    ours = outputs_and_gradients("triton", timed, state, **settings)
    # "torch", which alone has a soft cap, makes all of it in float32.
    theirs = outputs_and_gradients("torch" if "softcap" in settings else "sdpa", timed, state, **settings)
    allowed = 2.0 if "softcap" in settings else 1.2
    for name, expected in exact.items():
        assert error(ours[name], expected) <= allowed * error(theirs[name], expected) + 1e-6, name


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    timed, state = draw(kernel_device, 2, 140, 4, 1, 32, 160, [5, 12], torch.bfloat16)
    calls = 3 if kernel_device.type == "cuda" else 2
    first, *others = (outputs_and_gradients("triton", timed, state) for _ in range(calls))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_can_trace_it(kernel_device: torch.device) -> None:
    """The kernels alone: no compiler reads the checks of shapes that this session puts around the rest."""
    from everstate.ops.attention.triton import _attend

    timed, state = draw(kernel_device, 1, 40, 2, 1, 16, 64, [9])
    leaves = [t.requires_grad_() for t in (*timed.values(), *state[:2])]
    call = lambda *inputs: _attend(*inputs, state.pos, [], None, 0.25, None)[0]
    got, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), call(*leaves)
    assert torch.equal(got, expected)
    gradients = (torch.autograd.grad(y.sum(), leaves) for y in (got, expected))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


STEPS = [
    (4, 4, 64, {}), (8, 1, 128, {}), (6, 2, 96, {"softcap": 2.0}), (20, 1, 16, {"window": 90}),
    (6, 2, 96, {"rope": Rope()}), (4, 1, 64, {"rope": Rope(1e6, True, 48), "window": 90}),
    (3, 1, 20, {"rope": Rope(rotary_dim=6), "softcap": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("processors", [1, 30])
@pytest.mark.parametrize(("heads", "groups", "headdim", "settings"), STEPS)
def test_a_token_of_rows_at_any_position(
    heads: int, groups: int, headdim: int, settings: dict[str, Any], processors: int,
    dtype: torch.dtype, tolerance: float, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With one split per row and with several, of which some find nothing to read."""
    from everstate.ops.attention import triton_step as kernels

    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    monkeypatch.setattr(kernels, "SHORTEST", 32)
    window = settings.get("window")
    capacity = window or 300
    read = [0, 1, 31, 250, 299, 123] if window is None else [0, 1, 89, 90, 91, 1234]
    timed, state = draw(kernel_device, len(read), 1, heads, groups, headdim, capacity, read, dtype)
    now, exact = {name: t[:, 0] for name, t in timed.items()}, widen(timed, state)
    expected = attention_step_.reference(*(t[:, 0] for t in exact[0].values()), exact[1], **settings)
    pool = clone(state)
    with use("triton"), torch.no_grad():
        y = attention_step_(**now, state=pool, **settings)
    assert error(y, expected) < tolerance
    if "rope" in settings:  # the keys of the token are kept turned
        place = torch.arange(len(read)), torch.tensor(read) % capacity
        assert error(pool.k[place], exact[1].k[place]) < tolerance
        pool.k[place] = exact[1].k[place].to(dtype)
        exact[1].k[place] = pool.k[place].double()
    assert all(torch.equal(one.double(), other.double()) for one, other in zip(pool, exact[1], strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_turned_may_be_infinite(kernel_device: torch.device) -> None:
    timed, state = draw(kernel_device, 1, 1, 1, 1, 16, 8, [3])
    now = {name: t[:, 0] for name, t in timed.items()}
    now["k"][..., 9] = torch.inf
    with use("triton"), torch.no_grad():
        attention_step_(**now, state=state, rope=Rope(rotary_dim=8))
    assert (~state.k[0, 3, 0].isfinite()).nonzero().tolist() == [[9]] and state.k[0, 3, 0, 9] == torch.inf


def test_a_ring_is_read_early_where_nothing_else_may_have_written_what_says_where(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everstate.ops.attention import triton_step as kernels

    early, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args, **kwargs: (early.append(kwargs), launch(*args, **kwargs)))
    for rows, slots, pages in ((64, False, False), (65, False, False), (2, True, False), (2, False, True)):
        timed, state = draw(kernel_device, rows, 1, 1, 1, 16, 8, [3] * rows)
        table = torch.arange(rows, device=kernel_device)
        settings = {"slots": table if slots else None, "pages": table[:, None] if pages else None}
        with use("triton"), torch.no_grad():
            attention_step_(**{name: t[:, 0] for name, t in timed.items()}, state=state, **settings)
    assert [kwargs["EARLY"] for kwargs in early if "EARLY" in kwargs] == [True, False, False, False]


def test_rows_of_a_pool_are_stepped_where_they_lie(kernel_device: torch.device) -> None:
    timed, state = draw(kernel_device, 5, 1, 4, 2, 32, 50, [3, 0, 20, 49, 7])
    now, slots = {name: t[:3, 0] for name, t in timed.items()}, torch.tensor([4, 1, 2], device=kernel_device)
    pool, alone = clone(state), clone(state)
    with use("triton"), torch.no_grad():
        y = attention_step_(**now, state=pool, slots=slots)
        for i, slot in enumerate(slots.tolist()):
            one = attention_step_(
                *(t[i : i + 1] for t in now.values()), alone, torch.tensor([slot], device=kernel_device)
            )
            assert torch.equal(one[0], y[i])
    assert all(torch.equal(one, other) for one, other in zip(tensors(pool), tensors(alone), strict=True))
    assert torch.equal(pool.k[[0, 3]], state.k[[0, 3]])
    assert pool.pos.tolist() == [3, 1, 21, 49, 8]


def test_a_token_beyond_the_capacity_is_nan_and_no_wrong_answer(kernel_device: torch.device) -> None:
    timed, state = draw(kernel_device, 2, 1, 2, 1, 16, 40, [39, 40])
    with use("triton"), torch.no_grad():
        y = attention_step_(*(t[:, 0] for t in timed.values()), state)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_what_does_not_fit_is_refused(kernel_device: torch.device) -> None:
    timed, state = draw(kernel_device, 1, 3, 1, 1, 512, 8, [2])
    one, small = draw(kernel_device, 1, 3, 1, 1, 16, 8, [2])
    now = {name: t[:, 0] for name, t in one.items()}
    spread = small._replace(k=torch.stack([small.k, small.k], -1)[..., 0])
    with use("triton"):
        with pytest.raises(BackendError, match="heads of up to 256 numbers, not 512"):
            attention(**timed, state=state)
        with pytest.raises(BackendError, match="one dtype, not float32, bfloat16, float32"):
            attention(**{**one, "k": one["k"].bfloat16()}, state=small)
        with pytest.raises(BackendError, match="no slot to write the token to"):
            attention_step_(**now, state=small._replace(k=small.k[:, :0], v=small.v[:, :0]))
        with pytest.raises(BackendError, match="last dimension is dense"):
            attention_step_(**now, state=spread)
        for width in (7, 18):
            with pytest.raises(BackendError, match=f"turns an even number of a head's 16 numbers, not {width}"):
                attention_step_(**now, state=small, rope=Rope(rotary_dim=width))
            with pytest.raises(BackendError, match=f"turns an even number of a head's 16 numbers, not {width}"):
                attention(**one, state=small, window=4, rope=Rope(rotary_dim=width))
        with pytest.raises(BackendError, match="no gradient for a single token"):
            attention_step_(**{name: t.requires_grad_() for name, t in now.items()}, state=small)
    assert attention(**timed, state=state)[0].isfinite().all()


def test_what_torch_does_faster_is_left_to_it(kernel_device: torch.device) -> None:
    timed, state = draw(kernel_device, 1, 9, 2, 1, 16, 0, [0], torch.bfloat16)
    with use("triton"), pytest.raises(BackendError, match="slower than torch's own kernels"):
        attention(**timed, state=state)
    for lengths, backend in (
        ([limits.LONG, 2 * limits.LONG], "sdpa"),
        ([limits.LONG - 1], "triton"),
        ([1, limits.LONG], "triton"),
    ):
        packing = Packing.of_lengths(lengths)
        row = {name: t[:, :1].expand(1, packing.total, *t.shape[2:]) for name, t in timed.items()}
        verdicts = attention.explain(**row, state=state, packing=packing)
        assert next(name for name, verdict in verdicts.items() if verdict == "accepts") == backend
    with use("triton"):
        y, _ = attention(**timed, state=state, window=4)
        packed, _ = attention(**timed, state=state, packing=Packing.of_lengths([9]))
    assert error(packed, attention(**timed, state=state)[0].double()) < 2e-2
    assert error(y[:, :4], packed[:, :4].double()) < 2e-2


def test_a_gpu_with_little_shared_memory_is_refused(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too little for a segment may do for a token."""
    timed, state = draw(kernel_device, 1, 1, 1, 1, 64, 8, [2])
    monkeypatch.setattr(limits, "shared_memory", lambda device: 101_376)
    with use("triton"), torch.no_grad():
        with pytest.raises(BackendError, match="needs a GPU with 135,168 bytes .* this one has 101,376"):
            attention(**timed, state=state)
        assert attention_step_(*(t[:, 0] for t in timed.values()), state).isfinite().all()
        # Where products read registers, as much is enough for heads of up to 128 numbers.
        monkeypatch.setattr(limits, "capability", lambda device: (8, 9))
        assert attention(**timed, state=state)[0].isfinite().all()
        timed, state = draw(kernel_device, 1, 1, 1, 1, 160, 8, [2])
        with pytest.raises(BackendError, match="needs a GPU with 212,992 bytes .* for heads of 160, this one"):
            attention(**timed, state=state)


def test_a_cpu_is_refused() -> None:
    timed, state = draw(torch.device("cpu"), 1, 3, 1, 1, 16, 8, [2])
    with use("triton"), pytest.raises(BackendError, match="runs on a GPU, the input is on cpu"):
        attention(**timed, state=state)
