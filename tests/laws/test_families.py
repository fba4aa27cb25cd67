"""The laws of published families, over every family in `FAMILIES` and every config of `families/NAME.json`.

A config of which a family cannot read the sizes without the tensors has their shapes under the key "shapes".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.checkpoints import export, load_model
from everstate.checkpoints.families import FAMILIES
from everstate.checkpoints.families.base import agree, entries, published_shapes, published_tensors
from everstate.checkpoints.families.describe import differences
from everstate.checkpoints.published import open_published, read_config
from everstate.checkpoints.reader import read_whole
from everstate.core.errors import CheckpointError
from everstate.models import LM

FILES = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "families").glob("*.json"))
}
CASES = [(name, variant) for name, variants in FILES.items() for variant in variants]
FIRST = [(name, next(iter(variants))) for name, variants in FILES.items()]
LENGTH = 13


def table_of(name: str, variant: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    table = dict(FILES[name][variant])
    return table, {tensor: tuple(shape) for tensor, shape in table.pop("shapes", {}).items()}


def build(name: str, variant: str, dtype: torch.dtype = torch.float32) -> LM:
    model = LM(read_config(FAMILIES[name], *table_of(name, variant), "config.json"), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # so that no two tensors, and no two rows, are alike
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def same(one: LM, other: LM) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        weights[name].dtype == others[name].dtype and torch.equal(weights[name], others[name]) for name in weights
    )


def test_every_family_has_configs() -> None:
    assert set(FILES) == set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_exported_and_loaded_is_the_same_to_the_bit(
    name: str, variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build(name, variant, dtype)
    export(model, tmp_path / "model", name)
    assert open_published(tmp_path / "model").family is FAMILIES[name]
    back = load_model(tmp_path / "model")
    assert differences(model.config, back.config) == []
    assert same(model, back)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_published_number_is_used_once(name: str, variant: str) -> None:
    """Numbered one by one, the published numbers all come out, each once."""
    model = build(name, variant, torch.float64)
    start, numbered = 0, {}
    for ours, tensor in model.state_dict().items():
        numbered[ours] = torch.arange(start, start + tensor.numel(), dtype=torch.float64).view(tensor.shape)
        start += tensor.numel()
    table = entries(model, FAMILIES[name].names(model.config))
    published = published_tensors(numbered, table)
    everything = torch.cat([tensor.flatten() for tensor in published.values()])
    assert torch.equal(everything.sort().values, torch.arange(start, dtype=torch.float64))
    assert {key: tuple(tensor.shape) for key, tensor in published.items()} == published_shapes(model, table)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_all_ways_to_read_agree(name: str, variant: str) -> None:
    model = build(name, variant, torch.float64)
    tokens = torch.randint(model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    whole, _ = model(tokens, model.init_state(2, context=LENGTH))
    state = model.init_state(2, context=LENGTH)
    first, state = model(tokens[:, :4], state)
    second, state = model(tokens[:, 4:9], state)
    rest = [model.step_(tokens[:, i], state) for i in range(9, LENGTH)]
    close(torch.cat([first, second, torch.stack(rest, 1)], 1), whole)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "variant"), FIRST)
def test_a_setting_that_nobody_knows_is_refused_by_name(name: str, variant: str) -> None:
    table, shapes = table_of(name, variant)
    with pytest.raises(CheckpointError, match="frobnication"):
        read_config(FAMILIES[name], {**table, "frobnication": 3}, shapes, "config.json")


@pytest.mark.parametrize(("name", "variant"), FIRST)
def test_a_missing_size_is_named(name: str, variant: str) -> None:
    table, shapes = table_of(name, variant)
    if "text_config" in table:
        table["text_config"] = {key: value for key, value in table["text_config"].items() if key != "vocab_size"}
    table.pop("vocab_size", None)
    with pytest.raises(CheckpointError, match="vocab_size is missing"):
        read_config(FAMILIES[name], table, shapes, "config.json")


@pytest.mark.parametrize(("name", "variant"), FIRST)
def test_a_tensor_too_many_or_too_few_or_of_another_shape_is_named(name: str, variant: str, tmp_path: Path) -> None:
    model = build(name, variant)
    export(model, tmp_path / "model", name)
    published = open_published(tmp_path / "model")
    tensors = read_whole(published.reader, published.reader.infos)
    victim = [key for key in tensors if key.endswith(("out_proj.weight", "o_proj.weight", "linear_out.weight"))][-1]
    for changed, message in (
        ({**tensors, "stray.weight": torch.ones(2)}, "stray.weight"),
        ({key: tensor for key, tensor in tensors.items() if key != victim}, f"{victim} .*is missing"),
        ({**tensors, victim: tensors[victim][:-1].clone()}, f"{victim} is "),
    ):
        write_as(published.family.weights_file, tmp_path / "model", changed)
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "model")


def write_as(file: str, folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)


def test_shapes_agree_but_for_ones() -> None:
    assert agree((4, 1, 3), (4, 3, 1))
    assert not agree((4, 3), (3, 4))
