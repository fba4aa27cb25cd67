"""Steps of Mamba-2 whose entries wait for a place in the state: the definition, and the kernel, here or imitated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.core.state import clone, equal, gather, map_state, scatter_
from everstate.ops import Normed, mamba2_step_, use
from everstate.ops.ssd.pending import ENTRIES, SETTLED, Pending, nothing_pending, settle_, settled
from tests.ops.test_decode_triton import close, draws

STEPS, TURN = 2 * ENTRIES + 3, 5
SETTINGS = {
    "gate, norm": {"z", "D", "norm"},
    "elapsed time": {"z", "delta_t", "dt_limit"},
    "D of channels": {"D of channels"},
}


class Layer:
    """What a layer is made of, a pool of its states, and tokens for some rows of that."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype, settings: set[str] = frozenset(),
        *, heads: int = 4, headdim: int = 32, groups: int = 2, d_state: int = 64, rows: int = 3, all_rows: bool = False,
        uneven: bool = False,
    ) -> None:  # fmt: skip
        self.draw, narrow = draws(device, dtype), draws(device, torch.float32)
        self.sizes, self.groups, self.rows = (heads, headdim, d_state), groups, rows
        self.settings, self.uneven = settings, uneven
        spare = 0 if all_rows else 2
        self.pool = narrow(rows + spare, heads, headdim, d_state).to(state_dtype)
        self.slots = None if all_rows else torch.randperm(rows + spare, device=device)[:rows]
        self.A_log, self.dt_bias = (narrow(heads, 3) / 3 - 1)[:, 1], narrow(heads, 2)[:, 0]
        self.D, self.norm, self.time = narrow(heads, headdim), self.draw(heads * headdim), narrow(rows).abs()

    def token(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        heads, headdim, d_state = self.sizes
        # Parts of projections, whose rows lie further apart than the parts are long; z by itself, channels apart.
        widths = [heads * headdim, self.groups * d_state, self.groups * d_state, heads]
        x, B, C, dt = self.draw(self.rows, sum(widths)).split(widths, 1)
        if self.uneven:
            C = self.draw(self.rows, widths[2] + 3)[:, 3:]
        z = self.draw(headdim, self.rows, heads).movedim(0, 2)
        x, B, C = (
            part.unflatten(1, sizes)
            for part, sizes in ((x, (heads, headdim)), (B, (self.groups, d_state)), (C, (self.groups, d_state)))
        )
        given = {
            "z": {"z": z}, "D": {"D": self.D[:, 0]}, "D of channels": {"D": self.D}, "norm": {"norm": self.norm},
            "delta_t": {"delta_t": self.time}, "dt_limit": {"dt_limit": (0.1, 0.6)},
        }  # fmt: skip
        more = {key: value for name in self.settings for key, value in given[name].items()}
        return (x, dt, self.A_log, B, C), {"dt_bias": self.dt_bias, **more}

    def pending(self) -> Pending:
        return nothing_pending(self.pool, self.groups, self.norm.dtype, turn=TURN)


def exactly(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def compare(layer: Layer, backend: str, tolerance: float, state_tolerance: float) -> None:
    """Steps that defer against steps in float64 that do not: outputs, and states once they are settled."""
    here, there, pending = layer.pool.clone(), layer.pool.double(), layer.pending()
    if backend == REFERENCE:
        here, pending = here.double(), map_state(exactly, pending)
    begin = clone(pending)
    for count in range(STEPS):
        arguments, settings = layer.token()
        exact = tuple(map(exactly, arguments)), {key: exactly(value) for key, value in settings.items()}
        if backend == REFERENCE:
            arguments, settings = exact
        before, kept = here.clone(), clone(gather((pending.x, pending.B), layer.slots))
        with use(backend), torch.no_grad():
            got = mamba2_step_(*arguments, here, layer.slots, **settings, pending=pending)
        with use(REFERENCE):
            expected = mamba2_step_(*exact[0], there, layer.slots, **exact[1])
        if isinstance(got, Normed):
            got, expected = got.divided(), expected.x
        close(got, expected, tolerance)
        waiting = (TURN + count + 1) % ENTRIES
        assert (gather(pending.waiting, layer.slots) == waiting).all()
        # With the eighth token states are written, with others only the entry that came.
        assert torch.equal(here, before) == (waiting > 0)
        for entries, new in zip(kept, (arguments[0], arguments[3]), strict=True):
            entries[:, waiting - 1] = new if waiting > 0 else entries[:, -1]
        assert equal(gather((pending.x, pending.B), layer.slots), kept)
    close(settled(here, pending), there, state_tolerance)
    if layer.slots is not None:
        others = torch.tensor([row for row in range(len(here)) if row not in layer.slots.tolist()], device=here.device)
        assert torch.equal(here[others].to(layer.pool.dtype), layer.pool[others])
        assert equal(gather(pending, others), gather(begin, others))
    settle_(here, pending)
    close(here, there, state_tolerance)
    assert pending.weight.any() == 0 and torch.equal(settled(here, pending), here.to(pending.decay.dtype))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("backend", "tolerance"), [("torch", 1e-5), (REFERENCE, 1e-12)])
def test_steps_that_defer_are_steps(backend: str, tolerance: float, settings: set[str]) -> None:
    layer = Layer(torch.device("cpu"), torch.float32, torch.float32, settings, headdim=6, d_state=5)
    compare(layer, backend, tolerance, tolerance)


def test_rounding_a_state_less_often_is_more_exact() -> None:
    """A state in bfloat16 takes in eight tokens in float32 and is rounded once."""
    layer = Layer(torch.device("cpu"), torch.float32, torch.bfloat16, all_rows=True)
    exact, each, deferred, pending = layer.pool.double(), layer.pool.clone(), layer.pool.clone(), layer.pending()
    for _ in range(8 * ENTRIES):
        arguments, settings = layer.token()
        with use("torch"), torch.no_grad():
            mamba2_step_(*arguments, each, **settings)
            mamba2_step_(*arguments, deferred, **settings, pending=pending)
        with use(REFERENCE):
            mamba2_step_(*map(exactly, arguments), exact, **{key: exactly(value) for key, value in settings.items()})
    settle_(deferred, pending)
    errors = [(state.double() - exact).norm() / exact.norm() for state in (deferred, each)]
    assert errors[0] < errors[1]


# Few settings: on a GPU each has to be compiled.
KERNELS = [
    (torch.bfloat16, torch.bfloat16, "gate, norm", {"headdim": 64, "groups": 1, "d_state": 128}),
    (torch.bfloat16, torch.float32, "elapsed time", {"headdim": 48, "d_state": 100}),
    (torch.float16, torch.float16, "D of channels", {"headdim": 10, "d_state": 20}),
    (torch.float16, torch.bfloat16, "gate, norm", {"headdim": 64, "groups": 4, "d_state": 256, "all_rows": True}),
    (torch.bfloat16, torch.float32, "gate, norm", {"headdim": 100, "d_state": 16, "uneven": True}),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "state_dtype", "settings", "sizes"), KERNELS)
