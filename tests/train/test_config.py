"""Recipes: strict, found from where they lie, comparable."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from everstate.core.errors import ConfigError
from everstate.train import TrainRecipe

from .conftest import MakeRecipe

TEXT = """
[model]
d_model = 16
layout = "2 * ssm"

[model.mixers.ssm]
type = "mamba2"
headdim = 8
dt_limit = [0.0, 1.0]

[data]
path = "corpus"

[train]
out = "run"
steps = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(TEXT)
    return tmp_path / "recipe.toml"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.lrr=1", "did you mean 'lr'?"),
        ("data.seq_length=1", "did you mean 'seq_len'?"),
        ("trian.lr=1", "did you mean 'train'?"),
        ("model.d_modle=1", "did you mean 'd_model'?"),
        ("model.mixers.ssm.d_stat=1", "did you mean 'd_state'?"),
        ("model.layout=2 * smm", "did you mean 'ssm'?"),
        ("data.source=stdlib", "give either path"),
        ("data.held_out=1.0", "not in [0, 1)"),
        ("train.betas=[0.9, 1.0]", "not in [0, 1)"),
        ("train.cooldown=0.0", "not in (0, 1]"),
        ("train.min_lr=1.0", "above lr"),
        ("train.decay=cosin", "'cosine'"),
        ("train.dtype=float16", "'float32', 'float64' or 'bfloat16'"),
        ("train.steps=0", "greater than 0"),
        ("train=3", "valid dictionary"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(file: Path, setting: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainRecipe.read(file, [setting])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_must_end(file: Path) -> None:
    file.write_text(TEXT.replace("steps = 5", ""))
    with pytest.raises(ConfigError, match="give steps, tokens, epochs or minutes"):
        TrainRecipe.read(file)


def test_paths_are_relative_to_the_recipe_and_settings_apply(file: Path) -> None:
    recipe = TrainRecipe.read(file, ["train.lr=1", "data.tokenizer=words", "model.layout=3 * ssm"])
    assert recipe.data.paths == (str(file.parent / "corpus"),)
    assert recipe.data.tokenizer == str(file.parent / "words")
    assert recipe.train.lr == 1.0
    assert recipe.model_config_for(258).blocks == ("ssm", "ssm", "ssm")
    assert TrainRecipe.read(file).data.tokenizer == "bytes"


def test_a_recipe_survives_toml(file: Path) -> None:
    recipe = TrainRecipe.read(file)
    assert TrainRecipe.parse(tomllib.loads(recipe.to_toml())) == recipe


def test_the_vocabulary_comes_from_the_tokenizer_or_is_large_enough(make_recipe: MakeRecipe) -> None:
    assert make_recipe().model_config_for(258).vocab_size == 258
    assert make_recipe(model={"vocab_size": 320}).model_config_for(258).vocab_size == 320
    with pytest.raises(ConfigError, match="smaller than the 258 ids"):
        make_recipe(model={"vocab_size": 256}).model_config_for(258)


def test_differences_name_keys_and_both_values(file: Path) -> None:
    before, after = TrainRecipe.read(file), TrainRecipe.read(file, ["train.seed=4", "model.mixers.ssm.d_state=8"])
    assert after.differences(before) == {
        "model.mixers.ssm.d_state": "8 (was: unset)",
        "train.seed": "4 (was: 0)",
    }
