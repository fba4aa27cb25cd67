"""Whole models under `torch.compile(fullgraph=True)`, with the kernels loaded: a training step, and a decoding step.

A session of its own runs these (`test_session.py`): what checks shapes elsewhere is no code that a compiler can trace.
On a GPU the compiler is the real one; elsewhere it only traces, with the kernels in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.core.state import clone, tensors
from everstate.models import LM, ModelConfig
from everstate.ops import OPS, linear_cross_entropy

ON_GPU = torch.cuda.is_available()
BACKEND = "inductor" if ON_GPU else "aot_eager"
LAYOUTS = ["mamba2", "mamba3 mlp", "attention mlp"] if ON_GPU else ["mamba2 mlp attention", "mamba3"]
if ON_GPU and "triton" in OPS["selective_scan"].backends():
    LAYOUTS += ["mamba1"]  # its PyTorch form cannot be traced backward: it writes into parts of tensors

TURNED = {"type": "attention", "rope_theta": 100.0}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def small(
    layout: str, device: torch.device, width: int = 64 if ON_GPU else 32, dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> LM:  # fmt: skip
    for op in OPS.values():
        op.load()
    settings.setdefault("mixers", {"attention": TURNED} if "attention" in layout else {})
    return LM(ModelConfig(d_model=width, vocab_size=50, layout=layout, **settings), device=device, dtype=dtype)


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_step(layout: str, kernel_device: torch.device) -> None:
    model, tokens = small(layout, kernel_device), tokens_of(2, 71 if ON_GPU else 4).to(kernel_device)

    def loss(tokens: Tensor) -> Tensor:
        hidden, _ = model.hidden(tokens[:, :-1], model.init_state(len(tokens), context=0))
        return linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:]).mean()

    parameters = list(model.parameters())
    compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
    for batch in (tokens, tokens.flip(0)):  # the second time nothing is compiled
        got, expected = compiled(batch), loss(batch)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(each, parameters) for each in (got, expected))
        for one, other in zip(*gradients, strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decoding_step(layout: str, kernel_device: torch.device) -> None:
    model = small(layout, kernel_device)
    prompt, token = tokens_of(3, 5).to(kernel_device), tokens_of(3).to(kernel_device)
    with torch.no_grad():
        _, state = model.hidden(prompt, model.init_state(3, context=40))
    mine, theirs = clone(state), clone(state)
    compiled = torch.compile(lambda token: model.step_(token, mine), fullgraph=True, backend=BACKEND)
    for _ in range(2):
        torch.testing.assert_close(compiled(token), model.step_(token, theirs), rtol=1e-4, atol=1e-4)
    for one, other in zip(tensors(mine), tensors(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


EXPERTS = {"type": "moe", "nexperts": 4, "d_shared": 128}
SIDE = {"type": "parallel", "mixers": {"ssm": {"type": "mamba2"}, "attn": TURNED}}


@pytest.mark.parametrize(
    ("layout", "mixers"),
    [
        ("mamba2 mamba1 mlp attention", {}),
        ("mamba2 experts mamba2", {"experts": EXPERTS}),
        ("mamba2 experts mamba2", {"experts": {**EXPERTS, "shared_gate": True}}),
        ("2 * (side mlp)", {"side": SIDE}),
    ],
    ids=["plain", "experts", "gated experts", "side by side"],
)
def test_a_decoding_step_of_many_batch_sizes(
    layout: str, mixers: dict[str, dict[str, Any]], kernel_device: torch.device
) -> None:
    model = small(layout, kernel_device, 128, torch.bfloat16, mixers=mixers)
    compiled = torch.compile(model.step_, fullgraph=True, backend="aot_eager")
    for rows in (5, 6, 7, 8, 15):
        tokens, mine = tokens_of(rows).to(kernel_device), model.init_state(rows, context=8)
        theirs = clone(mine)
        # Traced for the first size, then for any; and once more for those that fill a GPU with larger tiles.
        with torch._dynamo.config.patch(recompile_limit=3):
            got = compiled(tokens, mine)
        expected = model.step_(tokens, theirs)
        assert (got - expected).float().norm() <= 1e-2 * expected.float().norm()
        assert all(map(torch.equal, tensors(mine), tensors(theirs)))
