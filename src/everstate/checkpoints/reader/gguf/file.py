"""A GGUF file through the package `gguf`: its fields, and its tensors multiplied out one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everstate.core.errors import CheckpointError

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of numbers that are kept; all others are blocks of few bits with a scale, and become bfloat16."""
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


class GGUFFile:
    """The fields and tensors of a file. Shapes are as in PyTorch, rows first.

    Raises `CheckpointError` when it is no GGUF file, when it has been cut off, or when the package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import gguf
        except ImportError:
            raise CheckpointError(
                f"{path}: reading GGUF files takes the package gguf; pip install 'everstate[gguf]'"
            ) from None
        self._gguf = gguf
        try:
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OSError, TypeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path} is damaged or no GGUF file ({error}); it may have been cut off: download it again"
            ) from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        for name, tensor in self.tensors.items():
            if tensor.tensor_type.name not in (*PLAIN, *BLOCKS):
                raise CheckpointError(
                    f"{path}: tensor {name} has numbers of type {tensor.tensor_type.name}, which is not implemented; "
                    f"Everstate has {', '.join((*PLAIN, *BLOCKS))}"
                )

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the kind of model."""
        return str(self._fields.get("general.architecture"))

    @property
    def tokenizer(self) -> dict[str, Any]:
        """All fields about the tokenizer."""
        return {name: value for name, value in self._fields.items() if name.startswith("tokenizer.")}

    @property
    def layers(self) -> int:
        """How many there are, without those that predict further tokens."""
        return int(self.field("block_count")) - int(self.field("nextn_predict_layers", 0))

    def is_skipped(self, tensor: str) -> bool:
        """Whether a tensor belongs to a layer that predicts further tokens, or follows from the config."""
        parts = tensor.split(".")
        return tensor == "rope_freqs.weight" or (parts[0] == "blk" and int(parts[1]) >= self.layers)

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the architecture; without a default it has to be there."""
        value = self._fields.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise CheckpointError(f"{self.path}: field {self.architecture}.{name} is missing; download the file again")
        # A number was written with 32 bits; the shortest decimal that gives these bits is the one that was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def has(self, tensor: str) -> bool:
        """Whether a tensor is there."""
        return tensor in self.tensors

    def rows(self, tensor: str) -> int:
        """How many rows a tensor has."""
        return self.shape(tensor)[-2]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises `CheckpointError` when it is missing."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; download the file again")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is best held."""
        return PLAIN.get(self.tensors[name].tensor_type.name, torch.bfloat16)

    def values(self, name: str, rows: int | slice | None) -> Tensor:
        """The numbers of a tensor, of some rows of it, or of one expert of a stack, in float32."""
        tensor, shape = self.tensors[name], self.shape(name)
        # A map of its own for each read: its pages count as memory of the process as long as it lives.
        offset, like = int(tensor.data_offset), tensor.data
        stored = np.memmap(self.path, like.dtype, mode="c", offset=offset, shape=like.shape)
        if rows is not None:
            shape = shape[1:] if isinstance(rows, int) else (-1, *shape[1:])
        numbers = self._gguf.quants.dequantize(stored if rows is None else stored[rows], tensor.tensor_type)
        return torch.from_numpy(numbers.astype(np.float32, copy=False).reshape(shape))
