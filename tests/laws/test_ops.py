"""The laws of ops, over every op and variant in `EXAMPLES`: a new op inherits all of them without a line of test.

Everything runs in float64 on the CPU but Triton kernels, which take float32, on the GPU or in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.kernels import interpreting
from everstate.core.op import REFERENCE
from everstate.core.packing import Packing
from everstate.core.state import clone, concat, gather, map_state, tensors
from everstate.ops import OPS, use
from everstate.ops.example import EXAMPLES, Draw, Example

CASES = [(name, variant) for name in EXAMPLES for variant in EXAMPLES[name]]
# Triton's interpreter takes seconds for what a GPU does at once: kernels get some lengths and cuts there, no wide rows.
INTERPRETED = not torch.cuda.is_available()
INTERPRETED_LENGTHS, INTERPRETED_CUTS = [1, 65], [64]
TOO_WIDE_TO_INTERPRET = {("linear_scan", "wide"), ("linear_scan", "wide complex")}

KERNELS = "triton"
KERNEL_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = 3e-5
"""What float32 may lose."""


def draw(
    name: str, variant: str, batch: int, length: int, sequences: int | None = None, backend: str = REFERENCE
) -> Example:
    """Arguments in the dtype and on the device where the laws run this backend."""
    return EXAMPLES[name][variant](
        Draw(dtype=torch.float32, device=KERNEL_DEVICE) if backend == KERNELS else Draw(),
        batch, length, sequences or batch,
    )  # fmt: skip


def accepting(op: Any, example: Example, timed: dict[str, Tensor]) -> list[str]:
    """Backends that serve an example: one that refuses it is not asked."""
    state = {} if example.state is None else {"state": example.state}
    with interpreting():
        verdicts = op.explain(**timed, **example.fixed, **state)
    return [backend for backend, verdict in verdicts.items() if verdict == "accepts"]


def served(name: str, variant: str) -> list[str]:
    """Backends that serve what the laws draw for them."""
    op, wide, narrow = OPS[name], draw(name, variant, 1, 2), draw(name, variant, 1, 2, backend=KERNELS)
    kernels = [b for b in accepting(op, narrow, narrow.timed) if b == KERNELS]
    if INTERPRETED and (name, variant) in TOO_WIDE_TO_INTERPRET:
        kernels = []
    return kernels + accepting(op, wide, wide.timed)


def with_each(
    numbers: list[int], interpreted: list[int], cases: list[tuple[str, str, str]]
) -> list[tuple[str, str, str, int]]:
    """Every case with every number, or with some where a kernel is interpreted."""
    some = lambda backend: interpreted if INTERPRETED and backend == KERNELS else numbers
    return [(*case, number) for case in cases for number in some(case[2])]


BACKENDS = [(*case, backend) for case in CASES for backend in served(*case)]
FAST = [case for case in BACKENDS if case[2] != REFERENCE]
TIMED = [case for case in BACKENDS if draw(*case[:2], 1, 2).timed]
LENGTHS = [1, 2, 7, 63, 64, 65, 131]
CUTS = [1, 2, 31, 64, 68]
PACKED = Packing.of_lengths([1, 5, 40, 3, 66])

# Backends whose outputs are causal to rounding only. A Fourier transform mixes all times before it separates them. How
# many tokens share one matrix product of an expert depends on all of them, and its height may change its rounding.
CAUSAL_TO_ROUNDING = {
    ("experts", "gated", "torch"),
    ("experts", "relu2", "torch"),
    ("lti_conv", "long", "torch"),
    ("lti_conv", "short", "torch"),
    ("lti_diagonal", "convolution", "torch"),
    ("lti_diagonal", "bilinear convolution", "torch"),
    ("lti_dplr", "convolution", "torch"),
}


def exact(example: Example) -> Example:
    """The same numbers in float64, for the reference."""
    widen = lambda v: v.to(torch.promote_types(v.dtype, torch.float64)) if _is_real_or_complex(v) else v
    return example._replace(
        timed={key: widen(value) for key, value in example.timed.items()},
        fixed={key: each(widen, value) for key, value in example.fixed.items()},
        state=None if example.state is None else map_state(widen, example.state),
    )


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """A value, or the parts of a tuple of values such as the parameters of a layer, through `function`."""
    return type(value)(*(function(part) for part in value)) if hasattr(value, "_fields") else function(value)


def _is_real_or_complex(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def run(
    name: str, backend: str, example: Example, timed: dict[str, Tensor] | None = None, state: Any = None, **more: Any
) -> tuple[Tensor, Any]:
    """Outputs and final state (an empty tuple where the op has none)."""
    arguments = {**(timed or example.timed), **example.fixed, **more}
    with use(backend), interpreting():
        if example.state is None:
            made = OPS[name](**arguments)
            # Several outputs are looked at side by side.
            return torch.cat(made, -1) if isinstance(made, tuple) else made, ()
        return OPS[name](**arguments, state=example.state if state is None else state)


def token(example: Example) -> dict[str, Tensor]:
    """The first token."""
    return {key: value[:, 0] for key, value in example.timed.items()}


def cut(example: Example, where: slice) -> dict[str, Tensor]:
    return {key: value[:, where] for key, value in example.timed.items()}


def close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        allowed = max(tolerance, ROUNDING) if one.dtype in (torch.float32, torch.complex64) else tolerance
        scale = max(other.abs().max().item(), 1.0)
        assert (one.to(other.dtype) - other).abs().max().item() <= allowed * scale


def gradients(name: str, backend: str, example: Example, **more: Any) -> list[Tensor]:
    """Gradients of a random projection of the outputs and the final state, for every tensor that is not an index."""
    leaf = lambda t: t.detach().clone().requires_grad_(_is_real_or_complex(t))
    fresh = lambda v: leaf(v) if isinstance(v, Tensor) else v
    timed = {key: leaf(value) for key, value in example.timed.items()}
    fixed = {key: each(fresh, value) for key, value in example.fixed.items()}
    state = () if example.state is None else map_state(leaf, example.state)
    y, after = run(name, backend, example._replace(fixed=fixed), timed, state, **more)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    for out in (y, *tensors(after)):
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
        total = total + ((out.real + 0.5 * out.imag if out.is_complex() else out) * weight).sum()
    given: list[Any] = []
    for value in fixed.values():
        each(given.append, value)
    leaves = [*timed.values(), *(v for v in given if isinstance(v, Tensor)), *tensors(state)]
    wanted = [t for t in leaves if t.requires_grad]
    return [
        torch.zeros_like(t) if g is None else g
        for t, g in zip(wanted, torch.autograd.grad(total, wanted, allow_unused=True), strict=True)
    ]


ONE_TOKEN = {
    "argmax", "experts_add_rms_norm", "linear", "linear_activate", "linear_add_rms_norm", "linear_conv_step_",
    "mamba1_step_", "mamba2_step_", "topk_router",
}  # fmt: skip
"""Ops of one token that belong to no scan. The laws draw many rows, cut them along time and differentiate; the kernels
of these take a few rows and no gradients. `tests/ops/test_decode_triton.py`, `test_experts_few_triton.py` and
`test_router_triton.py` hold them to their references."""


def test_every_op_has_an_example() -> None:
    steps = {f.name for n, v in CASES if (f := draw(n, v, 1, 2).step) is not None}
    assert set(OPS) == set(EXAMPLES) | steps | ONE_TOKEN


def test_every_implementation_accepts_some_example() -> None:
    accepted = {(name, backend) for name, _, backend in BACKENDS}
    for case in CASES:
        for example in (draw(*case, 1, 2), draw(*case, 1, 2, backend=KERNELS)):
            if example.step is not None:
                accepted |= {(example.step.name, b) for b in accepting(example.step, example, token(example))}
    assert accepted == {(n, backend) for n, op in OPS.items() if n not in ONE_TOKEN for backend in op.backends()}


@pytest.mark.parametrize(("name", "variant", "backend", "length"), with_each(LENGTHS, INTERPRETED_LENGTHS, FAST))
def test_agrees_with_the_reference(name: str, variant: str, backend: str, length: int) -> None:
    example = draw(name, variant, 2, length, backend=backend)
    close(run(name, backend, example), run(name, REFERENCE, exact(example)))


@pytest.mark.parametrize(("name", "variant", "backend", "length"), with_each([1, 65], [65], FAST))
def test_gradients_agree_with_the_reference(name: str, variant: str, backend: str, length: int) -> None:
    example = draw(name, variant, 2, length, backend=backend)
    got, expected = gradients(name, backend, example), gradients(name, REFERENCE, exact(example))
    close(tuple(got), tuple(expected), 1e-8)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_gradcheck_of_the_reference(name: str, variant: str) -> None:
    example = draw(name, variant, 1, 3)
    differentiable = lambda v: isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())
    # An op without time, such as a kernel, is checked in its parameters.
    given = {k: v.requires_grad_() for k, v in (example.timed or example.fixed).items() if differentiable(v)}
    parts = tensors(example.state) if example.state is not None else []
    parts = [p.requires_grad_() for p in parts if p.is_floating_point() or p.is_complex()]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(given, inputs, strict=False))
        rest = iter(inputs[len(given) :])
        pick = lambda t: next(rest) if t.is_floating_point() or t.is_complex() else t
        state = None if example.state is None else map_state(pick, example.state)
        here = example._replace(timed={**example.timed, **named}, fixed={**example.fixed, **named})
        y, after = run(name, REFERENCE, here, state=state)
        return (y, *(t for t in tensors(after) if t.is_floating_point() or t.is_complex()))

    # Of random projections of inputs and outputs, which miss an entry of the Jacobian with probability zero.
    assert torch.autograd.gradcheck(function, (*given.values(), *parts), fast_mode=True)


@pytest.mark.parametrize(("name", "variant", "backend", "where"), with_each(CUTS, INTERPRETED_CUTS, TIMED))
def test_a_split_changes_nothing(name: str, variant: str, backend: str, where: int) -> None:
    example = draw(name, variant, 2, 69, backend=backend)
    whole, final = run(name, backend, example)
    first, middle = run(name, backend, example, cut(example, slice(0, where)))
    second, last = run(name, backend, example, cut(example, slice(where, None)), middle)
    close((torch.cat([first, second], 1), last), (whole, final))


@pytest.mark.parametrize(("name", "variant", "backend"), BACKENDS)
def test_packed_sequences_are_separate_sequences(name: str, variant: str, backend: str) -> None:
    example = draw(name, variant, 1, PACKED.total, len(PACKED), backend)
    if not example.packs:
        pytest.skip("this op looks at one token at a time and needs no packing")
    packed, after = run(name, backend, example, packing=PACKED)
    device = packed.device
    rows = [torch.tensor([i], device=device) for i in range(len(PACKED))]
    alone = [
        run(
            name,
            backend,
            example,
            cut(example, where),
            gather(example.state, row) if example.state is not None else None,
        )
        for where, row in zip(PACKED.slices(), rows, strict=True)
    ]
    close((packed, after), (torch.cat([y for y, _ in alone], 1), concat([s for _, s in alone])))
    close(
        tuple(gradients(name, backend, example, packing=PACKED)),
        tuple(gradients(name, REFERENCE, exact(example), packing=PACKED)),
        1e-8,
    )


@pytest.mark.parametrize(("name", "variant", "backend"), BACKENDS)
def test_packed_sequences_do_not_meet(name: str, variant: str, backend: str) -> None:
    example = draw(name, variant, 1, PACKED.total, len(PACKED), backend)
    if not example.packs:
        pytest.skip("this op looks at one token at a time and needs no packing")
    touched = PACKED.slices()[2]
    timed = disturb(example.timed, touched)
    before, after = run(name, backend, example, packing=PACKED), run(name, backend, example, timed, packing=PACKED)
    keep = torch.ones(PACKED.total, dtype=torch.bool, device=before[0].device)
    keep[touched] = False
    assert torch.equal(before[0][:, keep], after[0][:, keep])
    others = torch.tensor([0, 1, 3, 4], device=before[0].device)
    assert all(torch.equal(a[others], b[others]) for a, b in zip(tensors(before[1]), tensors(after[1]), strict=True))


def disturb(timed: dict[str, Tensor], where: slice) -> dict[str, Tensor]:
    """Other values of the same kind at some times: the tokens there in reverse order, and a third of the way on."""
    result = {}
    for key, value in timed.items():
        changed = value.clone()
        changed[:, where] = value[:, where].flip(1).roll(value[:, where].shape[1] // 3 + 1, 1)
        result[key] = changed
    return result


@pytest.mark.parametrize(("name", "variant", "backend"), TIMED)
def test_an_output_does_not_see_what_comes_later(name: str, variant: str, backend: str) -> None:
    example = draw(name, variant, 2, 90, backend=backend)
    before, _ = run(name, backend, example)
    after, _ = run(name, backend, example, disturb(example.timed, slice(50, 90)))
    assert not torch.equal(before[:, 50:], after[:, 50:])
    if (name, variant, backend) in CAUSAL_TO_ROUNDING:
        close(after[:, :50], before[:, :50], 1e-12)
    else:
        assert torch.equal(before[:, :50], after[:, :50])


@pytest.mark.parametrize("drawn_for", [REFERENCE, KERNELS])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_step_is_one_token(name: str, variant: str, drawn_for: str) -> None:
    example = draw(name, variant, 3, 1, backend=drawn_for)
    if example.step is None:
        pytest.skip("this op carries no state, or its step belongs to another variant")
    now = token(example)
    backends = [b for b in accepting(example.step, example, now) if (b == KERNELS) == (drawn_for == KERNELS)]
    if not backends:
        pytest.skip("no kernel serves this step")
    y, after = run(name, REFERENCE, exact(example))
    place = lambda *at: torch.tensor(at, device=y.device)
    pool, slots = map_state(lambda t: torch.cat([t, t]), clone(example.state)), place(4, 0, 2)
    map_state(lambda into, rows: into.index_copy_(0, slots, rows), pool, example.state)
    untouched = gather(pool, place(1, 3, 5))
    for backend in backends:
        here = clone(pool)
        with use(backend), interpreting():
            got = example.step(**now, state=here, slots=slots, **example.fixed)
        close((got, gather(here, slots)), (y[:, 0], after))
        close(gather(here, place(1, 3, 5)), untouched, 0.0)
        rows = clone(example.state)
        with use(backend), interpreting():
            got = example.step(**now, state=rows, **example.fixed)
        close((got, rows), (y[:, 0], after))


@pytest.mark.parametrize(("name", "variant", "backend"), BACKENDS)
def test_inputs_may_lie_anyhow_in_memory(name: str, variant: str, backend: str) -> None:
    example = draw(name, variant, 2, 13, backend=backend)
    spread = {
        key: torch.stack([v, v], -1)[..., 0].transpose(0, 1).clone().transpose(0, 1) for key, v in example.timed.items()
    }
    close(run(name, backend, example, spread), run(name, backend, example), 1e-13)


@pytest.mark.parametrize(("name", "variant", "backend"), [case for case in TIMED if case[0].endswith("_scan")])
def test_no_sequences_give_no_outputs(name: str, variant: str, backend: str) -> None:
    example = draw(name, variant, 2, 5, backend=backend)
    timed, state = ({key: t[:0] for key, t in example.timed.items()}, map_state(lambda t: t[:0], example.state))
    with use(backend, "torch"), interpreting():
        y, after = OPS[name](**timed, state=state, **example.fixed)
    whole, _ = run(name, backend, example)
    assert y.shape == (0, *whole.shape[1:])
    assert [t.shape for t in tensors(after)] == [t.shape for t in tensors(state)]


@pytest.mark.parametrize(("name", "variant", "backend"), BACKENDS)
def test_inputs_and_state_are_left_as_they_were(name: str, variant: str, backend: str) -> None:
    example = draw(name, variant, 2, 13, backend=backend)
    before = clone((tuple(example.timed.values()), example.state if example.state is not None else ()))
    run(name, backend, example)
    close((tuple(example.timed.values()), example.state if example.state is not None else ()), before, 0.0)


@pytest.mark.parametrize(("name", "variant", "backend"), BACKENDS)
def test_no_memory_is_read_before_it_is_written(name: str, variant: str, backend: str, poisoned_empty: None) -> None:
    example = draw(name, variant, 2, 67, backend=backend)
    y, after = run(name, backend, example)
    assert all(bool(torch.isfinite(torch.view_as_real(t) if t.is_complex() else t).all()) for t in (y, *tensors(after)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "variant", "backend"), FAST)
def test_low_precision_agrees_with_its_reference(name: str, variant: str, backend: str, dtype: torch.dtype) -> None:
    device = KERNEL_DEVICE if backend == KERNELS else "cpu"
    example = EXAMPLES[name][variant](Draw(dtype=torch.float32, device=device), 2, 65, 2)
    if dtype is torch.bfloat16:
        lower = lambda t: t.to(dtype) if t.dtype is torch.float32 else t
        example = example._replace(timed={key: lower(value) for key, value in example.timed.items()})
    if backend not in accepting(OPS[name], example, example.timed):
        pytest.skip("refused in this precision")
    expected, final = run(name, REFERENCE, example)
    got, after = run(name, backend, example)
    assert got.dtype == expected.dtype
    assert [t.dtype for t in tensors(after)] == [t.dtype for t in tensors(final)]
    cut = INTERPRETED and backend == KERNELS
    close(
        (got.double() if not got.is_complex() else got, after),
        (expected.double() if not got.is_complex() else expected, final),
        # The interpreter cuts where a GPU rounds to bfloat16, which adds up along a whole layer.
        1e-4 if dtype is torch.float32 else 3e-2 if cut and name == "mamba3_scan" else 2e-2,
    )
