"""An operation is its reference; faster implementations join it by one line each.

    @op
    def ssd_scan(x, ...): ...                                            # the definition, literally

    ssd_scan.add("torch", "everstate.ops.ssd.chunked:ssd_scan", anywhere)

A call runs the first implementation that accepts the arguments, in order of registration; the reference
accepts everything. An implementation refuses by returning a sentence that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

from everstate.core.errors import BackendError
from everstate.core.registry import import_target

P = ParamSpec("P")
R = TypeVar("R")

Accepts = Callable[..., str | None]
"""Called with the arguments of the op: None to accept, or a sentence that says why not."""

REFERENCE = "reference"

OPS: dict[str, Op[Any, Any]] = {}
"""Every op by name, for the laws, `explain` and `everstate doctor`."""

# A plain global and no ContextVar, because torch.compile traces through the one and not through the other.
_allowed: tuple[str, ...] = ()


@dataclass
class Implementation:
    """One backend of one op: where it lives and what it accepts."""

    backend: str
    target: str
    accepts: Accepts
    _function: Callable[..., Any] | None = field(default=None, repr=False)

    def load(self) -> Callable[..., Any]:
        """Import the implementation; the second call is a plain attribute, which `torch.compile` can trace."""
        if self._function is None:
            self._function = cast(Callable[..., Any], import_target(self.target))
        return self._function


class Op(Generic[P, R]):
    """A pure function of tensors whose body is the reference, and the implementations that agree with it."""

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = reference
        self.name = reference.__name__
        self.implementations: list[Implementation] = []
        self.__doc__ = reference.__doc__
        self.__name__ = self.name
        self.__wrapped__ = reference
        self.__module__ = reference.__module__

    def add(self, backend: str, target: str, accepts: Accepts) -> None:
        """Register an implementation after those already there."""
        assert backend != REFERENCE and backend not in self.backends(), f"{self.name}: {backend} is registered twice"
        self.implementations.append(Implementation(backend, target, accepts))

    def backends(self) -> list[str]:
        """Names of the implementations in the order they are asked, the reference last."""
        return [*(i.backend for i in self.implementations), REFERENCE]

    def load(self) -> None:
        """Import every implementation, so that `torch.compile(fullgraph=True)` finds them loaded."""
        for implementation in self.implementations:
            implementation.load()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        allowed = _allowed
        for implementation in self.implementations:
            if allowed and implementation.backend not in allowed:
                continue
            if implementation.accepts(*args, **kwargs) is None:
                return cast(R, implementation.load()(*args, **kwargs))
        if allowed and REFERENCE not in allowed:
            raise BackendError(self._refusals(allowed, *args, **kwargs))
        return self.reference(*args, **kwargs)

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, str]:
        """For each backend in order: `"accepts"`, or the sentence that says why it does not serve these arguments."""
        verdicts = {i.backend: i.accepts(*args, **kwargs) or "accepts" for i in self.implementations}
        return {**verdicts, REFERENCE: "accepts"}

    def serving(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """The backend that runs a call with these arguments, here and now; None where `use(...)` leaves none."""
        verdicts = self.explain(*args, **kwargs)
        allowed = _allowed or self.backends()
        return next((name for name, verdict in verdicts.items() if verdict == "accepts" and name in allowed), None)

    def is_allowed(self) -> bool:
        """Whether `use(...)`, if there is one here and now, names an implementation of this op."""
        return not _allowed or any(backend in _allowed for backend in self.backends())

    def _refusals(self, allowed: tuple[str, ...], *args: P.args, **kwargs: P.kwargs) -> str:
        verdicts = self.explain(*args, **kwargs)
        reasons = [f"{b}: {verdicts.get(b, f'{self.name} has no such implementation')}" for b in allowed]
        return (
            f"{self.name} cannot run on {', '.join(allowed)} as use(...) asks ({'; '.join(reasons)}). "
            f"It has: {', '.join(self.backends())}; allow one of these in use(...), or leave use(...) out"
        )


def op(function: Callable[P, R]) -> Op[P, R]:
    """Make the reference `function` an op that implementations can join."""
    made = Op(function)
    assert made.name not in OPS, f"op {made.name} is defined twice"
    OPS[made.name] = made
    return made


@contextmanager
def use(*backends: str) -> Iterator[None]:
    """Let only these backends serve ops inside the `with` block, in the whole process; a refusal is a `BackendError`.

    >>> with use("reference"): ...
    """
    global _allowed
    known = {name for each in OPS.values() for name in each.backends()}
    unknown = [name for name in backends if name not in known]
    if unknown or not backends:
        raise BackendError(f"use({', '.join(map(repr, backends))}): name one or more of {', '.join(sorted(known))}")
    before, _allowed = _allowed, backends
    try:
        yield
    finally:
        _allowed = before


def anywhere(*args: Any, **kwargs: Any) -> None:
    """Accept every argument on every device."""


def on(*device_types: str) -> Accepts:
    """Accept when the first tensor argument lives on one of these device types, such as `on("cuda")`."""

    def accepts(*args: Any, **kwargs: Any) -> str | None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                here = value.device.type
                return None if here in device_types else f"runs on {' or '.join(device_types)}, the input is on {here}"
        return "was given no tensor"

    return accepts
