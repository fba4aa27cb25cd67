"""Models of the Hugging Face hub. Nothing else in the package touches the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from everstate.core.errors import CheckpointError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "config.json",
    "*.jinja", "*/*.jinja", "*.model", "*.model.v*", "*.tiktoken",
)  # fmt: skip
CONFIG_FILES = ("config.json", "params.json", "hf_quant_config.json", "*.index.json", *TOKENIZER_FILES)
WEIGHTS = ("model*.safetensors", "consolidated*.safetensors", "pytorch_model*.bin")
"""Kinds of weights, the first of which that a repository has is downloaded."""


def fetch(model: Path | str, *, revision: str | None = None) -> Path:
    """A folder with a model, or a GGUF file: a path as it is, or a repository of the hub, downloaded if need be.

    A repository is `owner/name`, or `owner/name/file.gguf` for one file of it. Without a network the files that were
    downloaded before are used. Raises `CheckpointError` when there is nothing of that name, or no way to it.
    """
    return _found(model, revision, None)


def fetch_tokenizer(tokenizer: Path | str, *, revision: str | None = None) -> Path:
    """The folder of a tokenizer; of a repository nothing but the tokenizer's files is downloaded."""
    return _found(tokenizer, revision, TOKENIZER_FILES)


def _found(model: Path | str, revision: str | None, patterns: Sequence[str] | None) -> Path:
    path, name = Path(model), str(model)
    if name and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        if revision is not None:
            raise CheckpointError(f"{path} lies here and has no revision {revision!r}; leave the revision out")
        return path
    repository, _, file = name.partition(".gguf")[0].rpartition("/") if name.endswith(".gguf") else (name, "", "")
    if path.exists() or not isinstance(model, str) or not REPOSITORY.fullmatch(repository):
        raise CheckpointError(
            f"{model} is no folder, no .gguf file and no repository of the hub; give the folder that everstate.save, "
            "everstate train or a download wrote, or a name such as 'state-spaces/mamba2-130m'"
        )
    if file:
        return _download(repository, revision, [f"{file}.gguf"]) / f"{file}.gguf"
    return _download(repository, revision, patterns)


def _download(repository: str, revision: str | None, patterns: Sequence[str] | None) -> Path:
    """The files of a repository: those that are asked for, or else all that a model takes, and never code."""
    if patterns is not None:
        return _snapshot(repository, revision, patterns)
    for kind in WEIGHTS:
        folder = _snapshot(repository, revision, [*CONFIG_FILES, kind])
        if any(folder.glob(kind)):
            return folder
    raise CheckpointError(
        f"{repository} has no weights that Everstate reads: none of {', '.join(WEIGHTS)}; give another repository, or "
        f"'{repository}/FILE.gguf' for one GGUF file of it"
    )


def _snapshot(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder with these files, downloaded, or as they were downloaded before when the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repository} is neither a folder here nor downloaded, and the hub cannot be reached; check the name, "
            "or the network"
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{repository} cannot be downloaded: {_reason(error)}") from None
    except OSError as error:
        raise CheckpointError(f"{repository} cannot be downloaded: {error}; make room, and try again") from None


def _reason(error: Exception) -> str:
    """The hub's answer in one line, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    match error:
        case GatedRepoError():
            return "its owner wants you to agree to terms first; do so on its page, and log in with 'hf auth login'"
        case RepositoryNotFoundError():
            return "there is no such repository, or it is private; check the name, or log in with 'hf auth login'"
        case RevisionNotFoundError():
            return "it has no such revision; give a branch, a tag or a commit of it"
    return str(error).splitlines()[0]
