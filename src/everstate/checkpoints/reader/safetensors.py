"""Tensors in safetensors files, one or many."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch

from everstate.checkpoints.files import opened
from everstate.checkpoints.reader.base import Rows, TensorInfo, TensorReader, groups
from everstate.core.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class SafetensorsReader(TensorReader):
    """The tensors of some safetensors files, no name twice."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for path in self._files:
            with opened(path) as file:
                for name in file.offset_keys():
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise CheckpointError(
                            f"{path}: tensor {name} has dtype {part.get_dtype()}, which is not implemented; Everstate "
                            f"has {', '.join(DTYPES)}"
                        )
                    if name in found:
                        raise CheckpointError(f"tensor {name} is in {found[name].file} and in {path}; keep one of them")
                    found[name] = TensorInfo(tuple(part.get_shape()), DTYPES[part.get_dtype()], path)
        return found

    def read(self, names: Collection[str]) -> Iterator[Rows]:
        wanted = set(names)
        for path in self._files:
            here = [name for name, info in self.infos.items() if info.file == path and name in wanted]
            # Tensors of an open file are views of a memory map, the pages of which count as the memory of the process
            # until it is closed: so it is opened anew for each group of parts.
            for group in groups(self.infos, here):
                with opened(path) as file:
                    for name, start, end in group:
                        values = file.get_slice(name)[start:end] if end else file.get_tensor(name)
                        yield Rows(name, start, values)
                        del values
