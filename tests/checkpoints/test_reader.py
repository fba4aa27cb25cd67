"""Tensor files as they are published: whole, in shards, in parts, quantised, and damaged in every way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from everstate.checkpoints.reader import base, dequantised, open_tensors, read_whole
from everstate.core.errors import CheckpointError

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "a.weight": torch.randn(70, 5, generator=GENERATOR),
    "b.weight": torch.randn(3, 4, 6, generator=GENERATOR).to(torch.bfloat16),
    "c.bias": torch.randn(11, generator=GENERATOR),
    "scalar": torch.tensor(2.5),
    "counts": torch.arange(4),
}


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def shards(folder: Path, name: str = "model.safetensors") -> Path:
    """Two shards and their index."""
    stem, suffix = name.split(".")
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    halves = dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:])
    for file, half in zip(files, halves, strict=True):
        write(folder / file, half)
    table = {tensor: file for file, half in zip(files, halves, strict=True) for tensor in half}
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": table}))
    return folder / files[1]


def write(path: Path, tensors: dict[str, Any]) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


@pytest.mark.parametrize("part", [1, 20, 64, 10**6])
@pytest.mark.parametrize("file", ["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"])
def test_what_was_written_is_read_in_parts_of_any_size(
    file: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PART", part)
    monkeypatch.setattr(base, "GROUP", 3 * part)
    write(tmp_path / file, TENSORS)
    reader = open_tensors(tmp_path)
    assert {name: (info.shape, info.dtype) for name, info in reader.infos.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    same(read_whole(reader, reader.infos), TENSORS)
    same(read_whole(reader, ["c.bias"]), {"c.bias": TENSORS["c.bias"]})
    starts = [rows.start for rows in reader.read(["a.weight"])]
    assert starts == sorted(set(starts))
    assert len(starts) == {1: 70, 20: 70, 64: 24, 10**6: 1}[part]


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_as_one(file: str, tmp_path: Path) -> None:
    shards(tmp_path, file)
    reader = open_tensors(tmp_path)
    same(read_whole(reader, reader.infos), TENSORS)


def test_old_pickles_and_wrapped_ones(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    reader = open_tensors(tmp_path)
    same(read_whole(reader, reader.infos), TENSORS)


def everything(folder: Path) -> dict[str, Tensor]:
    reader = open_tensors(folder)
    return read_whole(reader, reader.infos)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        everything(folder)
    assert "\n" not in str(caught.value)


def test_shards_that_do_not_agree_with_their_index(tmp_path: Path) -> None:
    second = shards(tmp_path)
    content = second.read_bytes()
    second.unlink()
    refused(tmp_path, f"{second.name} is missing, and .*index.json names it")
    save_file({name: TENSORS[name] for name in ("c.bias", "scalar")}, second)
    refused(tmp_path, f"{second.name}: tensor counts is missing")
    save_file({**dict(list(TENSORS.items())[2:]), "a.weight": torch.ones(1)}, second)
    refused(tmp_path, "tensor a.weight is in .*00001.* and in .*00002")
    for cut in (0, 7, 50, len(content) - 1):
        second.write_bytes(content[:cut])
        refused(tmp_path, f"{second.name} is damaged")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ""])
def test_an_index_names_files_of_its_own_folder_only(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(tmp_path, "which is no file of its folder")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "no table"), ('{"weight_map": 3}', "has no table weight_map")]
)
def test_an_index_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, message)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    refused(tmp_path, "none of model.safetensors, consolidated.safetensors, pytorch_model.bin")


class Command:
    """What a hostile pickle holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_is_run(zipped: bool, tmp_path: Path) -> None:
    held = {**TENSORS, "evil": Command(tmp_path / "hacked")}
    torch.save(held, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(tmp_path, "pytorch_model.bin is refused: .*Nothing was run")
    assert not (tmp_path / "hacked").exists()


def test_pickles_that_hold_something_else(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({**TENSORS, "epoch": 3}, file)
    refused(tmp_path, "'epoch' is a int and no tensor")
    torch.save([1], file)
    refused(tmp_path, "holds a list and no table")
    content = file.read_bytes()
    for cut in (0, 5, len(content) // 2):
        file.write_bytes(content[:cut])
        refused(tmp_path, "pytorch_model.bin is")


# 8-bit floats

WEIGHT = torch.randn(200, 300, generator=GENERATOR)


def quantised(folder: Path, scale: Tensor, wide: Tensor, name: str) -> Tensor:
    """Write a tensor with its scales; what it stands for."""
    eight = (WEIGHT / wide).to(torch.float8_e4m3fn)
    more = {"x.input_scale": torch.tensor(0.5), "x.k_scale": torch.tensor(1.0), "y.weight": TENSORS["b.weight"]}
    save_file({"x.weight": eight, f"x.{name}": scale, **more}, folder / "model.safetensors")
    return (eight.float() * wide).to(torch.bfloat16)


@pytest.mark.parametrize("part", [1000, 10**6])
@pytest.mark.parametrize(
    ("scale", "name", "config"),
    [
        (torch.tensor(0.01), "weight_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (torch.tensor([0.01]), "weight_scale", {"producer": {}, "quantization": {"quant_algo": "FP8"}}),
        (
            torch.rand(200, 1) + 0.01,
            "weight_scale",
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
        ),
        (torch.rand(2, 3) + 0.01, "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        (torch.rand(4, 5) + 0.01, "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        (torch.tensor(0.01), "weight_scale", None),
    ],
)
def test_eight_bits_become_sixteen(
    scale: Tensor, name: str, config: dict[str, Any] | None, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PART", part)
    wide = scale.expand(200, 1) if scale.numel() in (1, 200) else scale
    if wide.shape == scale.shape and scale.shape[-1] > 1:
        block = config["weight_block_size"][0] if config else 128
        wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[:200, :300]
    wanted = quantised(tmp_path, scale, wide, name)
    reader = dequantised(open_tensors(tmp_path), config)
    assert {key: info.dtype for key, info in reader.infos.items()} == dict.fromkeys(
        ("x.weight", "y.weight"), torch.bfloat16
    )
    same(read_whole(reader, reader.infos), {"x.weight": wanted, "y.weight": TENSORS["b.weight"]})


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quantization": {"quant_algo": "NVFP4"}},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
)
def test_other_ways_to_quantise_are_refused_by_name(config: dict[str, Any], tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantisation '.*' \\('.*'\\) is not implemented"):
        dequantised(open_tensors(tmp_path), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("fp8", "quantization_config = 'fp8' is no table"),
        ({"quantization": "x"}, "is no table"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size = 128 is no list of two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "is no list of two sizes"),
    ],
)
def test_a_quantisation_that_is_no_table(config: Any, message: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        dequantised(open_tensors(tmp_path), config)


def test_eight_bits_without_a_scale_or_with_scales_of_another_size(tmp_path: Path) -> None:
    save_file({"x.weight": WEIGHT.to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor x.weight has 8 bits and no x.weight_scale"):
        _ = dequantised(open_tensors(tmp_path), None).infos
    quantised(tmp_path, torch.ones(7, 7), torch.ones(1), "weight_scale_inv")
    reader = dequantised(open_tensors(tmp_path), {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="scales of tensor x.weight .* are \\(7, 7\\)"):
        read_whole(reader, reader.infos)
