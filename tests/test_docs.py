"""Every code block of the README and the docs runs.

In one file the `python` blocks share a namespace and run from top to bottom; in `sh` blocks the lines that begin with
`everstate` run, in the same folder, which begins empty.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from everstate.train import loop
from tests.commands import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "cpu_threads", lambda: 1)  # the other tests want their cores
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    names: dict[str, Any] = {"__name__": "page"}
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        else:
            run_commands(code)


def run_commands(code: str) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("everstate "):
            words = shlex.split(line, comments=True)[1:]
            done = run(Path.cwd(), *words)
            assert done.returncode == 0, done.stderr


def test_the_first_screen_of_the_readme() -> None:
    """One sentence, the two commands, ten lines of Python, one table."""
    screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert "make demo" in screen
    assert "make test" in screen
    code = BLOCK.search(screen)
    assert code is not None
    assert len(code[2].strip().splitlines()) <= 14
    assert "|---" in screen
