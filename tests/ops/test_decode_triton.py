"""The ops of one token in every implementation against their float64 references: on the GPU, or in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.kernels import overlapping
from everstate.ops import (
    Normed,
    add_rms_norm,
    argmax,
    causal_conv1d_step_,
    gated_rms_norm,
    glu,
    linear,
    linear_activate,
    linear_add_rms_norm,
    linear_conv_step_,
    mamba1_step_,
    mamba2_step_,
    rms_norm,
    use,
)
from everstate.ops.linear import limits
from tests.ops.reference import exact, undivided

BACKENDS = ["triton", "torch"]
LOW = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
ROWS = [1, 3]


def draws(device: torch.device, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


WEIGHTS = ["plain", "8 bits", "multiplied"]


def stored(weight: Tensor, how: str) -> tuple[Tensor, Tensor | None]:
    """Weights and the scale of their outputs, which belongs to 8 bits or is that of multipliers, in float32."""
    if how == "plain":
        return weight, None
    if how == "multiplied":
        return weight, torch.linspace(0.3, 2.0, len(weight), device=weight.device)
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def numbers(given: Any) -> list[Tensor]:
    """What an op gives."""
    return [t.divided() if isinstance(t, Normed) else t for t in (given if type(given) is tuple else (given,))]


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Norm of the difference, relative."""
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize(("dtype", "tolerance"), LOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(
    rows: int, backend: str, dtype: torch.dtype, tolerance: float, how: str, kernel_device: torch.device
) -> None:
    draw = draws(kernel_device, dtype)
    for width, outputs in ((136, 70), (1100, 9)):
        x, weight, bias = draw(rows, width), draw(outputs, width), draw(outputs)
        weight, scale = stored(weight, how)
        bias = bias if scale is None else bias.float()
        for u, bias_ in ((x, None), (x, bias), (undivided(x, 3, 0.5), None), (undivided(x, 8), bias)):
            with use(backend):
                got = linear(u, weight, bias_, scale=scale)
            assert got.dtype is dtype
            close(got, exact(linear, u, weight, bias_, scale=scale), tolerance)


@pytest.mark.parametrize("how", WEIGHTS)
def test_a_row_longer_than_a_program_holds(
    how: str, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    kernels = pytest.importorskip("everstate.ops.linear.triton")
    draw = draws(kernel_device, torch.bfloat16)
    x, weight = draw(2, 2600), draw(9, 2600)
    weight, scale = stored(weight, how)
    whole = kernels._sizes(weight)[0]["AHEAD"]
    monkeypatch.setattr(kernels, "MOST", 1024)
    assert kernels._sizes(weight)[0]["AHEAD"] < whole
    for u in (x, undivided(x, 5)):
        with use("triton"):
            got = linear(u, weight, scale=scale)
        close(got, exact(linear, u, weight, scale=scale), 2e-2)


@pytest.fixture(params=[1, 2], ids=["whole sums", "split sums"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Among how many programs a sum over K is split."""
    tiles = pytest.importorskip("everstate.ops.linear.triton_tiles")
    monkeypatch.setattr(tiles, "splits_of", lambda *sizes: request.param)
    return int(request.param)


@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize(("rows", "outputs"), [(5, 70), (16, 130), (17, 70), (40, 70), (64, 70)])
def test_linear_of_many_rows(rows: int, outputs: int, splits: int, how: str, kernel_device: torch.device) -> None:
    for dtype, tolerance in LOW[1:]:
        draw = draws(kernel_device, dtype)
        x, weight, bias = draw(rows, 512), draw(outputs, 512), draw(outputs)
        weight, scale = stored(weight, how)
        for u, bias_ in ((x, None), (x, bias), (undivided(x, 7, 0.5), bias)):
            with use("triton"), overlapping():
                got = linear(u, weight, bias_, scale=scale)
                assert torch.equal(got, linear(u, weight, bias_, scale=scale))
            close(got, exact(linear, u, weight, bias_, scale=scale), tolerance)


@pytest.mark.parametrize(
    ("outputs", "width", "rows", "how", "sizes"),
    [
        (8512, 2048, 64, "plain", (64, 64, 64, 1, 6)),  # tiles of half the length
        (8512, 2048, 32, "plain", (64, 128, 32, 1, 4)),
        (2048, 4096, 64, "plain", (64, 128, 64, 4, 5)),  # fewer blocks than a quarter of the multiprocessors
        (2048, 4096, 16, "plain", (64, 256, 16, 4, 3)),  # and tiles of twice the length
        (2048, 4096, 16, "8 bits", (64, 256, 16, 4, 4)),
        (768, 1536, 16, "plain", (64, 128, 16, 1, 5)),  # a short sum
        (8512, 2048, 16, "8 bits", (32, 256, 16, 1, 5)),
        (8512, 2048, 64, "8 bits", (64, 128, 64, 1, 4)),
    ],
)
def test_tiles_of_an_h200(
    outputs: int, width: int, rows: int, how: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = pytest.importorskip("everstate.ops.linear.triton_tiles")
    monkeypatch.setattr(tiles, "processors", lambda device: 132)
    monkeypatch.setattr(tiles, "shared_memory", lambda device: 232_448)
    weight, _ = stored(torch.ones(outputs, width, dtype=torch.bfloat16), how)
    assert tiles._sizes(rows, weight) == sizes


@pytest.mark.parametrize("outputs", [1, 3, 80])
def test_few_outputs_are_shared_out_among_more_programs(
    outputs: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("everstate.ops.linear.triton")
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    draw, width = draws(kernel_device, torch.float32), 512
    x, weight, gates = draw(1, width), draw(outputs, width), draw(2 * outputs, width)
    assert kernels._sizes(weight)[0]["BLOCK_N"] == 2 < kernels._sizes(draw(1000, width))[0]["BLOCK_N"]
    stream, norm = draw(1, outputs), draw(outputs)
    with use("triton"):
        summed, normed = linear_add_rms_norm(x, weight, None, stream, norm)
        gated = linear_activate(x, gates, gated=True)
    for got, expected in zip(
        numbers((summed, normed)), numbers(exact(linear_add_rms_norm, x, weight, None, stream, norm)), strict=True
    ):
        close(got, expected, 1e-5)
    close(gated, exact(linear_activate, x, gates, gated=True), 1e-5)


def test_a_row_is_the_same_among_others(splits: int, kernel_device: torch.device) -> None:
    draw = draws(kernel_device, torch.bfloat16)
    x, weight = draw(9, 256), draw(50, 256)
    touched = x.clone()
    touched[1] = draw(256)
    # Rows that do not start on a multiple of 16 bytes, and a view whose rows lie apart.
    shifted = torch.cat([x.new_zeros(3), x.flatten()])[3:].view(9, 256)
    apart = torch.cat([x, x], 1)[:, :256]
    with use("triton"):
        before, after, *same = (linear(undivided(u, 4), weight) for u in (x, touched, shifted, apart))
    others = torch.arange(9, device=kernel_device) != 1
    assert torch.equal(before[others], after[others]) and not torch.equal(before[1], after[1])
    assert all(torch.equal(before, one) for one in same)


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [1, 2, 4, 11])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 72), (3, 72), (6, 256), (20, 256), (35, 256)])
def test_linear_with_a_convolution_behind_it(
    rows: int, width: int, backend: str, taps: int, pool_dtype: torch.dtype, splits: int, kernel_device: torch.device
) -> None:
    draw = draws(kernel_device, torch.bfloat16)
    outputs, start, channels = 90, 21, 50
    x, weight, bias = draw(rows, width), draw(outputs, width) / 8, draw(outputs)
    conv_weight, conv_bias, pool = draw(channels, taps), draw(channels), draw(rows + 2, channels, taps - 1)
    pool, slots = pool.to(pool_dtype), torch.arange(rows + 2, device=kernel_device).flip(0)[:rows]
    cases = (("plain", None, slots, "silu"), ("multiplied", bias, None, None), ("8 bits", None, slots, "silu"))
    by_tap = pool.transpose(1, 2).contiguous().transpose(1, 2)  # as pools on a GPU are
    for how, bias_, where, activation in cases:
        weight_, scale = stored(weight, how)
        here = by_tap.clone() if where is not None else pool[:rows].clone()
        there = here.double()
        u = undivided(x, 3) if how == "multiplied" else x
        with use(backend):
            got = linear_conv_step_(
                u, weight_, bias_, conv_weight, conv_bias, here, where, start=start, activation=activation, scale=scale
            )
        expected = exact(
            linear_conv_step_, u, weight_, bias_, conv_weight, conv_bias, there, where,
            start=start, activation=activation, scale=scale,
        )  # fmt: skip
        for one, other in zip(got, expected, strict=True):
            close(one, other, 1e-2)
        assert here.dtype is pool_dtype
        if taps > 1:
            close(here, there, 6e-3)
            assert where is None or torch.equal(here[:2], pool[:2])


@pytest.mark.parametrize(("dtype", "tolerance"), LOW)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_mamba2(
    backend: str, state_dtype: torch.dtype, dtype: torch.dtype, tolerance: float, kernel_device: torch.device
) -> None:
    draw, narrow = draws(kernel_device, dtype), draws(kernel_device, torch.float32)
    rows, heads, headdim, groups, d_state = 3, 4, 6, 2, 20
    x, z, dt = draw(rows, heads, headdim), draw(rows, heads, headdim), draw(rows, heads) * 4
    A_log, dt_bias, D = narrow(heads), narrow(heads) - 12, narrow(heads, headdim)
    B, C, pool = draw(rows, groups, d_state), draw(rows, groups, d_state), narrow(5, heads, headdim, d_state)
    pool, slots, delta_t = pool.to(state_dtype), torch.tensor([4, 0, 2], device=kernel_device), narrow(rows).abs()
    for settings in (
        {"z": z, "D": D}, {"D": D[:, 0]}, {"dt_limit": (0.01, 0.5), "delta_t": delta_t},
    ):  # fmt: skip
        here, there = pool.clone(), pool.double()
        with use(backend):
            got = mamba2_step_(x, dt, A_log, B, C, here, slots, dt_bias=dt_bias, **settings)
        expected = exact(mamba2_step_, x, dt, A_log, B, C, there, slots, dt_bias=dt_bias, **settings)
        assert got.dtype is dtype and here.dtype is state_dtype
        low = state_dtype is torch.bfloat16
        close(got, expected, max(tolerance, 6e-3 if low else 0))
        close(here, there, 6e-3 if low else 1e-5)
        assert torch.equal(here[[1, 3]], pool[[1, 3]])


ACTIVATED = {"relu2": False, "silu": True, "gelu": True, "gelu_tanh": True}
"""Activations, and whether a test has a gate for them."""


@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "tolerance"),
    [(1, 72, torch.float32, 1e-5), (3, 1100, torch.bfloat16, 2e-2), (6, 256, torch.bfloat16, 2e-2),
     (16, 2048, torch.float16, 2e-3), (20, 256, torch.bfloat16, 2e-2), (70, 128, torch.float32, 1e-5)],
)  # fmt: skip
def test_a_linear_map_with_an_activation(
    rows: int, width: int, dtype: torch.dtype, tolerance: float, backend: str, activation: Any, how: str, splits: int,
    kernel_device: torch.device,
) -> None:  # fmt: skip
    draw, gated = draws(kernel_device, dtype), ACTIVATED[activation]
    x, weight, bias = draw(rows, width), draw(140, width) / 8, draw(140)
    weight, scale = stored(weight, how)
    bias = bias if scale is None else bias.float()
    for u, bias_ in ((x, None), (undivided(x, 3, 0.5), bias)):
        arguments, settings = (u, weight, bias_), {"scale": scale, "activation": activation, "gated": gated}
        with use(backend):
            if backend == "triton" and rows > 64:
                with pytest.raises(BackendError, match="takes 1 to 64 rows, not 70"):
                    linear_activate(*arguments, **settings)
                continue
            got = linear_activate(*arguments, **settings)
        assert got.dtype is dtype and got.shape == (rows, 70 if gated else 140)
        close(got, exact(linear_activate, *arguments, **settings), tolerance)


def test_a_gate_of_few_rows_is_made_in_the_launch_of_its_product(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    kernels = pytest.importorskip("everstate.ops.linear.triton")
    seen: list[int] = []
    monkeypatch.setattr(kernels, "glu", lambda h, activation: seen.append(len(h)) or glu(h, activation))
    draw = draws(kernel_device, torch.bfloat16)
    for rows, width in ((1, 256), (4, 256), (6, 256), (40, 256), (1, 40_000)):  # of the last one row fills a program
        x, weight = draw(3, rows, width)[1], draw(136, width) / 8
        with use("triton"):
            got = linear_activate(x, weight, gated=True)
        close(got, exact(linear_activate, x, weight, gated=True), 2e-2)
    assert seen == [6, 40]


def test_undivided_rows_of_more_dimensions(kernel_device: torch.device) -> None:
    draw = draws(kernel_device, torch.float32)
    x, weight = undivided(draw(4, 72), 3), draw(40, 72)
    split = Normed(x.x.view(2, 2, 72), x.squares.view(2, 2, 3), x.eps)
    for op in (linear, linear_activate):
        with use("triton"):
            got = op(split, weight)
        assert got.shape == (2, 2, 40)
        close(got.flatten(0, 1), exact(op, x, weight), 1e-5)


def test_gates_for_as_many_outputs(kernel_device: torch.device) -> None:
    x, weight = torch.ones(2, 8, device=kernel_device), torch.ones(7, 8, device=kernel_device)
    with (
        use("triton"),
        pytest.raises(BackendError, match="as many gates as up projections, not 7 rows"),
    ):
        linear_activate(x, weight, gated=True)


@pytest.mark.parametrize(("dtype", "tolerance"), LOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 72), (4, 72), (6, 256), (20, 256), (35, 256)])
def test_a_residual_stream_takes_a_linear_map_in(
    rows: int, width: int, backend: str, dtype: torch.dtype, tolerance: float, splits: int, kernel_device: torch.device
) -> None:
    draw, narrow = draws(kernel_device, dtype), draws(kernel_device, torch.float32)
    x, weight, bias, residual, norm = draw(rows, width), draw(384, width) / 8, draw(384), narrow(rows, 384), draw(384)
    refused = backend == "triton" and rows > 4 and dtype is torch.float32
    for how, bias_, u, norm_, addend in (
        ("plain", None, x, norm, draw(rows, 384)), ("multiplied", bias, undivided(x, 3), norm.float(), None),
        ("8 bits", None, x, norm, draw(384, rows).T),
    ):  # fmt: skip
        weight_, scale = stored(weight, how)
        arguments = u, weight_, bias_, residual, norm_
        settings = {"scale": scale, "addend": addend, "eps": 1e-3, "multiplier": 0.4}
        with use(backend):
            if refused:
                with pytest.raises(BackendError, match="16 bits"):
                    linear_add_rms_norm(*arguments, **settings)
                continue
            summed, normed = linear_add_rms_norm(*arguments, **settings)
        assert (summed.dtype, normed.x.dtype) == (torch.float32, dtype)
        # Numbers of float16 might overflow before they are divided.
        assert (normed.squares is not None) == (backend == "triton" and dtype is not torch.float16)
        expected, (rows_of_norm, *_) = exact(linear_add_rms_norm, *arguments, **settings)
        close(summed, expected, tolerance)
        close(normed.divided(), rows_of_norm, tolerance)


@pytest.mark.parametrize(("rows", "outputs", "held"), [(1, 64, 64), (5, 200, 64), (1, 128, 4)])
def test_a_norm_is_left_where_the_next_linear_map_divides(
    rows: int, outputs: int, held: int, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    monkeypatch.setattr(limits, "SQUARES", held)
    draw = draws(kernel_device, torch.bfloat16)
    x, weight, residual, norm = draw(rows, 128), draw(outputs, 128), draw(rows, outputs).float(), draw(outputs)
    addend = draw(rows, outputs)
    with use("triton"):
        summed, normed = linear_add_rms_norm(x, weight, None, residual, norm, addend=addend)
    # Five rows of 200 numbers are for PyTorch's product; 128 come in more parts than a program holds.
    assert (normed.squares is not None) == (outputs == 64)
    expected, (rows_of_norm, *_) = exact(linear_add_rms_norm, x, weight, None, residual, norm, addend=addend)
    close(summed, expected, 2e-2)
    close(normed.divided(), rows_of_norm, 2e-2)


@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_of_wide_x(rows: int, how: str, splits: int, kernel_device: torch.device) -> None:
    kernels = pytest.importorskip("everstate.ops.linear.triton")
    draw = draws(kernel_device, torch.bfloat16)
    x, weight, residual, norm = draw(rows, 2048), draw(128, 2048) / 8, draw(rows, 128).float(), draw(128)
    weight, scale = stored(weight, how)
    assert kernels._one_by_one(x, weight) == (rows <= (2 if how == "8 bits" else 1))
    for u in (x, undivided(x, 5)):
        with use("triton"):
            got, (summed, normed) = (
                linear(u, weight, scale=scale),
                linear_add_rms_norm(u, weight, None, residual, norm, scale=scale),
            )
        close(got, exact(linear, u, weight, scale=scale), 2e-2)
        expected, (rows_of_norm, *_) = exact(linear_add_rms_norm, u, weight, None, residual, norm, scale=scale)
        assert normed.squares is not None and normed.squares.shape[1] == kernels._blocks(x, weight)
        close(summed, expected, 2e-2)
        close(normed.divided(), rows_of_norm, 2e-2)


def test_the_blocks_of_a_linear_map_are_those_of_its_kernel(
    splits: int, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    tiles = pytest.importorskip("everstate.ops.linear.triton_tiles")
    for how in WEIGHTS:
        for width in (128, 256, 512, 2048, 2176):
            weight, _ = stored(torch.ones(200, width, dtype=torch.bfloat16, device=kernel_device), how)
            for rows in (2, 5, 16, 17, 64):
                assert tiles.blocks_of_tiles(rows, weight) == -(-200 // tiles._sizes(rows, weight).n)


@pytest.mark.parametrize(("dtype", "tolerance"), LOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 2), (5, 1), (70, 1)])
def test_a_step_of_mamba2_with_its_norm(
    rows: int, groups: int, backend: str, dtype: torch.dtype, tolerance: float, kernel_device: torch.device
) -> None:
    draw, narrow = draws(kernel_device, dtype), draws(kernel_device, torch.float32)
    heads, headdim, d_state = 4, 32, 20
    x, z, dt, norm = *(draw(rows, heads, headdim) for _ in range(2)), draw(rows, heads), draw(heads * headdim)
    A_log, dt_bias, D = narrow(heads), narrow(heads), narrow(heads)
    B, C, pool = draw(rows, 1, d_state), draw(rows, 1, d_state), narrow(rows, heads, headdim, d_state)
    settings = {"dt_bias": dt_bias, "D": D, "z": z, "norm": norm, "eps": 1e-3, "norm_groups": groups}
    here, there = pool.clone(), pool.double()
    with use(backend):
        got = mamba2_step_(x, dt, A_log, B, C, here, **settings)
    expected = exact(mamba2_step_, x, dt, A_log, B, C, there, **settings)
    leaves = backend == "triton" and groups == 1 and dtype is not torch.float16 and rows <= 64
    assert (got.squares is not None) == (leaves and (rows <= 4 or dtype is torch.bfloat16))
    assert got.x.dtype is dtype
    close(got.divided(), expected.x, tolerance)
    close(here, there, 1e-5)


def test_kernels_of_a_step_say_what_they_give(kernel_device: torch.device) -> None:
    """Compilers ask them for shapes without running them."""
    linear_kernels = pytest.importorskip("everstate.ops.linear.triton")
    ssd_kernels = pytest.importorskip("everstate.ops.ssd.triton_step")
    draw = draws(kernel_device, torch.float32)
    few = draw(3, 72), None, 0.0, draw(40, 72), None, None
    many = (draw(6, 256).bfloat16(), None, 0.0, draw(80, 256).bfloat16(), None, None)
    for given, outputs in ((few, 40), (many, 80)):
        for activated in (("relu2", False), ("silu", given is few)):  # a gate of many rows is an op of its own
            torch.library.opcheck(
                linear_kernels._linear_activate._op, (*given, *activated), test_utils="test_faketensor"
            )
        for addend in (None, draw(len(given[0]), outputs)):
            residual = addend, draw(len(given[0]), outputs), draw(outputs), 0.5
            torch.library.opcheck(linear_kernels._linear_add._op, (*given, *residual), test_utils="test_faketensor")
    x, dt, A_log, B, pool = draw(2, 4, 6), draw(2, 4), draw(4), draw(2, 1, 20), draw(2, 4, 6, 20)
    step = x, dt, A_log, B, B, pool, None, draw(4), None, None, 0.0, 1.0, None
    for norm in (None, draw(24)):
        torch.library.opcheck(ssd_kernels._mamba2_step._op, (*step, norm), test_utils="test_faketensor")


@pytest.mark.parametrize(("dtype", "tolerance"), LOW)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_mamba1(
    backend: str, state_dtype: torch.dtype, dtype: torch.dtype, tolerance: float, kernel_device: torch.device
) -> None:
    draw, narrow = draws(kernel_device, dtype), draws(kernel_device, torch.float32)
    rows, channels, d_state = 3, 70, 12
    x, z, B, C = (draw(rows, n) for n in (channels, channels, d_state, d_state))
    A_log, dt_bias, D = narrow(channels, d_state), narrow(channels) - 2, narrow(channels)
    pool, delta_t = narrow(5, channels, d_state).to(state_dtype), narrow(rows).abs()
    slots = torch.tensor([4, 0, 2], device=kernel_device)
    low_rank = {"dt_weight": draw(channels, 9) / 3}
    eight_bits = {"dt_weight": (40 * draw(channels, 9)).to(torch.int8), "dt_scale": narrow(channels).abs() / 120}
    for settings, where in (
        ({"z": z, "D": D}, slots), ({"delta_t": delta_t}, slots), ({"z": z, "D": D}, None), (low_rank, None),
        (eight_bits, slots),
    ):  # fmt: skip
        dt = draw(rows, 9 if "dt_weight" in settings else channels)
        here = pool.clone() if where is not None else pool[:rows].clone()
        there = here.double()
        with use(backend):
            got = mamba1_step_(x, dt, A_log, B, C, here, where, dt_bias=dt_bias, **settings)
        expected = exact(mamba1_step_, x, dt, A_log, B, C, there, where, dt_bias=dt_bias, **settings)
        assert got.dtype is dtype and here.dtype is state_dtype
        rounded = backend == "torch" and "dt_weight" in settings and dtype is not torch.float32  # the product
        low = state_dtype is torch.bfloat16 or rounded
        close(got, expected, max(tolerance, 6e-3 if low else 0))
        close(here, there, 6e-3 if low else 1e-5)
        assert where is None or torch.equal(here[[1, 3]], pool[[1, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "rank", "apart"), [(8, 5, False), (9, 5, True), (2, 256, False), (2, 257, True)])
def test_a_step_of_mamba1_leaves_large_products_of_dt_to_another_launch(
    rows: int, rank: int, apart: bool, dtype: torch.dtype, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("everstate.ops.selective_scan.triton_step")
    draw, channels, d_state = draws(kernel_device, dtype), 40, 6
    x, dt, B, C = (draw(rows, n) for n in (channels, rank, d_state, d_state))
    layer = {"dt_bias": draw(channels) - 2, "dt_weight": draw(channels, rank) / rank, "dt_scale": draw(channels)}
    A_log, here = draw(channels, d_state), draws(kernel_device, torch.float32)(rows, channels, d_state)
    there, products = here.double(), []
    monkeypatch.setattr(kernels, "linear", lambda *args, **kw: (products.append(args), linear(*args, **kw))[1])
    got = mamba1_step_(x, dt, A_log, B, C, here, **layer)
    assert len(products) == apart
    close(got, exact(mamba1_step_, x, dt, A_log, B, C, there, **layer), 2e-2 if dtype is torch.bfloat16 else 1e-5)
    close(here, there, 6e-3 if apart and dtype is torch.bfloat16 else 1e-5)
    with use("triton"), pytest.raises(BackendError, match="weights, biases and scales that lie in one piece"):
        mamba1_step_(x, dt, A_log, B, C, here, **{**layer, "dt_weight": draw(rank, channels).mT})


@pytest.mark.parametrize(("dtype", "tolerance"), LOW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_and_norm(backend: str, dtype: torch.dtype, tolerance: float, kernel_device: torch.device) -> None:
    x, y, weight = draws(kernel_device, torch.float32)(3, 2, 70), *(
        draws(kernel_device, dtype)(*shape) for shape in ((3, 2, 70), (70,))
    )  # fmt: skip
    with use(backend):
        summed, normed = add_rms_norm(x, y, weight, eps=1e-3)
    expected = exact(add_rms_norm, x, y, weight, eps=1e-3)
    assert (summed.dtype, normed.dtype) == (torch.float32, dtype)
    close(summed, expected[0], 1e-6)
    close(normed, expected[1], tolerance)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": 65}, "takes 1 to 64 rows, not 65"),
        ({"rows": 5}, "multiple of 128 numbers, not 16"),
        ({"rows": 5, "dtype": torch.float32}, "in 16 bits, not torch.float32"),
        ({"rows": 2, "width": 1030, "parts": 1030}, "up to 16384 sums of squares, not 32768"),
        ({"scattered": True}, "in one piece of memory"),
        ({"weight_dtype": torch.float16}, "of one dtype"),
        ({"gradient": True}, "no gradient"),
    ],
)
def test_what_a_linear_kernel_does_not_take(changes: Any, sentence: str, kernel_device: torch.device) -> None:
    dtype = changes.get("dtype", torch.bfloat16)
    draw = draws(kernel_device, dtype)
    width = changes.get("width", 16)
    x, weight = draw(changes.get("rows", 1), width), draw(3, width).to(changes.get("weight_dtype", dtype))
    u = undivided(x, changes["parts"]) if "parts" in changes else x
    bias = draw(6)[::2] if "scattered" in changes else None
    with use("triton"), pytest.raises(BackendError, match=sentence):
        linear(u, weight.requires_grad_(changes.get("gradient", False)), bias)


def test_rows_do_not_meet(kernel_device: torch.device) -> None:
    draw = draws(kernel_device, torch.bfloat16)
    x, weight = draw(4, 200), draw(50, 200)
    touched = x.clone()
    touched[1] = draw(200)
    with use("triton"):
        before, after = (linear(undivided(u, 3), weight) for u in (x, touched))
    others = torch.arange(4, device=kernel_device) != 1
    assert torch.equal(before[others], after[others]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 1000, 20_011])
def test_the_first_of_the_largest(width: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    x = draws(kernel_device, dtype)(3, width)
    x[1] = 0.5
    x[2, width // 2 :] = x.max() + 1
    with use("triton"):
        assert argmax(x).tolist() == [int(x[0].float().argmax()), 0, width // 2]


def test_vectors_that_are_scattered_are_not_for_kernels(kernel_device: torch.device) -> None:
    draw = draws(kernel_device, torch.float32)
    x, z, scattered, whole = draw(2, 24), draw(2, 24), draw(48)[::2], draw(24)
    step = draw(2, 4, 6), draw(2, 4), draw(4), draw(2, 1, 8), draw(2, 1, 8), draw(2, 4, 6, 8)
    calls = {
        rms_norm: ((x, scattered), {}),
        gated_rms_norm: ((x, z, scattered), {}),
        add_rms_norm: ((x, z, scattered), {}),
        linear_add_rms_norm: ((x, draw(24, 24), None, z, scattered), {}),
        causal_conv1d_step_: ((x, draw(4, 24).T, whole, draw(2, 24, 3)), {}),
        mamba2_step_: (step, {"dt_bias": draw(4), "norm": scattered}),
    }
    for op, (arguments, settings) in calls.items():
        with use("triton"), pytest.raises(BackendError, match="in one piece of memory"):
            op(*arguments, **settings)
        expected = exact(op, *arguments, **settings)
        got = op(*arguments, **settings)
        for one, other in zip(numbers(got), numbers(expected), strict=True):
            close(one, other, 1e-4)
