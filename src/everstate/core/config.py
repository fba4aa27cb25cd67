"""Strict configuration: TOML in, TOML out, unknown keys refused with a suggestion, dotted overrides.

Validation is pydantic's; this file turns its reports into one sentence that says what was given and what is allowed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from everstate.core.errors import ConfigError, EverstateError, did_you_mean

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen table of settings. Building one with an unknown key or a wrong value raises `error`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    title: ClassVar[str] = "config"
    """How messages call this table."""
    error: ClassVar[type[EverstateError]] = ConfigError
    """What a wrong table raises."""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise self.error(_sentence(type(self), error)) from None

    # Tells pydantic to validate inner tables as part of the outer one, so that a message gives the whole path of a key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def parse(cls: type[C], table: Mapping[str, Any]) -> C:
        """Build from a table read from TOML or JSON, in which lists stand for tuples."""
        return cls(**{key: _frozen(value) for key, value in table.items()})

    def table(self) -> dict[str, Any]:
        """As a plain table. TOML has no null: what is None is left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        """As TOML that `parse` reads back to an equal config."""
        return tomli_w.dumps(self.table())


def read_toml(path: Path | str) -> dict[str, Any]:
    """Read a TOML file. Raises `ConfigError` when it is missing, not UTF-8, or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def override(table: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Apply settings such as `"train.lr=1e-3"` to a nested table and return the result.

    Values are TOML values; what TOML cannot read is a string, so `model.layout=4*(ssm mlp)` needs no quotes.
    """
    result = dict(table)
    for setting in settings:
        path, separator, text = setting.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise ConfigError(f"cannot apply {setting!r}; write a.b=value")
        place = result
        for key in keys[:-1]:
            inner = place.get(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"cannot apply {setting!r}: {key!r} is a value, not a table")
            place[key] = dict(inner)
            place = place[key]
        place[keys[-1]] = _value(text.strip())
    return result


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _sentence(cls: type[Config], error: ValidationError) -> str:
    """Every problem that pydantic found, in one line."""
    parts = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            fields = _fields_at(cls, problem["loc"][:-1])
            parts.append(f"unknown key {where!r}; {did_you_mean(str(problem['loc'][-1]), fields)}")
        elif problem["type"] == "missing":
            parts.append(f"{where!r} is missing; give it a value")
        else:
            given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
            at = f"{where}: " if where else ""
            parts.append(f"{at}{problem['msg'].removeprefix('Value error, ')}{given}")
    return f"{cls.title}: {'; '.join(parts)}"


def _fields_at(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the table that a location inside `cls` points to."""
    for part in location:
        field = cls.model_fields.get(str(part))
        inner = field.annotation if field else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            cls = inner
    return list(cls.model_fields)
