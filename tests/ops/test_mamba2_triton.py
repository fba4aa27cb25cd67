"""The kernels of a Mamba-2 layer between its projections at sizes of real layers: on a GPU, or in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.packing import Packing
from everstate.ops import Mamba2Layer, Mamba2State, mamba2_scan, use
from everstate.ops.mamba2 import composed
from tests.ops.upstream import upstream_of

Inputs = dict[str, Tensor]


def draw(
    device: torch.device, batch: int, length: int, heads: int, d_state: int, dtype: torch.dtype = torch.bfloat16,
    sequences: int | None = None, headdim: int = 64,
) -> Inputs:  # fmt: skip
    """A layer whose residual stream is 24 wide; what it projects is cut out of wider rows."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape, scale=1.0: torch.randn(shape, generator=generator) * scale
    channels, inner = heads * headdim + 2 * d_state, heads * headdim
    drawn = {
        "projected": normal(batch, length, inner + channels + heads).to(dtype),
        "conv": normal(sequences or batch, channels, 3),
        "ssm": normal(sequences or batch, heads, headdim, d_state, scale=0.3),
        "conv_weight": normal(channels, 4, scale=0.5).to(dtype),
        "conv_bias": normal(channels, scale=0.5).to(dtype),
        "dt_bias": torch.rand(heads, generator=generator) * 3 - 5,
        "A_log": torch.rand(heads, generator=generator),
        "D": normal(heads),
        "norm": normal(inner).to(dtype),
        "out_proj": normal(24, inner, scale=inner**-0.5).to(dtype),
    }
    return {name: value.to(device) for name, value in drawn.items()}


def outcome(scan: Callable[..., Any], backend: str, inputs: Inputs, packing: Packing | None, **settings: Any) -> Inputs:
    """Outputs, states, and the gradients of everything."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    given = dict(leaves)
    projected, state = given.pop("projected"), Mamba2State(given.pop("conv"), given.pop("ssm"))
    out_proj = given.pop("out_proj", None)
    with use(backend, "torch"):
        layer = Mamba2Layer(**{"conv_bias": None, **given}, **settings)
        y, after = scan(projected, state, layer=layer, out_proj=out_proj, packing=packing)
    outputs = (y, *after)
    upstream = upstream_of(outputs)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return {"y": y, "after conv": after.conv, "after ssm": after.ssm, **dict(zip(leaves, gradients, strict=True))}


def agree(inputs: Inputs, packing: Packing | None = None, **settings: Any) -> None:
    """Norms of errors against float64 are those that the kernels of the parts have, which have tests of their own.

    The gradient of A_log is two numbers, each what is left of large sums: equal errors are those of equal size.
    """
    floor = 3e-3 if inputs["projected"].dtype == torch.bfloat16 else 1e-5
    wide = {name: value.double() for name, value in inputs.items()}
    exact = outcome(composed.mamba2_scan, "torch", wide, packing, **settings)
    parts = outcome(composed.mamba2_scan, "triton", inputs, packing, **settings)
    for name, got in outcome(mamba2_scan, "triton", inputs, packing, **settings).items():
        assert got.dtype == parts[name].dtype, name
        error, least = ((t.double() - exact[name]).norm() / exact[name].norm() for t in (got, parts[name]))
        assert error <= 1.3 * least + floor, (name, error, least)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_lie_where_they_belong(dtype: torch.dtype, kernel_device: torch.device) -> None:
    agree(draw(kernel_device, 2, 70, 2, 16, dtype, headdim=16))


def test_on_hopper(hopper: torch.device) -> None:
    """There the gradients of x are written by the copy engine, into a part of the rows."""
    agree(draw(hopper, 2, 130, 2, 64))


def test_without_norm_and_bias(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 65, 2, 16, headdim=16)
    del inputs["norm"], inputs["conv_bias"]
    agree(inputs, dt_limit=(0.01, 0.1))


def test_packed_rows(kernel_device: torch.device) -> None:
    agree(draw(kernel_device, 1, 70, 2, 16, sequences=3, headdim=16), Packing.of_lengths([1, 66, 3]))


def test_what_is_projected_may_be_a_view(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 2, 9, 2, 16, torch.float32, headdim=16)
    wide = torch.cat([torch.full_like(inputs["projected"][..., :3], math.nan), inputs["projected"]], -1)
    given = {**inputs, "projected": wide[..., 3:]}
    layer = {name: given.pop(name) for name in ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm")}
    state = Mamba2State(given["conv"], given["ssm"])
    with use("triton"):
        got, _ = mamba2_scan(given["projected"], state, layer=Mamba2Layer(**layer))
        expected, _ = mamba2_scan(inputs["projected"], state, layer=Mamba2Layer(**layer))
    torch.testing.assert_close(got, expected)


def test_elapsed_times_are_left_to_the_parts(kernel_device: torch.device) -> None:
    inputs = draw(kernel_device, 1, 5, 2, 16, torch.float32, headdim=16)
    layer = Mamba2Layer(*(inputs[name] for name in ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm")))
    state = Mamba2State(inputs["conv"], inputs["ssm"])
    verdicts = mamba2_scan.explain(inputs["projected"], state, torch.ones(1, 5), layer=layer)
    assert "delta_t" in verdicts["triton"] and verdicts["torch"] == "accepts"


def test_what_out_proj_reads_is_not_kept(kernel_device: torch.device) -> None:
    """Of what is as long as the sequence, only the projected and the output of the scan are."""
    inputs = {name: value.requires_grad_() for name, value in draw(kernel_device, 1, 128, 2, 16, headdim=16).items()}
    layer = Mamba2Layer(*(inputs[name] for name in ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm")))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), use("triton"):
        mamba2_scan(
            inputs["projected"], Mamba2State(inputs["conv"], inputs["ssm"]), layer=layer, out_proj=inputs["out_proj"]
        )  # fmt: skip
    assert sorted(t.shape[2] for t in kept if t.shape[:2] == (1, 128)) == [32, 32 + 32 + 32 + 2]
