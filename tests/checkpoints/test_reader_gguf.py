"""GGUF files in llama.cpp's conventions give the model that they were made of.

The conventions were taken from its converter, whose own files of the parity cases this reader was tried on.
"""

from __future__ import annotations

import json
import resource
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from everstate.checkpoints import export, load_model
from everstate.checkpoints.families import FAMILIES
from everstate.checkpoints.published import open_published, read_config
from everstate.checkpoints.reader import base, open_gguf, read_whole
from everstate.core.errors import CheckpointError
from everstate.models import LM, ModelConfig
from tests.checkpoints import llama_cpp

FILES = Path(__file__).parents[1] / "laws" / "families"
CASES = {
    "mamba": ("mamba", "default", {}),
    "mamba with biases": ("mamba", "untied with biases", {}),
    "falcon-mamba": ("mamba", ("falcon_mamba", "default"), {"mixer_rms_eps": 1e-6}),
    "mamba2": ("mamba2", "default", {}),
    "jamba": ("jamba", "default", {}),
    "bamba": ("granitehybrid", ("bamba", "default"), {}),
    "granite": ("granitehybrid", ("granitemoehybrid", "default"), {}),
    "granite, dense": (
        "granitehybrid",
        ("granitemoehybrid", "dense with positions"),
        {"position_embedding_type": "nope"},
    ),
    "granite, attention": ("granite", ("granitemoehybrid", "attention only"), {}),
    "nemotron": ("nemotron_h_moe", ("nemotron_h", "default"), {}),
    "nemotron, dense": ("nemotron_h", ("nemotron_h", "dense"), {}),
    "nemotron, latent": ("nemotron_h_moe", ("nemotron_h", "latent experts in groups"), {}),
    "falcon-h1": ("falcon-h1", ("falcon_h1", "published small"), {}),
}


def make(case: str, folder: Path, kind: str = "F32") -> tuple[Path, LM]:
    """A file, and the model that it holds."""
    architecture, source, changes = CASES[case]
    name, variant = source if isinstance(source, tuple) else (architecture, source)
    table: dict[str, Any] = {**json.loads((FILES / f"{name}.json").read_text())[variant], **changes}
    model = LM(read_config(FAMILIES[name], table, {}, "config.json"), seed=1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    export(model, folder / "published", name)
    published = open_published(folder / "published")
    written = json.loads((folder / "published" / "config.json").read_text())
    path = folder / "model.gguf"
    llama_cpp.write(path, architecture, written, read_whole(published.reader, published.reader.infos), kind)
    return path, model.eval()


@pytest.mark.parametrize("part", [100, 10**6])
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = make(case, tmp_path)
    monkeypatch.setattr(base, "PART", part)
    back = load_model(path).eval()
    tokens = torch.randint(model.config.vocab_size, (2, 15), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted, _ = model(tokens, model.init_state(2, context=16))
        got, _ = back(tokens, back.init_state(2, context=16))
    assert wanted.std() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.01), ("Q4_0", 0.2), ("BF16", 0.005), ("F16", 0.001)])
def test_few_bits_are_multiplied_out(kind: str, error: float, tmp_path: Path) -> None:
    path, model = make("mamba2", tmp_path, kind)
    back = load_model(path, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert (back[name] - tensor).abs().max() <= error * max(tensor.abs().max(), 1.0), name
    half = load_model(path)
    assert (
        half.dtype
        is {"Q8_0": torch.bfloat16, "Q4_0": torch.bfloat16, "BF16": torch.bfloat16, "F16": torch.float16}[kind]
    )


def test_a_k_quant_is_what_gguf_says(tmp_path: Path) -> None:
    """gguf writes no k-quants: blocks of random bytes stand for any numbers."""
    kind = gguf.GGMLQuantizationType.Q4_K
    path, model = make("mamba2", tmp_path)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    blocks = np.random.default_rng(0).integers(0, 60, (96, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    wide = {**json.loads((tmp_path / "published" / "config.json").read_text()), "hidden_size": 256}
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "mamba2")
    for name, value in llama_cpp.fields("mamba2", wide, read_all(tmp_path)).items():
        llama_cpp.add(writer, f"mamba2.{name}", value)
    for name, data in tensors.items():
        writer.add_tensor(
            name,
            blocks if name == "token_embd.weight" else data,
            raw_dtype=kind if name == "token_embd.weight" else None,
        )
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    _, reader, _ = open_gguf(tmp_path / "k.gguf")
    got = read_whole(reader, ["backbone.embeddings.weight"])["backbone.embeddings.weight"]
    torch.testing.assert_close(got, torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    assert got.shape == (96, 256)
    assert model.config.vocab_size == 96


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    reader = open_published(folder / "published").reader
    return read_whole(reader, reader.infos)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path, _ = make("mamba", tmp_path)
    content = path.read_bytes()
    for cut in (0, 10, 200, len(content) - 40):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"model\.gguf is damaged or no GGUF file"):
            load_model(path)
    path.write_bytes(content.replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(CheckpointError, match="architecture 'None' is not implemented"):
        load_model(path)
    path.write_bytes(content.replace(b"blk.1.ssm_out", b"blk.1.ssm_oot"))
    with pytest.raises(CheckpointError, match=r"tensor blk\.1\.ssm_oot\.weight has no place"):
        load_model(path)


def test_a_falcon_h1_that_has_lost_its_multipliers_is_refused(tmp_path: Path) -> None:
    path, _ = make("falcon-h1", tmp_path)
    path.write_bytes(path.read_bytes().replace(b"output.weight", b"oooput.weight"))
    with pytest.raises(CheckpointError, match="has lost the multipliers"):
        load_model(path)


def test_the_pages_of_a_file_do_not_stay_in_memory(tmp_path: Path) -> None:
    config = ModelConfig(d_model=1024, vocab_size=50_000, layout="mamba2", tie_embeddings=False)
    export(LM(config), tmp_path, "mamba2")
    reader = open_published(tmp_path).reader
    written = json.loads((tmp_path / "config.json").read_text())
    path = tmp_path / "model.gguf"
    llama_cpp.write(path, "mamba2", written, read_whole(reader, reader.infos))
    with get_context("spawn").Pool(1) as pool:
        weights, grown = pool.apply(_growth, (path,))
    # Some parts in float32 and the libraries' first use come on top; all pages of this file would be twice the weights.
    assert grown < 1.6 * weights, f"{grown / weights:.2f} times the weights"


def _growth(path: Path) -> tuple[int, int]:
    """Bytes of the weights in bfloat16, and by how much the peak of this process's memory grew for them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(parameter.nbytes for parameter in load_model(path, dtype=torch.bfloat16).parameters())
    return weights, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
        1 if sys.platform == "darwin" else 1024
    )
