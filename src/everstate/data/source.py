"""Where text comes from: files, folders and JSONL, one document at a time.

A corpus knows how many documents it has and reads each from its file only when it is asked for.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from everstate.core.errors import ConfigError, DataError, did_you_mean

# JSON can escape what UTF-8 cannot write.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """A text and what messages call it. The name does not depend on where the corpus lies."""

    name: str
    text: str


class Documents(ABC):
    """A corpus: documents by number, always in the same order."""

    @abstractmethod
    def __len__(self) -> int:
        """How many documents there are."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of a document, without reading it."""

    @abstractmethod
    def read(self, index: int) -> str:
        """The text of a document. Raises `DataError` when it is not what it claims to be."""

    def __iter__(self) -> Iterator[Document]:
        for index in range(len(self)):
            yield Document(self.name(index), self.read(index))


class Texts(Documents):
    """Documents that are in memory."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = tuple(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def name(self, index: int) -> str:
        return self._documents[index].name

    def read(self, index: int) -> str:
        return self._documents[index].text


class Files(Documents):
    """Each file is a document, named by its path below `root`."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, tuple(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> str:
        path = self._root / self._names[index]
        return _utf8(path, _read(path), 0)


class JsonLines(Documents):
    """Each line is a JSON object whose `field` is a document, named `FILE:LINE`; empty lines are none."""

    def __init__(self, path: Path, name: str, field: str) -> None:
        self._path, self._name, self._field = path, name, field
        self._offsets, self._lines = array("q"), array("q")
        offset = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._offsets.append(offset)
                        self._lines.append(number)
                    offset += len(line)
        except OSError as error:
            raise _unreadable(path, error) from None

    def __len__(self) -> int:
        return len(self._lines)

    def name(self, index: int) -> str:
        return f"{self._name}:{self._lines[index]}"

    def read(self, index: int) -> str:
        offset, where = self._offsets[index], f"{self._path} line {self._lines[index]}"
        line = _utf8(self._path, _read(self._path, offset), offset).rstrip("\n")
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{where} is not JSON: {reason}; write one JSON object per line") from None
        if not isinstance(entry, dict):
            raise DataError(f"{where} is no JSON object; write one per line, with the text under {self._field!r}")
        if self._field not in entry:
            raise DataError(f"{where} has no field {self._field!r}; {did_you_mean(self._field, entry)}")
        text = entry[self._field]
        if not isinstance(text, str):
            raise DataError(
                f"{where}: {self._field!r} is {type(text).__name__}; make it a string, or name another field"
            )
        if LONE_SURROGATE.search(text):
            raise DataError(f"{where}: {self._field!r} has half of a surrogate pair; write the whole character")
        return text


class Joined(Documents):
    """Several corpora, one after the other."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = tuple(parts)
        self._starts = [0, *accumulate(len(part) for part in self._parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        part, inner = self._place(index)
        return part.name(inner)

    def read(self, index: int) -> str:
        part, inner = self._place(index)
        return part.read(inner)

    def _place(self, index: int) -> tuple[Documents, int]:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part], index - self._starts[part]


class Subset(Documents):
    """Some documents of a corpus."""

    def __init__(self, whole: Documents, indices: Sequence[int]) -> None:
        self._whole, self._indices = whole, array("q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._whole.name(self._indices[index])

    def read(self, index: int) -> str:
        return self._whole.read(self._indices[index])


def open_documents(
    *paths: Path | str, patterns: Sequence[str] = ("**/*",), exclude: Sequence[str] = (), field: str = "text"
) -> Documents:
    """The documents of text files, `.jsonl` files and folders of both.

    A folder gives its files that match one of `patterns` and none of `exclude` (globs below the folder, such as
    `"**/*.py"`), sorted by path. A text file is one document, a line of a `.jsonl` file is one, its text under `field`.
    Raises `DataError` when a path does not exist or nothing is found.
    """
    parts: list[Documents] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"there is no {path}; give a text file, a .jsonl file or a folder")
        root = path if path.is_dir() else path.parent
        names = _matching(path, patterns, exclude) if path.is_dir() else [path.name]
        texts = [name for name in names if not name.endswith(".jsonl")]
        parts += [
            Files(root, texts),
            *(JsonLines(root / name, name, field) for name in names if name.endswith(".jsonl")),
        ]
    documents = Joined(parts)
    if len(documents) == 0:
        raise DataError(
            f"no documents in {', '.join(map(str, paths)) or 'no path'} that match {', '.join(patterns)}; "
            "give text files, .jsonl files or folders, and globs that match"
        )
    return documents


def split(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """Documents to train on, and about `fraction` of them held out.

    Which ones depends on their names alone, so a document keeps its side when others come or go; each side has at
    least one. Of a single document the end is held out, from the beginning of a line where there is one.
    Raises `DataError` when there is too little to divide.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"cannot hold out {fraction} of the documents; give a fraction between 0 and 1")
    count = len(documents)
    if count == 1:
        return _split_one(documents, fraction)
    places = [_place_of(documents.name(index)) for index in range(count)]
    held = min(max(sum(place < fraction for place in places), 1), count - 1)
    order = sorted(range(count), key=lambda index: (places[index], index))
    return Subset(documents, sorted(order[held:])), Subset(documents, sorted(order[:held]))


def _split_one(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    name, text = documents.name(0), documents.read(0)
    cut = int(len(text) * (1 - fraction))
    line = text.find("\n", cut) + 1
    cut = line if 0 < line < len(text) else cut
    if not 0 < cut < len(text):
        raise DataError(f"{name} is too short to hold out a part of it; give more text")
    return Texts([Document(name, text[:cut])]), Texts([Document(f"{name} (end)", text[cut:])])


def _place_of(name: str) -> float:
    """A number in [0, 1) that is uniform over names."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=6).digest()) / 2**48


def _matching(folder: Path, patterns: Sequence[str], exclude: Sequence[str]) -> list[str]:
    try:
        found = {path for pattern in patterns for path in folder.glob(pattern)}
        found -= {path for pattern in exclude for path in folder.glob(pattern)}
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"a glob cannot be used below {folder}: {error}; write such as **/*.txt") from None
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def _read(path: Path, offset: int | None = None) -> bytes:
    """A whole file, or its line that begins at a byte."""
    try:
        with path.open("rb") as file:
            if offset is None:
                return file.read()
            file.seek(offset)
            return file.readline()
    except OSError as error:
        raise _unreadable(path, error) from None


def _utf8(path: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {offset + error.start} ({error.reason}); save it as UTF-8, or exclude it"
        ) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror}; give a text file, a .jsonl file or a folder")
