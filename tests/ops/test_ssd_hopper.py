"""The kernels of `ssd_scan` for Hopper GPUs: on one, or imitated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.ops import ssd_scan, use
from tests.ops.test_ssd_triton import draw, outputs_and_gradients


def served(inputs: dict[str, Tensor], packing: Packing | None = None) -> Any:
    """The call, after asking that the kernels for Hopper take it."""
    from everstate.ops.ssd import triton as kernels

    names = ("x", "B", "C", "diagonal", "D")
    call = kernels.Call(*(inputs.get(name) for name in names), [] if packing is None else list(packing.cu_seqlens))
    assert call.hopper is not None
    return call


def agree(inputs: dict[str, Tensor], **settings: Any) -> None:
    expected = outputs_and_gradients(REFERENCE, {name: value.double() for name, value in inputs.items()}, **settings)
    plain = outputs_and_gradients("torch", inputs, **settings)
    for name, got in outputs_and_gradients("triton", inputs, **settings).items():
        assert got.dtype == plain[name].dtype
        error, least = ((t.double() - expected[name]).norm() / expected[name].norm() for t in (got, plain[name]))
        # Upstream gradients are rounded, so that the plain form has its part of these errors.
        assert error <= 1.6 * least + 3e-3, (name, error, least)


# Few settings in all of this file: on a GPU each has to be compiled.
@pytest.mark.parametrize(
    ("batch", "length", "groups", "d_state", "skip", "dtype"),
    [
        (1, 192, 1, 128, "heads", torch.bfloat16), (2, 130, 2, 64, "none", torch.float16),
        (3, 7, 1, 64, "channels", torch.bfloat16), (1, 1, 1, 64, "channels", torch.bfloat16),
    ],
)  # fmt: skip
def test_any_length(
    batch: int, length: int, groups: int, d_state: int, skip: str, dtype: torch.dtype, hopper: torch.device
) -> None:
    inputs = draw(hopper, batch, length, 4, 64, groups, d_state, dtype=dtype)
    if skip == "heads":
        inputs["D"] = inputs["D"][:, 0]  # a view that is not dense
    if skip == "none":
        del inputs["D"]
    served(inputs)
    agree(inputs)


def test_errors_of_gradients_are_those_of_rounding_them(hopper: torch.device) -> None:
    """In bfloat16 at most 1.2 times those of the PyTorch form, which computes in float32."""
    inputs = draw(hopper, 1, 512, 4, 64, 1, 128, dtype=torch.bfloat16)
    served(inputs)
    expected = outputs_and_gradients(REFERENCE, {name: value.double() for name, value in inputs.items()})
    ours, plain = (outputs_and_gradients(backend, inputs) for backend in ("triton", "torch"))
    for name in ("x", "B", "C"):
        error, least = ((t[name].double() - expected[name]).norm() for t in (ours, plain))
        assert error <= 1.2 * least, (name, error / expected[name].norm(), least / expected[name].norm())


@pytest.mark.parametrize("programs", [2, 8])
def test_segments_and_parts_of_the_heads(programs: int, hopper: torch.device, fill: Callable[[int], None]) -> None:
    fill(programs)
    inputs = draw(hopper, 1, 300, 4, 64, 1, 64, dtype=torch.bfloat16)
    call = served(inputs)
    assert len(call.plan.segments) == (1 if programs == 2 else 3)
    agree(inputs)


def test_packed_sequences_of_whole_chunks(hopper: torch.device, fill: Callable[[int], None]) -> None:
    fill(4)
    packing = Packing([0, 64, 256])
    inputs = draw(hopper, 1, 256, 4, 64, 1, 64, dtype=torch.bfloat16, sequences=2)
    served(inputs, packing)
    agree(inputs, packing=packing)


def test_others_are_left_to_the_other_kernels(hopper: torch.device) -> None:
    from everstate.ops.ssd import triton as kernels

    names = ("x", "B", "C", "diagonal", "D")
    sizes = {"heads": 2, "headdim": 64, "groups": 1, "d_state": 128}
    for changes in ({"headdim": 32}, {"d_state": 16}, {"groups": 2}, {"rank": 1}, {"dtype": torch.float32}):
        inputs = draw(hopper, 1, 64, **{"dtype": torch.bfloat16, **sizes, **changes})
        assert kernels.Call(*(inputs.get(name) for name in names), []).hopper is None
    inputs = draw(hopper, 1, 65, **sizes, dtype=torch.bfloat16)
    mixed = {**inputs, "C": inputs["C"].to(torch.float16)}
    assert kernels.Call(*(mixed.get(name) for name in names), []).hopper is None
    assert kernels.Call(*(inputs.get(name) for name in names), [0, 30, 65]).hopper is None


def test_sequences_do_not_meet(hopper: torch.device) -> None:
    inputs = draw(hopper, 2, 70, 4, 64, 1, 64, dtype=torch.bfloat16)
    served(inputs)
    before = outputs_and_gradients("triton", inputs)
    for name in ("x", "B", "C", "a", "s"):
        inputs[name][1] = torch.nan
    after = outputs_and_gradients("triton", inputs)
    for name in ("y", "final", "x", "a", "s", "B", "C", "state"):
        assert torch.equal(before[name][0], after[name][0]), name


def test_an_output_does_not_depend_on_what_comes_later(hopper: torch.device) -> None:
    inputs = draw(hopper, 1, 130, 4, 64, 1, 64, dtype=torch.bfloat16)
    with use("triton"):
        before, _ = ssd_scan(**inputs)
        for name in ("x", "B", "C", "a", "s"):
            inputs[name][:, 40:] *= 0.5
        after, _ = ssd_scan(**inputs)
    assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before, after)


def test_the_same_call_gives_the_same_bits(hopper: torch.device) -> None:
    inputs = draw(hopper, 2, 130, 4, 64, 1, 64, dtype=torch.bfloat16)
    first, *others = (outputs_and_gradients("triton", inputs) for _ in range(2 if hopper.type == "cpu" else 20))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_wait_for_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import imitation

    monkeypatch.setattr(imitation, "PATIENCE", 0.01)
    barrier = imitation.Barrier()
    barrier.init(2)
    barrier.wait(1)
    barrier.meet(1, 0)
    with pytest.raises(AssertionError, match="deadlock"):
        barrier.wait(0)
