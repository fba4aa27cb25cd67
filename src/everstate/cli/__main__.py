"""`python -m everstate.cli` is `everstate`."""

from __future__ import annotations

from everstate.cli import main

main()
