"""The text that every machine has."""

from __future__ import annotations

from everstate.data import stdlib_documents


def test_the_standard_library_without_its_tests() -> None:
    documents = stdlib_documents()
    names = [documents.name(index) for index in range(len(documents))]
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert names == sorted(names)
    assert sum(len(document.text) for document in documents) > 5_000_000
