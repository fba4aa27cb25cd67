"""The layout language: `"6 * (ssm mlp) attn mlp"` is the order of a model's blocks.

layout := item+        item := [COUNT "*"] (NAME | "(" layout ")")
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from everstate.core.errors import ConfigError, did_you_mean

MAX_BLOCKS = 10_000

_TOKEN = re.compile(r"\s*(?:(?P<count>\d+)\s*\*|(?P<name>[A-Za-z_][\w-]*)|(?P<open>\()|(?P<close>\)))")

PATTERN_LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
"""What the letters of published pattern strings such as `M-M-M*-` stand for."""


def parse_layout(layout: str) -> tuple[str, ...]:
    """The names of the blocks in order.

    Raises `ConfigError` that points at the place which cannot be read.

    >>> parse_layout("2 * (ssm mlp) attn")
    ('ssm', 'mlp', 'ssm', 'mlp', 'attn')
    """
    names, end = _sequence(layout, 0, depth=0)
    if end != len(layout):
        raise _unreadable(layout, end, "a ')' without its '('")
    return tuple(names)


def _sequence(layout: str, at: int, depth: int) -> tuple[list[str], int]:
    """Items up to the end of the text, or to the `)` that ends this group."""
    names: list[str] = []
    count = None
    while layout[at:].strip():
        token = _TOKEN.match(layout, at)
        if token is None:
            raise _unreadable(layout, at, "neither a name, nor 'COUNT *', nor a parenthesis")
        if token["close"]:
            break
        if token["count"]:
            if count is not None or int(token["count"]) < 1:
                raise _unreadable(layout, at, "a count must be 1 or more and stand before a name or a '('")
            count, at = int(token["count"]), token.end()
            continue
        if token["name"]:
            inner, at = [token["name"]], token.end()
        else:
            inner, at = _group(layout, token.end(), depth + 1)
        if len(names) + (count or 1) * len(inner) > MAX_BLOCKS:
            raise _unreadable(layout, at, f"more than {MAX_BLOCKS} blocks")
        names += (count or 1) * inner
        count = None
    if count is not None or not names:
        raise _unreadable(layout, at, "nothing to repeat" if count else "no block")
    return names, at + len(layout[at:]) - len(layout[at:].lstrip())


def _group(layout: str, at: int, depth: int) -> tuple[list[str], int]:
    """The inside of a parenthesis, and where the text goes on behind it."""
    if depth > 50:
        raise _unreadable(layout, at, "more than 50 parentheses inside each other")
    inner, end = _sequence(layout, at, depth)
    if end >= len(layout):
        raise _unreadable(layout, end, "a '(' without its ')'")
    return inner, end + 1


def _unreadable(layout: str, at: int, problem: str) -> ConfigError:
    return ConfigError(
        f"layout {layout!r} cannot be read at character {at + 1}: {problem}; "
        "write block names with repeats and groups, such as '6 * (ssm mlp) attn mlp'"
    )


def layout_of_pattern(pattern: str, letters: Mapping[str, str] = PATTERN_LETTERS) -> str:
    """The layout of a published pattern string, one letter per block; runs of one letter become a count.

    >>> layout_of_pattern("MM*-")
    '2 * mamba2 attention mlp'
    """
    unknown = sorted(set(pattern) - set(letters))
    if unknown or not pattern:
        given = f"letter {unknown[0]!r}" if unknown else "nothing"
        raise ConfigError(f"pattern {pattern!r} holds {given}; {did_you_mean(''.join(unknown[:1]), letters)}")
    runs = [match.group(0) for match in re.finditer(r"(.)\1*", pattern)]
    return " ".join(letters[r[0]] if len(r) == 1 else f"{len(r)} * {letters[r[0]]}" for r in runs)


def write_layout(names: Sequence[str]) -> str:
    """A layout of these blocks, with what is repeated written once; `parse_layout` gives them back.

    >>> write_layout(["ssm", "mlp", "ssm", "mlp", "attn"])
    '2 * (ssm mlp) attn'
    """
    parts, at = [], 0
    while at < len(names):
        width, count = max(
            ((width, _repeats(names, at, width)) for width in range(1, (len(names) - at) // 2 + 1)),
            key=lambda found: found[0] * found[1] if found[1] > 1 else 0,
            default=(1, 1),
        )
        if count == 1:
            parts.append(names[at])
            at += 1
            continue
        group = write_layout(names[at : at + width])
        parts.append(f"{count} * {group}" if width == 1 else f"{count} * ({group})")
        at += width * count
    return " ".join(parts)


def _repeats(names: Sequence[str], at: int, width: int) -> int:
    """How often the `width` names from `at` on stand there one after the other."""
    count = 1
    while names[at + count * width : at + (count + 1) * width] == names[at : at + width]:
        count += 1
    return count
