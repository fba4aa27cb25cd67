"""Names for things that are written elsewhere: a registry imports an entry only when somebody asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, cast

from everstate.core.errors import ConfigError, did_you_mean

T = TypeVar("T")


def import_target(target: str) -> Any:
    """Import `"package.module:name"`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


class Registry(Generic[T]):
    """A table of name -> `"package.module:attribute"`, resolved on first use.

    `MIXERS.add("mamba2", "everstate.mixers.mamba2:Mamba2")` is the one line that a new entry costs.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._targets: dict[str, str] = {}

    def add(self, name: str, target: str) -> None:
        """Register `target` under `name`; a name is given once."""
        assert name not in self._targets, f"{self.noun} {name!r} is registered twice"
        self._targets[name] = target

    def __getitem__(self, name: str) -> T:
        if name not in self._targets:
            raise ConfigError(f"unknown {self.noun} {name!r}; {did_you_mean(name, self._targets)}")
        return cast(T, import_target(self._targets[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __len__(self) -> int:
        return len(self._targets)
