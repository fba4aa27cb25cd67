"""Documents from files, folders and JSONL, and the part that is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstate.core.errors import ConfigError, DataError
from everstate.data import Document, Texts, open_documents, split


def corpus(folder: Path) -> Path:
    """A folder of text, nested, with one JSONL file and one that is no text."""
    for name, content in {
        "b.txt": "bee\r\n",
        "a/z.txt": "zed",
        "a/é.txt": "",
        "a/b/c.py": "pass",
        "lines.jsonl": '{"text": "one"}\n\n{"text": "zwö", "n": 1}\n',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode())
    (folder / "a" / "photo.bin").write_bytes(b"ab\xff")
    return folder


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    documents = open_documents(corpus(tmp_path), exclude=["**/*.bin", "a/b/*"])
    texts = [("a/z.txt", "zed"), ("a/é.txt", ""), ("b.txt", "bee\r\n")]
    assert list(documents) == [*texts, ("lines.jsonl:1", "one"), ("lines.jsonl:3", "zwö")]
    assert [documents.name(i) for i in range(len(documents))] == [document.name for document in documents]


def test_patterns_choose(tmp_path: Path) -> None:
    folder = corpus(tmp_path)
    assert [d.name for d in open_documents(folder, patterns=["*.txt", "**/*.py"])] == ["a/b/c.py", "b.txt"]
    assert [d.name for d in open_documents(folder / "b.txt", folder / "a", patterns=["*.txt"])] == [
        "b.txt",
        "z.txt",
        "é.txt",
    ]


def test_jsonl_with_another_field(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"code": "a\nb\u2028é"}) + "\n" + json.dumps({"code": "last"}))
    documents = open_documents(tmp_path / "x.jsonl", field="code")
    assert [documents.read(i) for i in (1, 0)] == ["last", "a\nb\u2028é"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": 1}', r"line 3: 'text' is int; make it a string"),
        (b'{"texts": ""}', r"line 3 has no field 'text'; did you mean 'texts'\?"),
        (b'{"text": ', r"line 3 is not JSON: Expecting value at column 10; write one JSON object per line"),
        (b"[" * 100_000, r"line 3 is not JSON"),
        (b'["text"]', r"line 3 is no JSON object; write one per line, with the text under 'text'"),
        (b'{"text": "\xff"}', r"x\.jsonl is not UTF-8 at byte 27 \(invalid start byte\); save it as UTF-8"),
        (b'{"text": "\\ud800"}', r"line 3: 'text' has half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(line: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    documents = open_documents(tmp_path / "x.jsonl")
    assert (documents.read(0), documents.read(2)) == ("one", "two")
    with pytest.raises(DataError, match=words):
        documents.read(1)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    folder = corpus(tmp_path)
    with pytest.raises(
        DataError, match=r"photo\.bin is not UTF-8 at byte 2 \(invalid start byte\); save it .* or exclude"
    ):
        list(open_documents(folder))
    with pytest.raises(DataError, match=r"there is no .*nowhere; give a text file"):
        open_documents(folder / "nowhere")
    with pytest.raises(DataError, match=r"no documents in .* that match \*\.md; give text files"):
        open_documents(folder, patterns=["*.md"])
    with pytest.raises(DataError, match="no documents in no path"):
        open_documents()
    with pytest.raises(DataError, match="glob cannot be used"):
        open_documents(folder, patterns=["/etc/*"])
    gone = open_documents(folder / "b.txt")
    (folder / "b.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*b\.txt: No such file"):
        gone.read(0)


def texts(count: int) -> Texts:
    return Texts([Document(f"{i}.txt", f"text {i}\n") for i in range(count)])


@given(st.integers(2, 300), st.floats(0.01, 0.99))
def test_each_document_is_on_one_side(count: int, fraction: float) -> None:
    documents = texts(count)
    train, held_out = split(documents, fraction)
    assert sorted([*train, *held_out]) == sorted(documents)
    assert len(train) > 0
    assert len(held_out) > 0
    assert [d.name for d in split(documents, fraction)[1]] == [d.name for d in held_out]


def test_a_document_keeps_its_side_when_others_come() -> None:
    few, many = (set(split(texts(count), 0.1)[1]) for count in (500, 1000))
    assert few == {document for document in many if int(document.name[:-4]) < 500}
    assert 60 < len(many) < 140


def test_of_one_document_the_end_is_held_out() -> None:
    train, held_out = split(Texts([Document("book", "line one\nline two\nline three\nend\n")]), 0.4)
    assert list(train) == [("book", "line one\nline two\nline three\n")]
    assert list(held_out) == [("book (end)", "end\n")]
    train, held_out = split(Texts([Document("dna", "acgtacgtac")]), 0.3)
    assert [document.text for document in (*train, *held_out)] == ["acgtacg", "tac"]
    with pytest.raises(DataError, match="dna is too short"):
        split(Texts([Document("dna", "a")]), 0.3)
    with pytest.raises(ConfigError, match=r"cannot hold out 1\.5 of the documents; give a fraction between 0 and 1"):
        split(texts(5), 1.5)
