"""Growth is a decision and not an accident: lines per file and function, fields of the model config."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from everstate.models import ModelConfig

SOURCE = Path(__file__).parent.parent / "src" / "everstate"
FILES = sorted(SOURCE.rglob("*.py"))
EXAMPLES = sorted((SOURCE.parent.parent / "examples").glob("*.py"))

FILE_LINES = 400
TRITON_FILE_LINES = 800
FUNCTION_LINES = 50
EXAMPLE_LINES = 60
CONFIG_FIELDS = 15


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (TRITON_FILE_LINES if path.stem.startswith("triton") else FILE_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= EXAMPLE_LINES


def test_the_model_config_stays_small() -> None:
    assert len(ModelConfig.model_fields) <= CONFIG_FIELDS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_special_imports_have_one_home(path: Path) -> None:
    """triton only in triton*.py, os.environ only in core/env.py, names that say nothing nowhere."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "triton" not in imported or path.stem.startswith("triton")
    assert "transformers" not in imported or path.parent.name == "bench"
    if path != SOURCE / "core" / "env.py":
        assert re.search(r"\b(environ|getenv)\b", text) is None
    if path.parent.name in {"mixers", "ops"} or path.parent.parent.name == "ops":
        assert "torch.distributed" not in text, "parallelism is applied from outside"
    assert path.stem not in {"utils", "common", "helpers", "misc"}
