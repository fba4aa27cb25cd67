"""Importing the package, and asking the command line for help, does not import torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import everstate

HELP = """
import sys
from everstate.cli import main
sys.argv = ["everstate", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
"""


@pytest.mark.parametrize("code", ["import everstate", "import everstate.errors", HELP])
def test_torch_is_not_imported(code: str) -> None:
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_every_public_name_is_there() -> None:
    for name in everstate.__all__:
        assert getattr(everstate, name) is not None
    assert set(everstate.__all__) <= set(dir(everstate))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        everstate.nonsense  # noqa: B018
