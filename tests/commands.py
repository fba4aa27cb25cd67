"""The commands as a user types them, in this process: one of its own takes seconds to import torch."""

from __future__ import annotations

import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryFile

import pytest

from everstate.cli import main


def run(folder: Path, *words: str, stdin: str = "") -> CompletedProcess[str]:
    """What `everstate WORDS` does in a folder: its exit code and what it printed, through files with descriptors."""
    code: object = 0
    with TemporaryFile("w+") as given, TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        given.write(stdin)
        given.seek(0)
        with pytest.MonkeyPatch.context() as patch, chdir(folder), redirect_stdout(out), redirect_stderr(errors):
            patch.setattr(sys, "argv", ["everstate", *words])
            patch.setattr(sys, "stdin", given)
            try:
                main()
            except SystemExit as end:
                code = end.code
        out.seek(0)
        errors.seek(0)
        return CompletedProcess(words, int(str(code or 0)), out.read(), errors.read())
