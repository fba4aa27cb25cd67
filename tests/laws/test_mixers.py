"""The laws of mixers, over every type in `MIXERS` and every table of `variants/TYPE.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.config import read_toml
from everstate.core.packing import Packing
from everstate.core.state import clone, concat, equal, gather, map_state, named_tensors, tensors
from everstate.mixers import MIXERS, Mixer, build_mixer
from everstate.mixers.modules import Special
from everstate.ops import AttentionState

VARIANTS = {path.stem: read_toml(path) for path in sorted((Path(__file__).parent / "variants").glob("*.toml"))}
D_MODEL = 16
CASES = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]
LENGTH = 69
PACKED = Packing.of_lengths([1, 5, 33, 3])


def build(name: str, variant: str, dtype: torch.dtype = torch.float64) -> Mixer:
    mixer = build_mixer({"type": name, **VARIANTS[name][variant]}, D_MODEL, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():  # so that no special initial value, such as a zero, hides an error
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return mixer


def build_causal(name: str, variant: str) -> Mixer:
    mixer = build(name, variant)
    if not mixer.causal:
        pytest.skip("an encoder sees the whole sequence")
    return mixer


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(5), dtype=dtype)


def close(got: object, expected: object, tolerance: float = 1e-10) -> None:
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        scale = max(other.abs().max().item(), 1.0) if other.numel() else 1.0
        assert one.numel() == 0 or (one - other).abs().max().item() <= tolerance * scale


def exactly_separate(name: str, variant: str) -> bool:
    """How many tokens share a product of an expert depends on all of them, and its height may change its rounding."""
    return "moe" not in f"{name} {variant}"


def exactly_causal(name: str, variant: str) -> bool:
    """A Fourier transform is causal to rounding only."""
    return "convolution" not in variant and exactly_separate(name, variant)


def same(got: object, expected: object, exactly: bool) -> None:
    if exactly:
        assert equal(got, expected)
    else:
        close(got, expected, 1e-12)


def test_every_mixer_has_variants() -> None:
    assert set(VARIANTS) == set(MIXERS)


@pytest.mark.parametrize("cut", [1, 2, 31, 64, 68])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_split(name: str, variant: str, cut: int) -> None:
    mixer, x = build_causal(name, variant), inputs(2, LENGTH)
    whole, final = mixer(x, mixer.init_state(2, context=LENGTH))
    first, middle = mixer(x[:, :cut], mixer.init_state(2, context=LENGTH))
    second, last = mixer(x[:, cut:], middle)
    close((torch.cat([first, second], 1), last), (whole, final))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_step(name: str, variant: str) -> None:
    mixer, x = build_causal(name, variant), inputs(3, LENGTH)
    whole, final = mixer(x, mixer.init_state(3, context=LENGTH))
    pool, slots = mixer.init_state(6, context=LENGTH), torch.tensor([4, 0, 2])
    others = torch.tensor([1, 3, 5])
    rows = mixer.init_state(3, context=LENGTH)
    with torch.no_grad():
        for t in range(LENGTH):
            close(mixer.step_(x[:, t], pool, slots), whole[:, t])
            if t < 20:  # without slots it is the same code
                close(mixer.step_(x[:, t], rows), whole[:, t])
    close(gather(pool, slots), final)
    close(rows, mixer(x[:, :20], mixer.init_state(3, context=LENGTH))[1])
    assert equal(gather(pool, others), mixer.init_state(3, context=LENGTH))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_size(name: str, variant: str) -> None:
    mixer = build_causal(name, variant)
    state = mixer.init_state(2, context=LENGTH)
    _, after = mixer(inputs(2, LENGTH), state)
    shapes = [(field, t.shape, t.dtype) for field, t in named_tensors(state)]
    assert shapes == [(field, t.shape, t.dtype) for field, t in named_tensors(after)]
    assert all(t.shape[0] == 2 for t in tensors(state))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_state_keeps_no_segment_alive(name: str, variant: str) -> None:
    mixer = build_causal(name, variant)
    _, after = mixer(inputs(2, LENGTH), mixer.init_state(2, context=LENGTH))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(after)}
    assert sum(held.values()) <= sum(t.numel() * t.element_size() for t in tensors(after))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_causal(name: str, variant: str) -> None:
    mixer, x = build_causal(name, variant), inputs(2, LENGTH)
    other = torch.cat([x[:, :40], x[:, 40:].flip(1)], 1)
    before, _ = mixer(x, mixer.init_state(2, context=LENGTH))
    after, _ = mixer(other, mixer.init_state(2, context=LENGTH))
    assert not torch.equal(before[:, 40:], after[:, 40:])
    same(after[:, :40], before[:, :40], exactly_causal(name, variant))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_rows_do_not_meet(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs(3, LENGTH)
    other = x.clone()
    other[1] = x[1].flip(0)
    before = mixer(x, mixer.init_state(3, context=LENGTH))
    after = mixer(other, mixer.init_state(3, context=LENGTH))
    kept = torch.tensor([0, 2])
    same(gather(after, kept), gather(before, kept), exactly_separate(name, variant))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_packed_sequences_are_separate_sequences(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs(1, PACKED.total)
    packed, after = mixer(x, mixer.init_state(len(PACKED), context=LENGTH), PACKED)
    alone = [mixer(x[:, cut], mixer.init_state(1, context=LENGTH)) for cut in PACKED.slices()]
    close((packed, after), (torch.cat([y for y, _ in alone], 1), concat([s for _, s in alone])))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_packed_sequences_do_not_meet(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs(1, PACKED.total)
    other, touched = x.clone(), PACKED.slices()[2]
    other[:, touched] = x[:, touched].flip(1)
    before = mixer(x, mixer.init_state(len(PACKED), context=LENGTH), PACKED)
    after = mixer(other, mixer.init_state(len(PACKED), context=LENGTH), PACKED)
    keep = torch.ones(PACKED.total, dtype=torch.bool)
    keep[touched] = False
    kept = torch.tensor([0, 1, 3])
    got, expected = ((y[:, keep], gather(state, kept)) for y, state in (after, before))
    same(got, expected, exactly_separate(name, variant))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_forward_is_pure(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs(2, 9)
    state = mixer.init_state(2, context=LENGTH)
    if mixer.causal:
        _, state = mixer(x, state)
    before = clone(state)
    first, second = mixer(x, state), mixer(x, state)
    assert equal(state, before)
    assert torch.equal(first[0], second[0])
    assert equal(first[1], second[1])


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_parameter_has_a_gradient(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs(2, LENGTH)
    y, _ = mixer(x, mixer.init_state(2, context=LENGTH))
    y.square().sum().backward()
    for field, parameter in mixer.named_parameters():
        assert parameter.grad is not None, field
        assert torch.isfinite(parameter.grad).all(), field
        assert parameter.grad.abs().max() > 0, field


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_marks_name_parameters_that_exist_in_some_variant(name: str, variant: str) -> None:
    for part in build(name, variant).modules():
        if isinstance(part, Special):
            assert part.in_float32 <= part.no_decay | part.in_float32
            marked = part.no_decay | part.in_float32
            built = [build(name, v) for v in VARIANTS[name]]
            everything = {
                field
                for m in built
                for p in m.modules()
                if type(p) is type(part)
                for field, _ in p.named_parameters(recurse=False)
            }
            assert marked <= everything


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_low_precision_accumulates_in_float32(name: str, variant: str) -> None:
    mixer = build_mixer({"type": name, **VARIANTS[name][variant]}, D_MODEL, dtype=torch.bfloat16)
    x = inputs(2, 9).to(torch.bfloat16)
    y, after = mixer(x, mixer.init_state(2, context=LENGTH))
    assert y.dtype is torch.bfloat16
    assert torch.isfinite(y).all()
    assert all(t.dtype in (torch.float32, torch.complex64, torch.int64) for t in accumulating(after))


def accumulating(state: Any) -> list[Tensor]:
    """The tensors of a state, but for caches: those hold copies of inputs, in the dtype of the model."""
    if isinstance(state, AttentionState):
        assert state.k.dtype == state.v.dtype == torch.bfloat16
        return [state.pos]
    return [state] if isinstance(state, Tensor) else [t for part in state for t in accumulating(part)]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_meta_mixer_allocates_nothing_and_counts_the_same(name: str, variant: str) -> None:
    real = build(name, variant)
    meta = build_mixer({"type": name, **VARIANTS[name][variant]}, D_MODEL, device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in meta.parameters())
    assert {k: v.shape for k, v in meta.named_parameters()} == {k: v.shape for k, v in real.named_parameters()}
    shapes = [t.shape for t in tensors(meta.init_state(2, context=LENGTH))]
    assert shapes == [t.shape for t in tensors(real.init_state(2, context=LENGTH))]
    assert meta.flops_per_token(LENGTH) == real.flops_per_token(LENGTH) > 0


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_irregular_sampling(name: str, variant: str) -> None:
    """delta_t is refused, or obeyed: all ones is regular sampling, other values matter, and every mode obeys alike."""
    from everstate.core.errors import RequestError

    mixer, x = build(name, variant), inputs(2, LENGTH)
    ones = torch.ones(2, LENGTH, dtype=torch.float64)
    start = mixer.init_state(2, context=LENGTH)
    try:
        regular, _ = mixer(x, start, None, ones)
    except RequestError as error:
        assert "delta_t" in str(error)
        return
    close(regular, mixer(x, start)[0])
    if not tensors(start):
        return
    delta_t = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.5
    irregular, final = mixer(x, start, None, delta_t)
    assert not torch.allclose(irregular, regular)
    if mixer.causal:
        rows = clone(start)
        with torch.no_grad():
            for t in range(LENGTH):
                close(mixer.step_(x[:, t], rows, None, delta_t[:, t]), irregular[:, t])
        close(rows, final)
    packed = mixer(x.flatten(0, 1)[None], start, Packing.of_lengths([LENGTH, LENGTH]), delta_t.flatten()[None])
    close(packed, (irregular.flatten(0, 1)[None], final))


def test_states_can_be_mapped_and_named() -> None:
    mixer = build("mamba2", "default")
    state = mixer.init_state(1)
    assert [name for name, _ in named_tensors((state,))] == ["0.conv", "0.ssm"]
    assert equal(map_state(lambda t: t + 0, state), state)
