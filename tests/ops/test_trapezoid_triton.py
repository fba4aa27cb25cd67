"""The Triton kernels of `trapezoid_scan` at sizes that the laws do not draw: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.errors import BackendError
from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.core.state import map_state, tensors
from everstate.ops import TrapezoidState, gated, trapezoid_scan, use
from everstate.ops.example import Draw, Example
from everstate.ops.trapezoid import limits
from tests.ops.upstream import upstream_of

HAS_GPU = torch.cuda.is_available()
TIMED = ("x", "B", "C")
"""What a model trained in bfloat16 computes in it."""


def draw(
    device: torch.device, batch: int, length: int, heads: int, headdim: int, groups: int, d_state: int, rank: int = 1,
    pairs: int | None = None, dtype: torch.dtype = torch.float32, sequences: int | None = None,
) -> Example:  # fmt: skip
    d, seqs, pairs = Draw(dtype=torch.float32, device=device), sequences or batch, pairs or d_state // 4
    keys = lambda: d.normal(batch, length, rank, groups, d_state, scale=d_state**-0.25)
    timed = {
        "x": d.normal(batch, length, heads, headdim),
        "dt": d.uniform(batch, length, heads, low=0.01),
        "A": -d.uniform(batch, length, heads, low=0.01),
        "lam": d.uniform(batch, length, heads),
        "omega": d.uniform(batch, length, pairs, low=-math.pi, high=math.pi),
        "B": keys(),
        "C": keys(),
    }
    fixed: dict[str, Any] = {
        name: d.normal(heads, rank, d_state, scale=d_state**-0.25) for name in ("B_bias", "C_bias")
    }
    if rank > 1:
        fixed.update(mimo_x=d.normal(heads, rank, headdim), interleaved=False)
    return Example(
        timed={name: value.to(dtype) if name in TIMED else value for name, value in timed.items()},
        state=TrapezoidState(
            ssm=d.normal(seqs, heads, headdim, d_state),
            k=d.normal(seqs, rank, heads, d_state),
            x=d.normal(seqs, heads, headdim),
            angle=d.uniform(seqs, heads, pairs, low=-3.0, high=3.0),
        ),
        fixed={**fixed, "D": d.normal(heads)},
    )


def outcome(backend: str, example: Example, dtype: torch.dtype | None = None, **settings: Any) -> list[Tensor]:
    """Outputs, final state and gradients; computed in `dtype` where it is given."""
    cast = lambda v: v.detach().to(dtype or v.dtype).requires_grad_() if isinstance(v, Tensor) else v
    timed, fixed = ({name: cast(v) for name, v in part.items()} for part in (example.timed, example.fixed))
    state = map_state(cast, example.state)
    with use(backend):
        y, after = trapezoid_scan(**timed, state=state, **fixed, **settings)
    outputs = [y, *tensors(after)]
    upstream = upstream_of(outputs)
    leaves = [*timed.values(), *(v for v in fixed.values() if isinstance(v, Tensor)), *tensors(state)]
    return outputs + list(torch.autograd.grad(outputs, leaves, upstream))


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Norms of the differences, relative to the norms of what is expected."""
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(got, expected, strict=True)]


def agree(example: Example, tolerance: float, **settings: Any) -> None:
    expected = outcome(REFERENCE, example, torch.float64, **settings)
    got = errors(outcome("triton", example, **settings), expected)
    assert max(got) <= tolerance, got


# Triton's interpreter cuts where a GPU rounds to bfloat16.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize(
    ("heads", "headdim", "groups", "d_state", "rank", "pairs"),
    [
        (2, 64, 1, 128, 1, 32),
        (2, 32, 2, 64, 1, 32),
        (2, 32, 1, 32, 4, 8),
        (2, 16, 1, 16, 8, 8),
        # no powers of two
        (1, 80, 1, 48, 1, 5),
        (2, 48, 1, 80, 1, 8),
        (2, 40, 1, 24, 3, 3),
    ],
)
def test_sizes_of_real_layers(
    heads: int, headdim: int, groups: int, d_state: int, rank: int, pairs: int,
    dtype: torch.dtype, tolerance: float, kernel_device: torch.device,
) -> None:  # fmt: skip
    agree(draw(kernel_device, 1, 100, heads, headdim, groups, d_state, rank, pairs, dtype), tolerance)


