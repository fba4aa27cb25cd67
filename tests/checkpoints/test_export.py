"""Writing published formats: whole folders or none, in shards, with the tokenizer, and refusals that say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import everstate
from everstate.checkpoints import export, load_model
from everstate.checkpoints import export as export_function
from everstate.checkpoints.reader import base
from everstate.core.errors import CheckpointError, TokenizerError
from everstate.models import LM, ModelConfig
from everstate.tokenizers import ByteTokenizer, HFTokenizer
from tests.laws.test_families import build
from tests.tokenizers.published import BOS, EOS, byte_level

SSM = {"type": "mamba2", "headdim": 8, "d_state": 4}
CONFIG = ModelConfig(d_model=16, vocab_size=420, layout="2 * ssm", mixers={"ssm": SSM})


def tokenizer() -> HFTokenizer:
    found = HFTokenizer(byte_level())
    bos, eos = found.token_id(BOS), found.token_id(EOS)
    assert bos is not None and eos is not None
    return HFTokenizer(byte_level(), bos_id=bos, eos_ids=(eos,))


def test_a_model_made_here_is_published_with_its_tokenizer(tmp_path: Path) -> None:
    model, text = LM(CONFIG), tokenizer()
    export(model, tmp_path / "out", "mamba2", tokenizer=text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mamba2"
    assert config["num_heads"] == 4
    assert (config["bos_token_id"], config["eos_token_id"]) == (text.bos_id, list(text.eos_ids))
    back, words = everstate.load(tmp_path / "out")
    assert words.encode("hello 日本") == text.encode("hello 日本")
    assert (words.bos_id, words.eos_ids) == (text.bos_id, text.eos_ids)
    assert everstate.generate(back, words, "he", max_tokens=5, seed=1) == everstate.generate(
        model, text, "he", max_tokens=5, seed=1
    )


def test_transformers_finds_model_and_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, text = LM(CONFIG).eval(), tokenizer()
    export(model, tmp_path / "out", "mamba2", tokenizer=text)
    ids = torch.tensor([text.encode("hello world, hello")])
    with torch.no_grad():
        wanted, _ = model(ids, model.init_state(1))
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(peer(ids).logits, wanted, rtol=0, atol=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("hello world, hello", add_special_tokens=False)["input_ids"] == ids[0].tolist()


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules[export_function.__module__], "SHARD", "10KB")
    model = LM(CONFIG)
    export(model, tmp_path / "out", "mamba2")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0].startswith("model-00001-of-")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    back = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


def test_the_dtype_of_the_file(tmp_path: Path) -> None:
    export(LM(CONFIG), tmp_path / "out", "mamba2", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = load_model(tmp_path / "out")
    assert model.dtype is torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert model.layers[0].mixer.A_log.dtype is torch.float32


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mamba", {}, "cannot be written as 'mamba', which has no such layers"),
        ("jamba", {}, "cannot be written as 'jamba'"),
        ("mamba2", {"embedding_multiplier": 2.0}, r"would change embedding_multiplier: 2.0 and 1.0"),
        ("mamba2", {"mixers": {"ssm": {**SSM, "norm": False}}}, "would change block 0 norm: False and True"),
        ("mamba2", {"norm": "layer"}, "cannot be written as 'mamba2'"),
        ("mamba2", {"layout": "ssm mlp"}, "cannot be written as 'mamba2'"),
        ("codestral", {"mixers": {"ssm": {**SSM, "dt_limit": (0.01, 0.1)}}}, "would change block 0 dt_limit"),
    ],
)
def test_a_format_that_cannot_say_what_the_model_is(
    family: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    model = LM(ModelConfig.parse({**CONFIG.table(), **changes}), device="meta")
    with pytest.raises(CheckpointError, match=message):
        export(model, tmp_path / "out", family)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(CheckpointError, match="is there and not empty"):
        export(LM(CONFIG), tmp_path / "full", "mamba2")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    import sys

    monkeypatch.setattr(sys.modules[export_function.__module__], "save_file", fail)
    with pytest.raises(CheckpointError, match="no space left; nothing was written"):
        export(LM(CONFIG), tmp_path / "out", "mamba2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_model_without_a_tokenizer_takes_one_from_elsewhere(tmp_path: Path) -> None:
    export(LM(ModelConfig.parse({**CONFIG.table(), "vocab_size": 258})), tmp_path / "out", "mamba2")
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        everstate.load(tmp_path / "out")
    everstate.tokenizers.save_tokenizer(ByteTokenizer(), tmp_path / "words")
    _, words = everstate.load(tmp_path / "out", tokenizer=tmp_path / "words")
    assert isinstance(words, ByteTokenizer)


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    export(LM(CONFIG), tmp_path / "out", "mamba2")
    told: list[tuple[int, int]] = []
    load_model(tmp_path / "out", watch=lambda done, total: told.append((done, total)))
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("part", [100, 10**6])
@pytest.mark.parametrize("name", ["qwen3_5_moe", "jamba", "nemotron_h"])
def test_experts_in_one_tensor_are_taken_apart(
    name: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers holds them in memory, and as some checkpoints are published."""
    model = build(name, "default")
    export(model, tmp_path / "out", name)
    file = tmp_path / "out" / "model.safetensors"
    weights, stacks = load_file(file), {}
    for key in [key for key in weights if ".experts." in key]:
        stem, _, rest = key.partition(".experts.")
        module = rest.split(".")[1].replace("gate_proj", "gate_up_proj")
        gate = weights[key]
        if module == "gate_up_proj":
            gate = torch.cat([gate, weights[key.replace("gate_proj", "up_proj")]])
        stacks.setdefault(f"{stem}.experts.{module}", []).append(gate)
    weights = {key: tensor for key, tensor in weights.items() if ".experts." not in key}
    gated = {key for key in stacks if key.endswith("gate_up_proj")}
    doubled = {key.replace("gate_up_proj", "up_proj") for key in gated}
    save_file(weights | {key: torch.stack(rows) for key, rows in stacks.items() if key not in doubled}, file)
    monkeypatch.setattr(base, "PART", part)
    back = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


def test_a_head_that_is_said_to_be_tied_and_is_not(tmp_path: Path) -> None:
    config = ModelConfig.parse({**CONFIG.table(), "tie_embeddings": False})
    export(LM(config), tmp_path / "out", "mamba2")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from the embedding"):
        load_model(tmp_path / "out")
