"""`inspect`, `convert`, `verify` and `generate` on published models, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import everstate
from everstate.checkpoints import export
from everstate.models import LM, ModelConfig
from everstate.tokenizers import ChatTemplate, HFTokenizer
from tests.cli.test_cli import ok
from tests.commands import run
from tests.tokenizers.published import EOS, byte_level

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)
MIXERS = {
    "ssm": {"type": "mamba3", "headdim": 8, "d_state": 4, "A_activation": "heavy_tail"},
    "mlp": {"type": "mlp", "d_hidden": 128},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    words = HFTokenizer(byte_level(), chat=ChatTemplate(TEMPLATE))
    end = words.token_id(EOS)
    assert end is not None
    words.mark_(None, (end,))
    config = ModelConfig(d_model=16, vocab_size=424, layout="2 * (ssm mlp)", mixers=MIXERS)
    export(LM(config), place / "mamba3", "mamba_ssm", tokenizer=words)
    (place / "text.txt").write_text("def main():\n    return 'hello world'\n" * 8)
    return place


def test_inspect_says_what_it_is(folder: Path) -> None:
    text = ok(folder, "inspect", "mamba3")
    assert text.startswith("mamba_ssm mamba3")
    for part in (
        "layout      2 * (ssm mlp)",
        "blocks      M-M-",
        "M mamba3, 2 times",
        "parameters",
        "in float32",
        "1,000,000",
    ):
        assert part in text


def test_verify_tries_every_way_to_read(folder: Path) -> None:
    text = ok(folder, "verify", "mamba3")
    for way in ("in chunks", "token by token", "packed with others", "saved and restored"):
        assert way in text
    assert text.count(" ok ") == 4


def test_verify_compares_the_activations_on_a_text(folder: Path) -> None:
    lines = ok(folder, "verify", "mamba3", "--text", "text.txt").splitlines()
    found = [line for line in lines if line.startswith("perplexity")]
    assert [line.rpartition(":")[0].rpartition("= ")[2] for line in found] == ["heavy_tail", "softplus"]
    values = [float(line.rpartition(": ")[2]) for line in found]
    assert all(1 < value < 10_000 for value in values)
    assert values[0] != values[1]
    better = "heavy_tail" if values[0] < values[1] else "softplus"
    assert lines[-1] == f"A_activation = {better} fits this text"


def test_convert_there_and_back(folder: Path) -> None:
    assert "wrote own" in ok(folder, "convert", "mamba3", "own")
    ok(folder, "convert", "own", "again", "--to", "mamba_ssm")
    ok(folder, "convert", "own", "half", "--to", "mamba_ssm", "--dtype", "bfloat16")
    options = ["-n", "12", "--seed", "1", "hello"]
    first = ok(folder, "generate", "-m", "mamba3", *options)
    assert first == ok(folder, "generate", "-m", "own", *options) == ok(folder, "generate", "-m", "again", *options)
    config = json.loads((folder / "again" / "config.json").read_text())
    assert config["ssm_cfg"]["layer"] == "Mamba3"
    model, _ = everstate.load(folder / "half")
    assert str(model.dtype) == "torch.bfloat16"


def test_an_answer_to_a_message(folder: Path) -> None:
    options = ["-n", "8", "--seed", "2", "--json"]
    answer = json.loads(ok(folder, "generate", "-m", "mamba3", "--chat", *options, "hello"))
    whole = json.loads(ok(folder, "generate", "-m", "mamba3", *options, "user: hello\nanswer:"))
    assert answer["text"] == whole["text"]
    assert answer["prompt_tokens"] == whole["prompt_tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nothing"], "nothing is no folder, no .gguf file and no repository"),
        (["verify", "mamba3", "--dtype", "float8"], "dtype 'float8' is not one of"),
        (["verify", "mamba3", "--text", "none.txt"], "cannot read none.txt"),
        (["convert", "mamba3", "mamba3"], "mamba3 is there and not empty"),
        (["convert", "mamba3", "new", "--to", "mamba4"], "there is no format 'mamba4'; did you mean 'mamba'"),
        (["convert", "mamba3", "new", "--to", "mamba2"], "cannot be written as 'mamba2'"),
        (["inspect", "mamba3", "--revision", "main"], "has no revision 'main'"),
    ],
)
def test_errors_are_one_line(folder: Path, words: list[str], message: str) -> None:
    done = run(folder, *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (folder / "new").exists()
