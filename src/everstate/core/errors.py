"""The one tree of errors that users meet. Each message says what was given, what is allowed, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EverstateError(Exception):
    """Base of every error that a user can cause and can mend."""


class ConfigError(EverstateError):
    """A configuration is not one that we can build: unknown key, wrong type, impossible shape, unreadable layout."""


class CheckpointError(EverstateError):
    """A saved file is missing, truncated, altered, or belongs to another model."""


class RequestError(EverstateError):
    """An argument of a call is out of range: token ids, lengths, sampling settings."""


class DataError(EverstateError):
    """A data file cannot be read as what it claims to be."""


class TokenizerError(EverstateError):
    """A tokenizer file or a chat template cannot be used."""


class TrainingError(EverstateError):
    """Training cannot go on as its recipe says: the loss is no longer a number."""


class BackendError(EverstateError):
    """A backend was forced by `use(...)` and cannot serve the call, or does not exist."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """End of a message about an unknown name: the closest allowed name, and all of them.

    >>> did_you_mean("d_modle", ["d_model", "layout"])
    "did you mean 'd_model'? Allowed: d_model, layout"
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Allowed: {', '.join(names) or 'none'}"
