"""Our own format: what is saved comes back to the bit, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import everstate
from everstate.checkpoints import files, load_config, load_model, read_tensors
from everstate.core.errors import CheckpointError, TokenizerError
from everstate.models import LM, ModelConfig
from everstate.tokenizers import ByteTokenizer, ChatTemplate, save_tokenizer

CONFIG = ModelConfig(
    d_model=16,
    vocab_size=258,
    layout="s5 mamba2",
    mixers={"mamba2": {"type": "mamba2", "headdim": 8, "d_state": 4}, "s5": {"type": "s5", "d_state": 8}},
    tie_embeddings=False,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_of_save_is_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = LM(CONFIG, dtype=dtype)
    everstate.save(model, ByteTokenizer(), tmp_path / "a" / "model")
    loaded, tokenizer = everstate.load(tmp_path / "a" / "model")
    assert loaded.config == CONFIG == load_config(tmp_path / "a" / "model")
    assert isinstance(tokenizer, ByteTokenizer)
    for (name, one), (other_name, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert other.requires_grad
    tokens = torch.randint(258, (2, 9))
    assert torch.equal(model(tokens, model.init_state(2))[0], loaded(tokens, loaded.init_state(2))[0])


def test_dtype_is_a_choice_of_the_reader(tmp_path: Path) -> None:
    everstate.save(LM(CONFIG), None, tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("A_log")} == {torch.float32}


def test_an_interrupted_save_leaves_the_previous_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = LM(CONFIG, seed=1)
    everstate.save(before, ByteTokenizer(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        everstate.save(LM(CONFIG, seed=2), ByteTokenizer(), tmp_path)
    after, _ = everstate.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device; what was there is unchanged"):
        everstate.save(LM(CONFIG), None, tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    everstate.save(LM(CONFIG), ByteTokenizer(), tmp_path)
    save_tokenizer(ByteTokenizer(ChatTemplate("{{ messages }}")), tmp_path)
    with pytest.raises(CheckpointError, match="not that of the model"):
        everstate.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="cannot write"):
        everstate.save(LM(CONFIG), ByteTokenizer(), tmp_path / "file")


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        everstate.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds neither"):
        everstate.load(tmp_path)
    everstate.save(LM(CONFIG), None, tmp_path)
    with pytest.raises(TokenizerError, match="no tokenizer"):
        everstate.load(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for cut in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(tmp_path)


def test_files_of_other_models_and_programs_are_refused(tmp_path: Path) -> None:
    everstate.save(LM(CONFIG), None, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, metadata = read_tensors(file)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="holds neither"):
        load_model(tmp_path)
    save_file(tensors, file, {**metadata, "config": "d_model = 'x'"})
    with pytest.raises(CheckpointError, match="cannot read"):
        load_model(tmp_path)
    wider = ModelConfig(**{**CONFIG.table(), "d_model": 32}).to_toml()
    save_file(tensors, file, {**metadata, "config": wider})
    with pytest.raises(CheckpointError, match=r"'blocks.0.mixer.*' is \(.*16.*\) in the file and \(.*32.*\)"):
        load_model(tmp_path)
    save_file({**tensors, "extra": torch.ones(1)}, file, metadata)
    with pytest.raises(CheckpointError, match=r"'extra' is \(1,\) in the file and unknown"):
        load_model(tmp_path)
