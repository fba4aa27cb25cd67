"""The gate of `ssd_scan` and `trapezoid_scan`: what the laws, in one dtype each, cannot say of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from everstate.core.errors import BackendError
from everstate.ops import OPS, use
from everstate.ops.example import EXAMPLES, Draw
from everstate.ops.trapezoid import lookahead

SCANS = ["ssd_scan", "trapezoid_scan"]


def arguments(name: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    example = EXAMPLES[name]["gate"](Draw(dtype=torch.float32, device=device), 2, 9, 2)
    return {**example.timed, **example.fixed, "state": example.state}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", SCANS)
def test_nothing_is_rounded_before_the_gate(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "CPU_BLOCK", 4)  # several blocks, of which each has its part of the gate
    given = arguments(name)
    lower = lambda t: t.bfloat16() if isinstance(t, Tensor) else t
    coarse = {key: lower(value) for key, value in given.items()}
    fine = {key: value.float() if isinstance(value, Tensor) else value for key, value in coarse.items()}
    z = fine.pop("z")
    with use(backend):
        got, expected = OPS[name](**coarse)[0], OPS[name](**fine)[0] * silu(z)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected.bfloat16())


@pytest.mark.parametrize("name", SCANS)
def test_a_gate_that_no_kernel_takes_is_refused(name: str, kernel_device: torch.device) -> None:
    given = arguments(name, kernel_device)
    given["z"] = given["z"].double()
    with use("triton"), pytest.raises(BackendError, match=f"{name} cannot run .* not float64"):
        OPS[name](**given)
    assert OPS[name](**given)[0].dtype == torch.float32
