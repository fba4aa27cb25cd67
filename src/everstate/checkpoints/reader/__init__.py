"""The tensors of published checkpoints: what lies in a folder, and reading it without a second copy in memory."""

from __future__ import annotations

from pathlib import Path

from everstate.checkpoints.families.settings import read_json
from everstate.checkpoints.reader.base import Rows, TensorInfo, TensorReader, read_whole
from everstate.checkpoints.reader.gguf import open_gguf
from everstate.checkpoints.reader.pickled import PickledReader
from everstate.checkpoints.reader.quantised import dequantised
from everstate.checkpoints.reader.renamed import renamed
from everstate.checkpoints.reader.safetensors import SafetensorsReader
from everstate.checkpoints.reader.unstacked import unstacked
from everstate.core.errors import CheckpointError

__all__ = [
    "Rows",
    "TensorInfo",
    "TensorReader",
    "dequantised",
    "open_gguf",
    "open_tensors",
    "read_whole",
    "renamed",
    "unstacked",
]

NAMES = ("model.safetensors", "consolidated.safetensors", "pytorch_model.bin")
"""The weights of a model, the first that is there; or an index beside them that names their parts."""


def open_tensors(folder: Path) -> TensorReader:
    """The tensors in a folder.

    Raises `CheckpointError` when there are none, or when the index does not agree with the files.
    """
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if index.exists():
            return _open_index(index)
        if (folder / name).exists():
            return _reader([folder / name])
    raise CheckpointError(
        f"{folder} holds no weights: none of {', '.join(NAMES)}, nor an index of one; give the folder of a model, or "
        "download it again"
    )


def _open_index(index: Path) -> TensorReader:
    """The tensors that an index names, each in the file that it names."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointError(f"{index} has no table weight_map of tensors and files; download it again")
    for file in sorted(set(table.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index} names {file!r}, which is no file of its folder; download it again")
        if not (index.parent / file).exists():
            raise CheckpointError(
                f"{index.parent / file} is missing, and {index.name} names it; the download is not complete: "
                "download it again"
            )
    reader = _reader([index.parent / file for file in sorted(set(table.values()))])
    for name, file in table.items():
        if name not in reader.infos or reader.infos[name].file.name != file:
            raise CheckpointError(f"{index.parent / file}: tensor {name} is missing, and {index.name} says it is there")
    return reader


def _reader(files: list[Path]) -> TensorReader:
    return PickledReader(files) if files[0].suffix == ".bin" else SafetensorsReader(files)
