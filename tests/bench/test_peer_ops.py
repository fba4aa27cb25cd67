"""What is given to peers, and what comes back: against plain forms of theirs under their names."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from everstate.bench import examples, kernels
from everstate.bench.peer_ops import PEERS, peers_of, step_peer
from everstate.bench.shapes import GPU_SHAPES, STEPS, op_of
from everstate.core.state import clone
from everstate.ops import OPS
from everstate.ops.example import Draw, Example

TOKENS = 9


def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, initial_state: Tensor, **settings: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys `(b, l, h, n)`, values `(b, l, h, p)`, log decays `(b, l, h)`, states `(b, h, p, n)`."""
    assert settings == {"output_final_state": True, "state_v_first": True}
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state + v[:, t, :, :, None] * k[:, t, :, None]
        outputs.append(scale * torch.einsum("bhpn,bhn->bhp", state, q[:, t]))
    return torch.stack(outputs, 1), state


def chunk_hgrn(x: Tensor, g: Tensor, initial_state: Tensor, output_final_state: bool) -> tuple[Tensor, Tensor]:
    state, outputs = initial_state, []
    for t in range(x.shape[1]):
        state = g[:, t].exp() * state + x[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1), state


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, initial_state: Tensor, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    """States `(b, d, k)` hold the last k inputs, the newest last."""
    past = torch.cat([initial_state[:, :, 1:], x.transpose(1, 2)], 2)
    outputs = (past.unfold(2, weight.shape[1], 1) * weight[:, None]).sum(3) + bias[:, None]
    return torch.nn.functional.silu(outputs).transpose(1, 2), past[:, :, -weight.shape[1] :]


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def fused_linear_cross_entropy_loss(x: Tensor, target: Tensor, weight: Tensor, *, reduction: str) -> Tensor:
    return torch.nn.functional.cross_entropy(x @ weight.T, target, reduction=reduction)


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, *, D: Tensor, initial_states: Tensor,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    keys, queries = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    y, state = chunk_simple_gla(
        queries, keys * dt[..., None], x, dt * A, scale=1.0, initial_state=initial_states, output_final_state=True,
        state_v_first=True,
    )  # fmt: skip
    return y + D[:, None] * x, state


def rmsnorm_fn(x: Tensor, weight: Tensor, bias: None, *, z: Tensor, eps: float, norm_before_gate: bool) -> Tensor:
    assert not norm_before_gate
    y = x * torch.nn.functional.silu(z)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """States `(b, d, n)` or `(b, h, d, n)`, written in place; one number for each channel of all others but B and C."""
    step = dt if dt_bias is None else dt + dt_bias
    step = torch.nn.functional.softplus(step) if dt_softplus else step
    keys, queries = (t.unsqueeze(-2) for t in (B, C))
    state.copy_(state * (step[..., None] * A).exp() + (step * x)[..., None] * keys)
    y = (state * queries).sum(-1) + D * x
    return y if z is None else y * torch.nn.functional.silu(z)


def parallel_attn(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor) -> Tensor:
    """One sequence after the other, with a head of keys and values for each of queries."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    parts = zip(*(t.transpose(1, 2).split(cu_seqlens.diff().tolist(), 2) for t in (q, k, v)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(*part, is_causal=True) for part in parts], 2).transpose(1, 2)


NAMES = {
    "fla.ops.simple_gla": chunk_simple_gla,
    "fla.ops.hgrn": chunk_hgrn,
    "fla.ops.attn": parallel_attn,
    "fla.modules.causal_conv1d": causal_conv1d,
    "fla.modules.rotary": rotary_embedding,
    "fla.modules.fused_linear_cross_entropy": fused_linear_cross_entropy_loss,
    "mamba_ssm.ops.triton.selective_state_update": selective_state_update,
    "mamba_ssm.ops.triton.ssd_combined": mamba_chunk_scan_combined,
    "mamba_ssm.ops.triton.layernorm_gated": rmsnorm_fn,
}


@pytest.fixture(autouse=True)
def _plain_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "mamba_ssm"):
        for known in [module for module in sys.modules if module.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, function in NAMES.items():
        for i in range(1, name.count(".") + 1):
            parent = name.rsplit(".", i)[0]
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module: Any = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "trapezoid_scan"])
def test_a_peer_computes_what_our_op_does(name: str, kernel_device: torch.device) -> None:
    if name == "experts":
        pytest.importorskip("transformers")
    example = examples.cut(GPU_SHAPES[name](Draw(dtype=torch.float32, device=kernel_device), 128, TOKENS), 3)
    peers = peers_of(name, example)
    assert list(peers) == list(PEERS[name])
    for who, peer in peers.items():
        assert kernels.scan_disagreement(op_of(name), who, peer, example) is None


@pytest.mark.parametrize(
    ("name", "width"), [("ssd_step_", 128), ("selective_step_", 128), ("attention_step_, paged", 8)]
)
def test_a_step_of_a_peer_computes_what_ours_does(name: str, width: int, kernel_device: torch.device) -> None:
    op, shape = op_of(name), STEPS[name]
    example = examples.cut(shape(Draw(dtype=torch.float32, device=kernel_device), width, 3), 3)
    token = {key: value[:, 0] for key, value in example.timed.items()} | example.fixed
    found = step_peer(name, token, example.state)
    assert found is not None
    assert kernels.step_disagreement(op, *found, token, example.state) is None
    wrong = lambda state: 2 * OPS[op](**token, state=clone(state))
    assert "differ from ours by 1e+00" in str(kernels.step_disagreement(op, "peer", wrong, token, example.state))
    # One that cannot be made on this machine.
    failing = step_peer(name, {}, example.state)
    assert failing is not None
    reason = str(kernels.step_disagreement(op, *failing, token, example.state))
    assert reason.startswith(f"{op} of {found[0]}: ")


def test_a_peer_that_is_not_installed_is_not_there() -> None:
    example = GPU_SHAPES["trapezoid_scan"](Draw(dtype=torch.float32), 128, TOKENS)
    assert peers_of("trapezoid_scan", example) == {}
    assert peers_of("selective_scan", GPU_SHAPES["selective_scan"](Draw(dtype=torch.float32), 128, TOKENS)) == {}
    assert step_peer("mamba3_step_", {}, None) is None


def test_a_peer_that_cannot_be_made_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(example: Example) -> Any:
        raise AttributeError("this Triton has no such thing")

    monkeypatch.setitem(PEERS, "ssd_scan", {"peer": make})
    example = GPU_SHAPES["ssd_scan"](Draw(dtype=torch.float32), 128, TOKENS)
    peer = peers_of("ssd_scan", example)["peer"]
    reason = kernels.scan_disagreement("ssd_scan", "peer", peer, example)
    assert reason == "ssd_scan of peer: this Triton has no such thing"
