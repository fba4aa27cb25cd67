"""Names of models: folders, files, and repositories of the hub, which no test reaches."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from everstate.checkpoints import hub
from everstate.core.errors import CheckpointError

REPOSITORIES = {
    "owner/safe": ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "code.py", "README.md"],
    "owner/old": ["config.json", "pytorch_model.bin"],
    "owner/mistral": ["params.json", "consolidated.safetensors", "tokenizer.model.v3"],
    "owner/both": [
        "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "consolidated.safetensors",
    ],
    "owner/gguf": ["a.gguf", "b.gguf"],
}  # fmt: skip


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that serves `REPOSITORIES`, and the folder into which it downloads."""

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if repository not in REPOSITORIES:
            raise _error(errors.RepositoryNotFoundError)
        if revision not in (None, "main"):
            raise _error(errors.RevisionNotFoundError)
        folder = tmp_path / repository
        folder.mkdir(parents=True, exist_ok=True)
        for file in REPOSITORIES[repository]:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (folder / file).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path


def _error(kind: type[Exception]) -> Exception:
    return kind.__new__(kind)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("repository", "wanted"),
    [
        ("owner/safe", {"config.json", "model.safetensors", "tokenizer.json"}),
        ("owner/old", {"config.json", "pytorch_model.bin"}),
        ("owner/mistral", {"params.json", "consolidated.safetensors", "tokenizer.model.v3"}),
        ("owner/both", {"config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}),
    ],
)
def test_one_kind_of_weights_is_downloaded_and_never_code(served: Path, repository: str, wanted: set[str]) -> None:
    assert files(hub.fetch(repository, revision="main")) == wanted


def test_one_gguf_file_of_a_repository(served: Path) -> None:
    path = hub.fetch("owner/gguf/b.gguf")
    assert path == served / "owner/gguf/b.gguf"
    assert files(path.parent) == {"b.gguf"}
    with pytest.raises(CheckpointError, match="'owner/gguf/FILE.gguf' for one GGUF file"):
        hub.fetch("owner/gguf")


def test_of_a_tokenizer_nothing_else_is_downloaded(served: Path) -> None:
    assert files(hub.fetch_tokenizer("owner/safe")) == {"config.json", "tokenizer.json"}


def test_what_lies_here_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    assert hub.fetch(tmp_path) == tmp_path
    assert hub.fetch(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="has no revision 'main'"):
        hub.fetch(tmp_path, revision="main")


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "/no/where", "owner/na me", ""])
def test_names_that_are_neither(name: str) -> None:
    with pytest.raises(CheckpointError, match="is no folder, no .gguf file and no repository"):
        hub.fetch(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is no folder"):
        hub.fetch(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError, "there is no such repository"),
        (errors.GatedRepoError, "agree to terms first"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (OSError, "make room"),
    ],
)
def test_what_the_hub_says_in_one_line(error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise _error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.fetch("owner/name")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_cache_is_used(tmp_path: Path) -> None:
    """The cache as huggingface_hub lays it out."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = "import sys; from everstate.checkpoints.hub import fetch; [print(fetch(name)) for name in sys.argv[1:]]"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, "owner/name", "owner/other"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(snapshot)
    assert "owner/other is neither a folder here nor downloaded" in done.stderr
