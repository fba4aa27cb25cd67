"""8-bit floating point weights, multiplied by their scales as they are read.

Two ways of scaling are published: one scale for a tensor (NVIDIA's ModelOpt, `weight_scale`; compressed-tensors), and
one for each block of it (DeepSeek's, `weight_scale_inv`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everstate.checkpoints.reader.base import Rows, TensorInfo, TensorReader, read_whole
from everstate.core.errors import CheckpointError

SCALES = ("weight_scale", "weight_scale_inv")
UNUSED = ("input_scale", "k_scale", "v_scale", "output_scale")
"""Scales of activations and caches, which 16-bit arithmetic does not need."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = (128, 128)
METHODS = ("fp8", "modelopt", "compressed-tensors")


def dequantised(reader: TensorReader, quantization: Any) -> TensorReader:
    """The tensors as bfloat16 where they are 8-bit floats with scales; others as they are.

    quantization: `quantization_config` of a config, or the content of `hf_quant_config.json`. Raises `CheckpointError`
    for other ways to quantise.
    """
    if quantization is None:
        if any(info.dtype in FLOAT8 for info in reader.infos.values()):
            return DequantisingReader(reader, BLOCK)
        return reader
    inner = quantization.get("quantization", quantization) if isinstance(quantization, dict) else None
    if not isinstance(inner, dict):
        raise CheckpointError(
            f"{_folder(reader)}: quantization_config = {quantization!r} is no table; download the config again"
        )
    method = str(quantization.get("quant_method", "modelopt" if "quantization" in quantization else "")).lower()
    algorithm = str(inner.get("quant_algo", inner.get("format", method))).lower()
    eight = "fp8" in algorithm or algorithm in ("float-quantized", "naive-quantized")
    if method not in METHODS or "nvfp4" in algorithm or not eight:
        raise CheckpointError(
            f"{_folder(reader)}: quantisation {method or 'unnamed'!r} ({algorithm!r}) is not implemented; Everstate "
            "reads 8-bit floats (FP8) and GGUF files: use one of those, or the version that is not quantised"
        )
    block = inner.get("weight_block_size") or list(BLOCK)
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise CheckpointError(f"{_folder(reader)}: weight_block_size = {block!r} is no list of two sizes")
    return DequantisingReader(reader, (block[0], block[1]))


def _folder(reader: TensorReader) -> Path:
    return next(iter(reader.infos.values())).file.parent


class DequantisingReader(TensorReader):
    """Another reader's tensors, with the 8-bit ones multiplied by their scales, which are then gone.

    block: rows and columns that share a scale, where a tensor has several.
    """

    def __init__(self, reader: TensorReader, block: tuple[int, int]) -> None:
        self._reader, self._block = reader, block

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        found = {}
        for name, info in self._reader.infos.items():
            if name.rpartition(".")[2] in (*SCALES, *UNUSED):
                continue
            if info.dtype in FLOAT8:
                self._scale_of(name)
                info = info._replace(dtype=torch.bfloat16)
            found[name] = info
        return found

    def read(self, names: Collection[str]) -> Iterator[Rows]:
        scaled = {name: self._scale_of(name) for name in names if self._reader.infos[name].dtype in FLOAT8}
        scales = read_whole(self._reader, set(scaled.values()))
        for rows in self._reader.read(names):
            if rows.name in scaled:
                scale = self._rows_of(scales[scaled[rows.name]], rows)
                yield rows._replace(values=(rows.values.to(torch.float32) * scale).to(torch.bfloat16))
            else:
                yield rows

    def _scale_of(self, name: str) -> str:
        """The name of the scale of an 8-bit tensor."""
        stem, _, own = name.rpartition(".")
        found = [f"{stem}.{own}{scale.removeprefix('weight')}" for scale in SCALES]
        scale = next((each for each in found if each in self._reader.infos), None)
        if scale is None:
            raise CheckpointError(
                f"{self._reader.infos[name].file}: tensor {name} has 8 bits and no {' or '.join(found)}; download the "
                "model again"
            )
        return scale

    def _rows_of(self, scale: Tensor, rows: Rows) -> Tensor:
        """What to multiply some rows of a tensor by, in float32."""
        info, scale = self._reader.infos[rows.name], scale.to(torch.float32)
        now = slice(rows.start, rows.start + len(rows.values))
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.numel() == info.shape[0]:
            return scale.reshape(-1, *[1] * (len(info.shape) - 1))[now]
        blocks = tuple(-(-size // block) for size, block in zip(info.shape[:2], self._block, strict=False))
        if len(info.shape) != 2 or tuple(scale.shape) != blocks:
            raise CheckpointError(
                f"{info.file}: the scales of tensor {rows.name} {info.shape} are {tuple(scale.shape)}, and blocks of "
                f"{self._block} make {blocks}; download the model again"
            )
        wide = scale.repeat_interleave(self._block[1], 1)[:, : info.shape[1]]
        return wide[torch.arange(now.start, now.stop) // self._block[0]]
