"""Experts of a few tokens with a residual stream and its norm behind them: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.ops import Normed, experts_add_rms_norm, use
from everstate.ops.linear import limits
from tests.ops.reference import exact, undivided

SIZES = [(1, 96, 40, 6, 2), (3, 130, 24, 5, 4), (16, 64, 32, 40, 2)]
"""Tokens, width, hidden width, experts, and how many of these a token goes through."""


def draw(
    device: torch.device, dtype: torch.dtype, tokens: int, d_model: int, d_hidden: int, count: int, top_k: int,
    gated: bool = True, d_shared: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)
    drawn = {
        "x": normal(tokens, d_model),
        "weights": torch.rand(tokens, top_k, generator=generator).to(device),
        "indices": torch.stack([torch.randperm(count, generator=generator)[:top_k] for _ in range(tokens)]).to(device),
        "w_in": normal(count, (1 + gated) * d_hidden, d_model) * d_model**-0.5,
        "w_out": normal(count, d_model, d_hidden) * d_hidden**-0.5,
        "residual": normal(tokens, d_model).float(),
        "norm": normal(d_model),
    }
    if d_shared is not None:
        ins, outs = normal((1 + gated) * d_shared, d_model), normal(d_model, d_shared)
        drawn["shared"] = ins * d_model**-0.5, outs * d_shared**-0.5
    return drawn


def close(got: tuple[Tensor, Normed], expected: tuple[Tensor, Normed], tolerance: float) -> None:
    for one, other in ((got[0], expected[0]), (got[1].divided(), expected[1].x)):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("d_shared", [None, 24, 136])
@pytest.mark.parametrize("sizes", SIZES)
def test_agrees_with_the_definition(
    sizes: tuple[int, ...], d_shared: int | None, backend: str, dtype: torch.dtype, tolerance: float,
    kernel_device: torch.device,
) -> None:  # fmt: skip
    for activation, gated, parts in (("silu", True, None), ("relu2", False, 3)):
        given = draw(kernel_device, dtype, *sizes, gated=gated, d_shared=d_shared)
        settings = {"activation": activation, "gated": gated, "eps": 1e-3, "multiplier": 0.4}
        if parts is not None:
            given["x"] = undivided(given["x"], parts)
        with use(backend), torch.no_grad():
            got = experts_add_rms_norm(**given, **settings)
        assert (got[0].dtype, got[1].x.dtype) == (torch.float32, dtype)
        close(got, exact(experts_add_rms_norm, **given, **settings), tolerance)


def test_a_norm_is_left_where_the_next_linear_map_divides(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    given = draw(kernel_device, torch.bfloat16, 2, 128, 32, 4, 2, d_shared=16)
    for held in (limits.SQUARES, 2):
        monkeypatch.setattr(limits, "SQUARES", held)
        with use("triton"), torch.no_grad():
            got = experts_add_rms_norm(**given)
        assert (got[1].squares is None) == (held == 2)
        close(got, exact(experts_add_rms_norm, **given), 1e-2)


def test_arguments_that_lie_otherwise_in_memory(kernel_device: torch.device) -> None:
    given = draw(kernel_device, torch.float32, 3, 96, 40, 6, 2, d_shared=24)
    across = lambda t: t.T.contiguous().T
    for name in ("x", "weights", "indices", "residual"):
        with use("triton"), torch.no_grad():
            got = experts_add_rms_norm(**{**given, name: across(given[name])})
        close(got, exact(experts_add_rms_norm, **given), 1e-5)
    part = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).to(kernel_device)[:, 5:101]
    with use("triton"), torch.no_grad():
        got = experts_add_rms_norm(**{**given, "x": part})
    close(got, exact(experts_add_rms_norm, **{**given, "x": part}), 1e-5)


def test_kernels_say_what_they_give(kernel_device: torch.device) -> None:
    """Compilers ask them for shapes without running them."""
    kernels = import_module("everstate.ops.experts.triton_few")
    for d_shared in (None, 16):
        given = draw(kernel_device, torch.float32, 2, 72, 32, 4, 2, d_shared=d_shared)
        x, *chosen = (given[name] for name in ("x", "weights", "indices", "w_in", "w_out"))
        shared = given.get("shared", (None, None))
        for residual, norm in ((None, None), (given["residual"], given["norm"])):
            arguments = x, None, 0.0, *chosen, *shared, "silu", True, residual, norm, 0.5
            torch.library.opcheck(kernels._few._op, arguments, test_utils="test_faketensor")


def test_refusals(kernel_device: torch.device) -> None:
    many = draw(kernel_device, torch.float32, 17, 32, 32, 4, 2)
    other = draw(kernel_device, torch.float32, 2, 32, 32, 4, 2)
    scattered = {**other, "w_out": other["w_out"].mT.contiguous().mT}
    half = {**other, "shared": (torch.ones(8, 32).half().to(kernel_device), torch.ones(32, 4).half().to(kernel_device))}
    norm = {**other, "norm": torch.ones(64).to(kernel_device)[::2]}
    squares = {**other, "x": Normed(other["x"], torch.ones(2, 6).to(kernel_device)[:, ::2], 1e-5)}
    odd = {**other, "shared": (torch.ones(48, 32).to(kernel_device), torch.ones(32, 16).to(kernel_device))}
    broad = {**other, "residual": other["residual"][:1]}
    learning = {**other, "x": other["x"].clone().requires_grad_()}
    for given, why in (
        (many, r"takes 1 to 32 rows \(a token and one of its experts\)"), (scattered, "row by row in memory"),
        (half, "weights of the dtype of x"), (learning, "no gradient for a single token"),
        (odd, "a shared expert of its width"), (broad, "a residual stream of the shape of x"),
        (norm, "in one piece of memory"), (squares, "in one piece of memory"),
    ):  # fmt: skip
        with use("triton"), pytest.raises(BackendError, match=why):
            experts_add_rms_norm(**given)
