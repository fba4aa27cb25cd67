"""Strict tables: suggestions, overrides, and the round trip through TOML."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest

from everstate.core.config import Config, override, read_toml
from everstate.core.errors import ConfigError
from everstate.core.registry import Registry


class Inner(Config):
    width: int = 3


class Outer(Config):
    title = "outer"

    name: str
    limits: tuple[float, float] = (0.0, math.inf)
    inner: Inner = Inner()


def test_toml_and_back() -> None:
    config = Outer(name="a", inner=Inner(width=4))
    assert Outer.parse(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"nam": "x"}, "unknown key 'nam'; did you mean 'name'"),
        ({"name": "x", "inner": {"widht": 1}}, "unknown key 'inner.widht'; did you mean 'width'"),
        ({"name": 3}, r"outer: name: .*string.*\(given: 3\)"),
        ({}, "'name' is missing"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Outer.parse(table)
    assert "\n" not in str(error.value)


def test_overrides_reach_into_tables_and_leave_the_original() -> None:
    table = {"train": {"lr": 0.1}, "name": "x"}
    changed = override(table, ["train.lr=1e-3", "train.new.deep=true", "layout=4 * (ssm mlp)", "list=[1, 2]"])
    assert changed == {
        "train": {"lr": 1e-3, "new": {"deep": True}},
        "name": "x",
        "layout": "4 * (ssm mlp)",
        "list": [1, 2],
    }
    assert table == {"train": {"lr": 0.1}, "name": "x"}


@pytest.mark.parametrize("setting", ["lr", "=3", "a..b=3", "name.x=3"])
def test_an_override_that_cannot_be_applied_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="cannot apply"):
        override({"name": "x"}, [setting])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"a = \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 4"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="not TOML.*line 1"):
        read_toml(tmp_path / "bad.toml")


def test_a_registry_imports_on_demand_and_suggests() -> None:
    shapes: Registry[type] = Registry("shape")
    shapes.add("path", "pathlib:Path")
    shapes.add("broken", "no.such.module:x")
    assert shapes["path"] is Path
    assert list(shapes) == ["path", "broken"]
    with pytest.raises(ConfigError, match="unknown shape 'pth'; did you mean 'path'"):
        shapes["pth"]
