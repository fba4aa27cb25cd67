"""Linear maps and norms."""

from __future__ import annotations

import pytest
import torch

from everstate.core.kernels import overlapping
from everstate.mixers import modules
from everstate.mixers.modules import Multipliers, Product
from everstate.ops import Normed


def test_norms_are_what_their_names_say() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    rms, plus, layer = (modules.build_norm(kind, 8, 1e-5).double() for kind in ("rms", "rms1p", "layer"))
    with torch.no_grad():
        for norm in (rms, plus, layer):
            norm.init_()
        torch.testing.assert_close(plus(x), rms(x))
        plus.weight.normal_(generator=generator)
        rms.weight.copy_(1 + plus.weight)
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)
    torch.testing.assert_close(plus(x), rms(x))
    torch.testing.assert_close(layer(x), torch.nn.functional.layer_norm(x, (8,), layer.weight, layer.bias, 1e-5))


def test_a_weight_added_to_one_keeps_its_bits_in_half_precision() -> None:
    norm = modules.build_norm("rms1p", 1, 0.0).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.fill_(2.0**-12)  # vanishes next to 1 in bfloat16
    y = norm(torch.ones(1, 1))
    assert y.dtype is torch.float32
    assert y.item() == 1 + 2.0**-12


def test_a_norm_makes_its_factor_once_where_kernels_overlap() -> None:
    norm = modules.build_norm("rms1p", 4, 0.0)
    assert isinstance(norm, modules.RMSNorm)
    norm.init_()
    with torch.no_grad(), overlapping():
        assert norm.factor() is norm.factor()
        assert modules.build_norm("rms1p", 4, 0.0).factor() is not norm.factor()
    with torch.no_grad():
        norm.weight.fill_(1.0)
        assert norm.factor().tolist() == [2.0] * 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("before", "behind"), [(1.0, 1.0), (0.5, 3.0), (0.3, ((2, 0.7), (5, 1.0))), (1.0, ((7, 2.0),))]
)
def test_a_step_folds_multipliers_into_its_outputs(
    before: float, behind: float | Multipliers, quantised: bool, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    linear, norm = modules.Linear(6, 7, bias).double(), modules.RMSNorm(6, 1e-5).double()
    modules.init_linear_(linear, generator)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0, generator)
    if linear.bias is not None:
        torch.nn.init.ones_(linear.bias)
    if quantised:
        linear.quantize_()
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    parts = behind if isinstance(behind, tuple) else ((7, behind),)
    factor = torch.cat([torch.full((count,), multiplier).double() for count, multiplier in parts])
    torch.testing.assert_close(linear.step(x, before=before, behind=behind), factor * linear(before * x))
    undivided = Normed(x * norm.weight, x.square().view(3, 2, 3).sum(-1), norm.eps)
    expected = factor * linear(before * norm(x))
    torch.testing.assert_close(linear.step(undivided, before=before, behind=behind), expected)
    with torch.no_grad(), overlapping():
        for one, other in zip(linear.folded(before, behind), linear.folded(before, behind), strict=True):
            assert one is other


@pytest.mark.parametrize("quantised", [False, True])
def test_a_product_may_be_taken_in_by_a_residual_stream(quantised: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear, norm = modules.Linear(6, 7, bias=True).double(), modules.RMSNorm(7, 1e-3, one_plus=True).double()
    modules.init_linear_(linear, generator)
    torch.nn.init.uniform_(norm.weight, generator=generator)
    torch.nn.init.ones_(linear.bias)
    if quantised:
        linear.quantize_()
    x, residual = (torch.randn(3, width, generator=generator, dtype=torch.float64) for width in (6, 7))
    product = Product(linear, x, 3.0)
    torch.testing.assert_close(product.value(), 3.0 * linear(x))
    summed, normed = product.add_to(residual, norm, 0.5)
    torch.testing.assert_close(summed, residual + 1.5 * linear(x))
    torch.testing.assert_close(normed.divided(), norm(summed))