ONE_HEAD = [(80, 48, 5), (96, 128, 32), (128, 128, 32), (128, 64, 16), (128, 16, 4)]
"""Widths of heads and states, and turning pairs, at which ptxas 12.8 made gradients of keys that read anything. It did
where a program has one head, because nothing is computed ahead of a loop then."""


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU; without one `tests.lowered registers` looks at the machine code")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize(("headdim", "d_state", "pairs"), ONE_HEAD)
def test_wide_heads_one_to_a_program(
    headdim: int, d_state: int, pairs: int, dtype: torch.dtype, tolerance: float, kernel_device: torch.device
) -> None:
    for heads in (1, 2):  # two are still one to a program, because a GPU has more processors
        agree(draw(kernel_device, 1, 100, heads, headdim, 1, d_state, 1, pairs, dtype), tolerance)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("lengths", [[300], [1, 64, 150, 65, 2]] if HAS_GPU else [[200], [1, 64, 130, 65, 2]])
def test_segments_of_long_sequences(
    lengths: list[int], rank: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of many processors and few heads to fill it: every sequence is cut."""
    from everstate.ops import triton_segments

    monkeypatch.setattr(triton_segments, "processors", lambda device: 6)
    packing = Packing.of_lengths(lengths)
    agree(draw(kernel_device, 1, packing.total, 2, 16, 1, 16, rank, sequences=len(lengths)), 1e-5, packing=packing)


def test_what_bfloat16_costs(kernel_device: torch.device) -> None:
    """Beside the PyTorch form, which rounds only its results; the kernels round keys, queries and states too."""
    if kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter cuts where a GPU rounds")
    example = draw(kernel_device, 2, 150, 2, 64, 1, 64, dtype=torch.bfloat16)
    expected = outcome(REFERENCE, example, torch.float64)
    ours, theirs = (errors(outcome(backend, example), expected) for backend in ("triton", "torch"))
    assert ours[0] <= 2.5 * theirs[0]
    assert max(ours) < 1.5e-2


def test_angles_stay_right_over_many_turns(kernel_device: torch.device) -> None:
    """Almost half a turn per token, 3000 times: a float32 sum would be wrong by more than 1e-4."""
    example, length, rate = draw(kernel_device, 1, 3000, 2, 16, 1, 16), 3000, torch.tensor(3.1)
    timed = {**example.timed, "dt": torch.ones(1, length, 2), "omega": rate.expand(1, length, 4)}
    timed = {name: value.to(kernel_device) for name, value in timed.items()}
    state = example.state._replace(angle=torch.zeros_like(example.state.angle))
    with use("triton"):
        _, after = trapezoid_scan(**timed, state=state, **example.fixed)
    exact = math.remainder(rate.item() * length, math.tau)
    assert (after.angle - exact).abs().max() < 1e-5


def test_the_same_call_gives_the_same_bits(kernel_device: torch.device) -> None:
    example = draw(kernel_device, 1, 70, 4, 16, 1, 16, rank=2, dtype=torch.bfloat16)
    first, *others = (outcome("triton", example) for _ in range(2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def agree_on_parts(example: Example) -> None:
    """What has no gradient counts as zeros, to the bit."""
    cast = lambda v: v.detach().requires_grad_()
    timed, state = {name: cast(v) for name, v in example.timed.items()}, map_state(cast, example.state)
    with use("triton"):
        y, after = trapezoid_scan(**timed, state=state, **example.fixed)
    outputs, leaves = [y, *tensors(after)], [*timed.values(), *tensors(state)]
    draws = [torch.randn_like(t) for t in outputs]
    gradients = lambda some, given: torch.autograd.grad(some, leaves, given, retain_graph=True, materialize_grads=True)
    for at, (output, drawn) in enumerate(zip(outputs, draws, strict=True)):
        alone = gradients([output], [drawn])
        zeros = [drawn if other == at else torch.zeros_like(t) for other, t in enumerate(outputs)]
        for got, expected in zip(alone, gradients(outputs, zeros), strict=True):
            assert torch.equal(got, expected)


def test_outputs_without_gradients(kernel_device: torch.device) -> None:
    agree_on_parts(draw(kernel_device, 1, 70, 2, 16, 1, 32))


def test_views_of_one_projection_are_read_where_they_lie(kernel_device: torch.device) -> None:
    example = draw(kernel_device, 2, 70, 2, 16, 1, 16)
    wide = torch.cat([example.timed[name].flatten(2) for name in TIMED], -1)
    x, B, C = wide.split([32, 16, 16], -1)
    views = {"x": x.unflatten(-1, (2, 16)), "B": B.unflatten(-1, (1, 1, 16)), "C": C.unflatten(-1, (1, 1, 16))}
    with use("triton"):
        got, _ = trapezoid_scan(**{**example.timed, **views}, state=example.state, **example.fixed)
        expected, _ = trapezoid_scan(**example.timed, state=example.state, **example.fixed)
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_gate", [False, True])
def test_a_compiler_can_trace_it(with_gate: bool, kernel_device: torch.device) -> None:
    example = draw(kernel_device, 1, 20, 2, 16, 1, 16)
    if with_gate:
        example.timed["z"] = example.timed["x"].flip(1).unsqueeze(2)
    leaves = {name: value.requires_grad_() for name, value in example.timed.items()}
    trapezoid_scan.load()
    gated.load()

    def scan(**timed: Tensor) -> tuple[Tensor, TrapezoidState]:
        return trapezoid_scan(**timed, state=example.state, **example.fixed)

    with use("triton"):
        (expected, _), (got, _) = scan(**leaves), torch.compile(scan, fullgraph=True, backend="aot_eager")(**leaves)
    assert torch.equal(got, expected)
    gradients = (torch.autograd.grad(t.sum(), list(leaves.values())) for t in (got, expected))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"headdim": 256}, r"not 256 x 16"),
        ({"d_state": 512}, r"not 16 x 512"),
        ({"d_state": 256, "dtype": torch.float32}, r"float32"),
        ({"rank": 17}, r"up to 16 ranks, not 17"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], sentence: str, kernel_device: torch.device) -> None:
    sizes = {"heads": 1, "headdim": 16, "groups": 1, "d_state": 16, "dtype": torch.bfloat16, **changes}
    example = draw(kernel_device, 1, 3, **sizes)
    with use("triton"), pytest.raises(BackendError, match=sentence):
        trapezoid_scan(**example.timed, state=example.state, **example.fixed)
    assert trapezoid_scan(**example.timed, state=example.state, **example.fixed)[0].isfinite().all()


@pytest.mark.parametrize(("available", "fits"), [(101_376, True), (65_536, False)])
def test_what_fits_into_little_shared_memory(
    available: int, fits: bool, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "shared_memory", lambda device: available)
    example = draw(kernel_device, 1, 3, 1, 16, 1, 256, pairs=128, dtype=torch.bfloat16)
    refused = pytest.raises(BackendError, match="needs a GPU with 101,376 bytes .* this one has 65,536")
    with use("triton"), nullcontext() if fits else refused:
        trapezoid_scan(**example.timed, state=example.state, **example.fixed)


def test_a_gpu_of_another_maker_is_refused(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.torch.version, "hip", "7.0")
    example = draw(kernel_device, 1, 3, 1, 16, 1, 16)
    with use("triton"), pytest.raises(BackendError, match="NVIDIA"):
        trapezoid_scan(**example.timed, state=example.state, **example.fixed)


def test_angles_of_long_sequences(kernel_device: torch.device) -> None:
    """The gradient of a turn is what all later tokens say of angles, a small sum of large terms: rounding errors of
    thousands of tokens must not add up in it."""
    if kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter cuts where a GPU rounds")
    example = draw(kernel_device, 1, 8192, 2, 64, 1, 128, dtype=torch.bfloat16)
    example.timed["dt"].mul_(0.1)
    expected, got = outcome("torch", example, torch.float64), outcome("triton", example)
    omega, angle = 5 + list(example.timed).index("omega"), -1
    assert max(errors([got[omega], got[angle]], [expected[omega], expected[angle]])) < 8e-3
