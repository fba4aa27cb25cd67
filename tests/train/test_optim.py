"""Which parameters decay."""

from __future__ import annotations

import torch
from torch import nn

from everstate.mixers.modules import Special
from everstate.models import LM, ModelConfig
from everstate.train.optim import MasterAdamW, adamw, optimizer_tensors, parameter_groups, restore_optimizer_


def tiny() -> LM:
    return LM(ModelConfig(d_model=32, vocab_size=11, layout="mamba2"), seed=1)


def test_every_parameter_is_in_one_group_and_marks_are_obeyed() -> None:
    model = LM(
        ModelConfig(
            d_model=16, vocab_size=11, layout="ssm",
            mixers={"ssm": {"type": "mamba2", "d_state": 4, "headdim": 8, "D_has_hdim": True, "bias": True}},
        )
    )  # fmt: skip
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {names[p] for p in decayed["params"]} == {
        "embedding.weight",
        "blocks.0.mixer.in_proj.weight",
        "blocks.0.mixer.conv_weight",
        "blocks.0.mixer.out_proj.weight",
    }
    assert {names[p] for p in spared["params"]} == {
        "norm.weight",
        "blocks.0.norm.weight",
        "blocks.0.mixer.norm.weight",
        "blocks.0.mixer.in_proj.bias",
        "blocks.0.mixer.out_proj.bias",
        *(f"blocks.0.mixer.{name}" for name in ("conv_bias", "dt_bias", "A_log", "D")),
    }


def test_a_shared_parameter_is_spared_if_one_of_its_modules_asks() -> None:
    class Marked(Special):
        no_decay = frozenset({"weight"})

        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    plain = nn.Linear(3, 3, bias=False)
    (group,) = parameter_groups(nn.ModuleList([plain, Marked(plain.weight)]), 0.1)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == 1


def test_a_restored_optimizer_goes_on_as_the_first() -> None:
    def steps(model: LM, optimizer: torch.optim.Optimizer, count: int) -> None:
        for i in range(count):
            optimizer.zero_grad()
            tokens = torch.arange(i, i + 5)[None]
            model(tokens, model.init_state(1))[0].square().mean().backward()
            optimizer.step()

    def build() -> tuple[LM, torch.optim.Optimizer]:
        model = tiny()
        return model, adamw(model, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    first, one = build()
    steps(first, one, 2)
    second, other = build()
    second.load_state_dict(first.state_dict())
    restore_optimizer_(second, other, {k: t.clone() for k, t in optimizer_tensors(first, one).items()})
    steps(first, one, 3)
    steps(second, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_steps_too_small_for_bfloat16_add_up_in_the_master_copy() -> None:
    """The same gradients give the masters what torch's AdamW gives weights of float32."""
    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    low, wide = (LM(ModelConfig(d_model=32, vocab_size=11, layout="mamba2"), dtype=dtype) for dtype in
                 (torch.bfloat16, torch.float32))  # fmt: skip
    wide.load_state_dict(low.state_dict())
    begun = [p.detach().clone() for p in wide.parameters()]
    optimizers = adamw(low, **settings), adamw(wide, **settings)
    assert (type(optimizers[0]), type(optimizers[1])) == (MasterAdamW, torch.optim.AdamW)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p, q in zip(low.parameters(), wide.parameters(), strict=True):
            p.grad = (torch.randn(p.shape, generator=generator) + 0.5).to(p.dtype)
            q.grad = p.grad.to(q.dtype)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, start in zip(low.parameters(), wide.parameters(), begun, strict=True):
        master = optimizers[0].state[p].get("master", p)
        assert master.dtype == torch.float32
        assert torch.equal(master, q) and not torch.equal(q, start)
        assert torch.equal(p, q.to(p.dtype))


def test_a_restored_master_goes_on_as_the_first() -> None:
    def steps(model: LM, optimizer: torch.optim.Optimizer) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()

    first, second = (LM(ModelConfig(d_model=32, vocab_size=11, layout="mamba2"), dtype=torch.bfloat16, seed=s)
                     for s in (0, 1))  # fmt: skip
    one, other = (adamw(m, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1) for m in (first, second))
    steps(first, one)
    second.load_state_dict(first.state_dict())
    restore_optimizer_(second, other, {k: t.clone() for k, t in optimizer_tensors(first, one).items()})
    steps(first, one)
    steps(second, other)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
