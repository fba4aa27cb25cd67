"""Runs `compiled_models.py` in a session of its own, without what checks the shapes of all arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent / "compiled_models.py"


def session() -> None:
    options = ["-p", "no:cacheprovider", "-o", "addopts=-q --strict-markers --tb=short"]
    ran = subprocess.run([sys.executable, "-m", "pytest", *options, str(TESTS)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has its own")
def test_models_are_traced() -> None:
    session()


@pytest.mark.gpu
def test_models_are_compiled() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    session()