def test_the_kernel(
    dtype: torch.dtype, state_dtype: torch.dtype, settings: str, sizes: dict[str, Any], hopper: torch.device
) -> None:
    layer = Layer(hopper, dtype, state_dtype, SETTINGS[settings], **sizes)
    compare(layer, "triton", 1e-2 if dtype is torch.bfloat16 else 3e-3, 1e-5 if state_dtype is torch.float32 else 6e-3)


def test_rows_that_are_alike_stay_alike(hopper: torch.device) -> None:
    """What a row gives does not depend on its place, though its state be rounded."""
    layer = Layer(hopper, torch.bfloat16, torch.bfloat16, {"z", "D"}, all_rows=True)
    state, pending = layer.pool[:1].repeat(3, 1, 1, 1), layer.pending()
    for _ in range(STEPS):
        arguments, settings = layer.token()
        alike = [t[:1].expand_as(t) if len(t) == 3 else t for t in arguments]
        settings["z"] = settings["z"][:1].expand_as(settings["z"])
        with use("triton"), torch.no_grad():
            y = mamba2_step_(*alike, state, **settings, pending=pending)
        assert torch.equal(y, y[:1].expand_as(y))
    assert torch.equal(state, state[:1].expand_as(state))


def test_rows_take_what_waits_for_them_along(hopper: torch.device) -> None:
    layer = Layer(hopper, torch.bfloat16, torch.bfloat16, {"z"}, all_rows=True)
    tokens = [layer.token() for _ in range(STEPS)]
    order = torch.tensor([2, 0, 1], device=hopper)
    plain, moved = (layer.pool.clone(), layer.pending()), (layer.pool.clone(), layer.pending())
    for count, (arguments, settings) in enumerate(tokens):
        with use("triton"), torch.no_grad():
            mamba2_step_(*arguments, plain[0], **settings, pending=plain[1])
            slots = None if count < 5 else torch.argsort(order)
            mamba2_step_(*arguments, moved[0], slots, **settings, pending=moved[1])
        if count == 4:
            scatter_(moved, None, gather(moved, order))
    assert torch.equal(settled(*plain), settled(*gather(moved, torch.argsort(order))))


