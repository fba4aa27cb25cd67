"""Laws of the kernels that only a GPU can break: real sizes, many programs at once.

The laws of all ops (`tests/laws/test_ops.py`) run on a GPU too, at sizes of which one program makes most.
"""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.bench.examples import cut, lower
from everstate.bench.kernels import norm_error
from everstate.bench.shapes import SHAPES
from everstate.core.op import REFERENCE
from everstate.core.state import map_state, tensors
from everstate.ops import OPS, use
from everstate.ops.example import Draw, Example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
D_INNER, LENGTH, BATCH = 1024, 2048, 4
DTYPES = [torch.bfloat16, torch.float32]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def rows(name: str, width: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the ops that look at one token at a time."""
    if name == "glu":
        return {"h": normal(length, 2 * width, dtype=dtype)}
    if name == "gated":
        return {part: normal(length, width, dtype=dtype) for part in "yz"}
    x = normal(length, width, dtype=dtype)
    weight = normal(width, dtype=dtype)
    if name == "add_rms_norm":
        return {"x": x.float(), "y": normal(length, width, dtype=dtype), "weight": weight}
    return {"x": x, "weight": weight} | ({"z": normal(length, width, dtype=dtype)} if name == "gated_rms_norm" else {})


SCANS = [name for name in SHAPES if name != "gated_rms_norm"]
ROWS = ["rms_norm", "gated_rms_norm", "add_rms_norm", "glu", "gated"]


def scan(name: str, batch: int, length: int, dtype: torch.dtype, d_inner: int = D_INNER) -> Example:
    example = SHAPES[name](Draw(dtype=torch.float32, device="cuda"), d_inner, batch * length)
    return cut(lower(example) if dtype == torch.bfloat16 else example, batch)


def arguments(name: str, dtype: torch.dtype, batch: int = BATCH, length: int = LENGTH) -> dict[str, Any]:
    """What one layer of a real model gives to the op; skips where no kernel takes it."""
    if name in ROWS:
        given = rows(name, D_INNER, batch * length, dtype)
    else:
        example = scan(name, batch, length, dtype)
        given = {**example.timed, **example.fixed, "state": example.state}
    if (verdict := OPS[name].explain(**given).get("triton")) != "accepts":
        pytest.skip(f"no kernel: {verdict}")
    return given


def call(name: str, given: dict[str, Any], backend: str = "triton") -> list[Tensor]:
    with use(backend):
        return tensors(result) if isinstance(result := OPS[name](**given), tuple) else [result]


def outcome(name: str, given: dict[str, Any], backend: str = "triton") -> list[Tensor]:
    """Outputs, and gradients of a fixed projection of them for all arguments that are numbers."""
    leaf = lambda t: t.detach().clone().requires_grad_(t.is_floating_point())
    fresh = {k: map_state(leaf, v) if isinstance(v, Tensor | tuple) else v for k, v in given.items()}
    outputs = call(name, fresh, backend)
    leaves = [t for v in fresh.values() if isinstance(v, Tensor | tuple) for t in tensors(v) if t.requires_grad]
    generator = torch.Generator(device="cuda").manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, device="cuda").bfloat16().to(t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)]


def widened(given: dict[str, Any]) -> dict[str, Any]:
    wide = lambda t: t.double() if t.is_floating_point() else t
    return {k: map_state(wide, v) if isinstance(v, Tensor | tuple) else v for k, v in given.items()}


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SCANS, *ROWS])
def test_many_programs_agree_with_few_numbers_in_float64(name: str, dtype: torch.dtype) -> None:
    """Several sequences, of a length that no tile divides."""
    given = arguments(name, dtype, batch=3, length=453)
    expected = outcome(name, widened(given), "torch")
    for got, want in zip(outcome(name, given), expected, strict=True):
        assert norm_error(got, want) <= (2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ssd_scan", "trapezoid_scan"])
def test_a_scan_with_a_gate(name: str, dtype: torch.dtype) -> None:
    """Again and again, so that its launches are known."""
    given = arguments(name, dtype, batch=3, length=453)
    given["z"] = torch.randn_like(call(name, given)[0])
    expected = outcome(name, widened(given), "torch")
    first, *others = (outcome(name, given) for _ in range(4))
    assert all(equal(first, other) for other in others)
    for got, want in zip(first, expected, strict=True):
        assert norm_error(got, want) <= (2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCANS)
def test_one_token_of_one_sequence(name: str, dtype: torch.dtype) -> None:
    given = arguments(name, dtype, batch=1, length=1)
    expected = outcome(name, widened(given), REFERENCE)
    for got, want in zip(outcome(name, given), expected, strict=True):
        assert norm_error(got, want) <= (2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("name", [*SCANS, *ROWS])
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    given = arguments(name, torch.bfloat16)
    first = call(name, given)
    assert all(equal(first, call(name, given)) for _ in range(20))
    both = outcome(name, given)
    assert all(equal(both, outcome(name, given)) for _ in range(3))


@pytest.mark.parametrize("name", [*SCANS, *ROWS])
def test_a_call_whose_launches_are_known_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from everstate.ops import triton_replay

    given = arguments(name, torch.bfloat16, length=453)
    rolled = lambda t, by: t.roll(by, -1) if t.is_floating_point() else t
    for by in range(4):
        other = {
            k: map_state(partial(rolled, by=by), v) if isinstance(v, Tensor | tuple) else v for k, v in given.items()
        }
        got = outcome(name, other)
        with monkeypatch.context() as patched:
            patched.setattr(triton_replay, "launches_are_known", lambda: False)
            assert equal(got, outcome(name, other))


@pytest.mark.parametrize("name", SCANS)
def test_no_output_sees_what_comes_later(name: str) -> None:
    given, timed = arguments(name, torch.bfloat16), scan(name, 1, 1, torch.bfloat16).timed
    before = call(name, given)[0]
    for at in (1, 63, 64, 777, LENGTH - 1):
        later = {key: torch.cat([given[key][:, :at], given[key][:, at:].flip(0)], 1) for key in timed}
        after = call(name, {**given, **later})[0]
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.equal(before[:, at:], after[:, at:])


@pytest.mark.parametrize("name", [*SCANS, *ROWS])
def test_no_memory_is_read_before_it_is_written(name: str, poisoned_empty: None) -> None:
    given = arguments(name, torch.bfloat16, length=301)
    poisoned = outcome(name, given)
    torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in poisoned)
    assert equal(poisoned, outcome(name, given))


def _allocated() -> int:
    """Bytes of tensors, a moment later: the thread of a backward pass may let go of its last ones after it is done."""
    time.sleep(0.02)
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("name", [*SCANS, *ROWS])
def test_repeated_calls_hold_no_memory(name: str) -> None:
    given = arguments(name, torch.bfloat16, length=500)
    held = []
    for _ in range(12):
        outcome(name, given)
        gc.collect()
        held.append(min(_allocated() for _ in range(5)))
    # Less is no leak: tables that earlier tests made leave the caches of plans meanwhile.
    assert held[-1] <= held[2]


@pytest.mark.parametrize(
    ("headdim", "d_state", "groups", "dtype"),
    [
        (32, 16, 1, torch.float32), (32, 256, 2, torch.bfloat16), (64, 64, 8, torch.bfloat16),
        (64, 128, 4, torch.float32), (64, 256, 1, torch.bfloat16), (96, 128, 1, torch.bfloat16),
        (128, 128, 2, torch.bfloat16), (128, 16, 1, torch.float32), (128, 64, 8, torch.float16),
    ],
)  # fmt: skip
def test_sizes_of_heads_and_states(headdim: int, d_state: int, groups: int, dtype: torch.dtype) -> None:
    given = ssd(2, 333, 8, headdim, d_state, groups, dtype)
    expected = outcome("ssd_scan", widened(given), "torch")
    for got, want in zip(outcome("ssd_scan", given), expected, strict=True):
        assert norm_error(got, want) <= (1e-4 if dtype == torch.float32 else 2e-2)


def ssd(
    batch: int, length: int, heads: int, headdim: int, d_state: int, groups: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:  # fmt: skip
    scale = torch.rand(batch, length, heads, device="cuda") * 0.5 + 0.1
    return {
        "x": normal(batch, length, heads, headdim, dtype=dtype), "a": -scale, "s": scale,
        "B": normal(batch, length, groups, d_state, dtype=dtype) / d_state**0.5,
        "C": normal(batch, length, groups, d_state, dtype=dtype) / d_state**0.5,
        "state": normal(batch, heads, headdim, d_state, dtype=torch.float32), "D": normal(heads, dtype=torch.float32),
    }  # fmt: skip
