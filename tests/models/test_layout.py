"""The layout language."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstate.core.errors import ConfigError
from everstate.models import layout_of_pattern, parse_layout
from everstate.models.layout import PATTERN_LETTERS


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("ssm", "ssm"),
        ("6 * (ssm mlp) attn mlp", "ssm mlp " * 6 + "attn mlp"),
        ("2*(a 3*(b c) d)", "a b c b c b c d " * 2),
        ("  2 *a\n b_2-x ", "a a b_2-x"),
    ],
)
def test_layouts(layout: str, names: str) -> None:
    assert parse_layout(layout) == tuple(names.split())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("", "no block"),
        ("()", "character 2: no block"),
        ("(a", r"'\(' without its '\)'"),
        ("a) b", r"character 2: a '\)' without its '\('"),
        ("a + b", "character 2: neither"),
        ("3 *", "nothing to repeat"),
        ("0 * a", "1 or more"),
        ("2 * 3 * a", "1 or more"),
        ("10001 * a", "more than 10000"),
        ("100 * (100 * (100 * (100 * a)))", "more than 10000"),
        ("(" * 60 + "a" + ")" * 60, "more than 50"),
    ],
)
def test_what_cannot_be_read_is_pointed_at(layout: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_layout(layout)
    assert "such as '6 * (ssm mlp) attn mlp'" in str(error.value)


@given(st.text(alphabet="ab 23*()-+", max_size=20))
def test_any_text_is_a_layout_or_a_readable_error(text: str) -> None:
    try:
        assert parse_layout(text)
    except ConfigError as error:
        assert repr(text) in str(error)


@given(st.text(alphabet="M*-E", min_size=1, max_size=30))
def test_patterns_convert_letter_by_letter(pattern: str) -> None:
    assert parse_layout(layout_of_pattern(pattern)) == tuple(PATTERN_LETTERS[letter] for letter in pattern)


def test_an_unknown_letter_is_named() -> None:
    with pytest.raises(ConfigError, match="letter 'X'"):
        layout_of_pattern("M-X")
    with pytest.raises(ConfigError, match="nothing"):
        layout_of_pattern("")