def test_many_rows_are_settled() -> None:
    """In blocks."""
    layer = Layer(torch.device("cpu"), torch.float32, torch.bfloat16, rows=SETTLED + 3, all_rows=True)
    state, pending = layer.pool.clone(), layer.pending()
    arguments, settings = layer.token()
    with torch.no_grad():
        mamba2_step_(*arguments, state, **settings, pending=pending)
        expected = settled(state, pending).bfloat16()
        settle_(state, pending)
    assert torch.equal(state, expected) and not torch.equal(state, layer.pool)


def test_the_kernel_says_what_it_gives(hopper: torch.device) -> None:
    """Compilers ask it for shapes without running it."""
    kernels = pytest.importorskip("everstate.ops.ssd.triton_step")
    for settings in (set(), {"norm", "z"}):
        layer = Layer(hopper, torch.bfloat16, torch.float32, settings, headdim=100, d_state=16)
        (x, dt, A_log, B, C), more = layer.token()
        given = (*(more.get(name) for name in ("dt_bias", "D", "z")), 0.0, 1.0, None, more.get("norm"))
        arguments = (x, dt, A_log, B, C, layer.pool, layer.slots, *layer.pending(), *given)
        torch.library.opcheck(
            kernels._mamba2_step_pending._op, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(
    ("dtype", "sizes", "change", "why"),
    [
        (torch.float32, {}, None, "Hopper GPUs, of 16-bit numbers"),
        (torch.bfloat16, {"d_state": 260}, None, "up to 256 numbers per channel, not 260"),
        (torch.bfloat16, {}, lambda p: p._replace(x=p.x.transpose(2, 3).contiguous().transpose(2, 3)), "in one piece"),
        (torch.bfloat16, {}, lambda p: p._replace(B=p.B.half()), "in the dtype of x, torch.bfloat16"),
        (torch.bfloat16, {}, lambda p: p._replace(weight=p.weight.double()), "not float64"),
        (torch.bfloat16, {}, lambda p: p._replace(x=p.x[:, 1:]), "as `nothing_pending` makes them"),
    ],
)  # fmt: skip
def test_refusals(dtype: torch.dtype, sizes: dict[str, int], change: Any, why: str, hopper: torch.device) -> None:
    layer = Layer(hopper, dtype, torch.float32, **sizes)
    (arguments, settings), pending = layer.token(), layer.pending()
    with use("triton"), torch.no_grad(), pytest.raises(BackendError, match=why):
        mamba2_step_(*arguments, layer.pool, layer.slots, **settings, pending=change(pending) if change else pending)


def test_no_rows(hopper: torch.device) -> None:
    layer = Layer(hopper, torch.bfloat16, torch.float32, rows=0, all_rows=True)
    arguments, settings = layer.token()
    with use("triton"), torch.no_grad():
        assert mamba2_step_(*arguments, layer.pool, **settings, pending=layer.pending()).shape == (0, 4, 32)
