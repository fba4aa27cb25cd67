"""A text that every machine has: the source of Python's own library."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from everstate.data.source import Documents, Files

# Folders below the standard library's that hold other packages, tests (some of which are meant to be unreadable), or
# tables of characters and not programs.
OTHER_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)
# Tables again, and a poem in cipher.
OTHER_FILES = frozenset({"stringprep.py", "entities.py", "this.py"})


def stdlib_documents() -> Documents:
    """The source files of the standard library of this Python, about ten megabytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names: list[str] = []
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(set(inner) - OTHER_FOLDERS)  # what is taken out here is not walked
        names += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and name not in OTHER_FILES and not name.startswith("_sysconfigdata")
        ]
    return Files(root, sorted(names))
