"""The ops of `mamba_ssm`, `fla` and `transformers` that compute what ours do, where these are installed, and PyTorch's.

What a peer wants in another form is made before it is timed. A peer whose outputs are not ours is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from warnings import catch_warnings

import torch
from torch import Tensor

from everstate.core.state import tensors
from everstate.ops import OPS, rms_norm, use
from everstate.ops.example import Example
from everstate.ops.mamba3.ends import enter

Run = Callable[[Example], list[Tensor]]
"""From an example to what the op returns, tensor by tensor."""
Step = Callable[[Any], Any]
"""From a pool of states to the outputs of one token, or to a tuple with them first."""


def run_op(op: str, example: Example) -> list[Tensor]:
    """What our op returns, tensor by tensor, without counts of tokens."""
    state = {} if example.state is None else {"state": example.state}
    returned = tensors(OPS[op](**example.timed, **state, **example.fixed))
    return [tensor for tensor in returned if is_number(tensor)]


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, and no indices."""
    return tensor.is_floating_point() or tensor.is_complex()


def peers_of(name: str, example: Example) -> dict[str, Run]:
    """Peer -> the same op, ready for arguments of the shapes of `example`; only those that are installed.

    One that cannot be made is an op that fails.
    """
    found: dict[str, Run] = {}
    for peer, make in PEERS.get(name, {}).items():
        try:
            with suppress(ImportError), catch_warnings(action="ignore"):
                found[peer] = make(example)
        except Exception as error:
            found[peer] = _failing(error)
    return found


def _failing(error: Exception) -> Callable[[Any], Any]:
    def fail(_: Any) -> Any:
        raise error

    return fail


def _ssd_of_mamba_ssm(example: Example) -> Run:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    # The peer takes dt and A, and multiplies them itself.
    A = (example.timed["a"][0, 0] / example.timed["s"][0, 0]).detach().requires_grad_()

    def scan(one: Example) -> list[Tensor]:
        x, dt, B, C = (one.timed[name] for name in ("x", "s", "B", "C"))
        settings = {"D": one.fixed["D"], "initial_states": one.state, "return_final_states": True}
        return list(mamba_chunk_scan_combined(x, dt, A, B, C, 256, **settings))

    return scan


def _ssd_of_fla(example: Example) -> Run:
    """Without D, which this peer has not, and with keys that were scaled and repeated for each head before."""
    from fla.ops.simple_gla import chunk_simple_gla

    timed = {name: value.detach() for name, value in example.timed.items()}
    by_head = lambda t: t.repeat_interleave(timed["x"].shape[2] // t.shape[2], 2)
    keys = (by_head(timed["B"]) * timed["s"].unsqueeze(-1)).to(timed["x"].dtype).requires_grad_()
    queries = by_head(timed["C"]).requires_grad_()

    def scan(one: Example) -> list[Tensor]:
        settings = {"initial_state": one.state, "output_final_state": True, "state_v_first": True}
        return list(chunk_simple_gla(queries, keys, one.timed["x"], one.timed["a"], scale=1.0, **settings))

    return scan


def _trapezoid_of_mamba_ssm(example: Example) -> Run:
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    # The peer takes numbers by head and token, A times dt, and a rate for each head, of which it takes pi tanh.
    timed, heads = {name: value.detach() for name, value in example.timed.items()}, example.timed["x"].shape[2]
    dt, lam = (timed[name].transpose(1, 2).contiguous() for name in ("dt", "lam"))
    rates = torch.atanh((timed["omega"] / torch.pi).clamp(-0.999, 0.999)).to(torch.bfloat16)
    prepared = (timed["A"].transpose(1, 2) * dt, dt, torch.logit(lam), rates.unsqueeze(2).expand(-1, -1, heads, -1))
    ADT, DT, Trap, Angles = (t.requires_grad_() for t in prepared)

    def scan(one: Example) -> list[Tensor]:
        B, C, x = (one.timed[name].squeeze(2) if name in "BC" else one.timed[name] for name in ("B", "C", "x"))
        B_bias, C_bias = (one.fixed[name].squeeze(1) for name in ("B_bias", "C_bias"))
        ssm, k, last, angle = one.state
        states = (angle, ssm, k.squeeze(1), last)
        settings = {"D": one.fixed["D"], "Input_States": states, "return_final_states": True}
        return list(mamba3_siso_combined(C, B, x, ADT, DT, Trap, C_bias, B_bias, Angles, **settings))

    return scan


def _linear_scan_of_fla(example: Example) -> Run:
    from fla.ops.hgrn import chunk_hgrn

    decays = example.timed["a"].detach().log().requires_grad_()
    return lambda one: list(chunk_hgrn(one.timed["b"], decays, one.state, output_final_state=True))


def _convolution_of_fla(example: Example) -> Run:
    from fla.modules.causal_conv1d import causal_conv1d

    def convolve(one: Example) -> list[Tensor]:
        # Its states hold one input more, of which the convolution reads all but the first.
        state = torch.nn.functional.pad(one.state, (1, 0))
        weight, bias, activation = (one.fixed[name] for name in ("weight", "bias", "activation"))
        settings = {"activation": activation, "initial_state": state, "output_final_state": True}
        return list(causal_conv1d(one.timed["x"], weight, bias, **settings))

    return convolve


def _gated_norm_of_mamba_ssm(example: Example) -> Run:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    settings = {"eps": 1e-5, "norm_before_gate": False}
    return lambda one: [rmsnorm_fn(one.timed["x"], one.fixed["weight"], None, z=one.timed["z"], **settings)]


def _rotary_of_fla(example: Example) -> Run:
    """All sequences as one, because this peer counts positions from a start: its tables hold those of each token."""
    from fla.modules.rotary import rotary_embedding

    x, positions = example.timed["x"], example.timed["positions"]
    rates = 10_000.0 ** (-torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float64) / x.shape[-1])
    angles = positions.flatten().double()[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return lambda one: [rotary_embedding(one.timed["x"].flatten(0, 1)[None], cos, sin).view_as(one.timed["x"])]


def _loss_of_fla(example: Example) -> Run:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    def loss(one: Example) -> list[Tensor]:
        x, targets = one.timed["x"].flatten(0, 1), one.timed["targets"].flatten()
        weight = one.fixed["weight"].to(x.dtype)
        return [fused_linear_cross_entropy_loss(x, targets, weight, reduction=one.fixed["reduction"])]

    return loss


def _attention_of_torch(example: Example) -> Run:
    """Our own form by `scaled_dot_product_attention`."""

    def attend(one: Example) -> list[Tensor]:
        with use("sdpa"):
            return run_op("attention", one)

    return attend


def _attention_of_fla(example: Example) -> Run:
    from fla.ops.attn import parallel_attn

    ends = torch.tensor(example.fixed["packing"].cu_seqlens, device=example.timed["q"].device)
    return lambda one: [parallel_attn(**one.timed, cu_seqlens=ends)]


def _experts_of_transformers(example: Example) -> Run:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    count, d_model, d_hidden = example.fixed["w_out"].shape
    config_class: Any = OlmoeConfig
    config = config_class(
        num_experts=count, hidden_size=d_model, intermediate_size=d_hidden, experts_implementation="grouped_mm"
    )
    with torch.device("meta"):
        module = OlmoeExperts(config)

    def experts(one: Example) -> list[Tensor]:
        x, weights, indices = (one.timed[name].flatten(0, 1) for name in ("x", "weights", "indices"))
        parameters = {"gate_up_proj": one.fixed["w_in"], "down_proj": one.fixed["w_out"]}
        return [torch.func.functional_call(module, parameters, (x, indices, weights.to(x.dtype)))]

    return experts


PEERS: dict[str, dict[str, Callable[[Example], Run]]] = {
    "ssd_scan": {"mamba_ssm": _ssd_of_mamba_ssm, "fla without D": _ssd_of_fla},
    "trapezoid_scan": {"mamba_ssm": _trapezoid_of_mamba_ssm},
    "linear_scan": {"fla": _linear_scan_of_fla},
    "causal_conv1d": {"fla": _convolution_of_fla},
    "gated_rms_norm": {"mamba_ssm": _gated_norm_of_mamba_ssm},
    "rotary": {"fla": _rotary_of_fla},
    "linear_cross_entropy": {"fla": _loss_of_fla},
    "attention, packed": {"torch, one by one": _attention_of_torch, "fla": _attention_of_fla},
    "experts": {"transformers, grouped_mm": _experts_of_transformers},
}
"""Name of what is measured -> peer -> what makes the peer's op. The selective scan of `mamba_ssm` is CUDA."""


def step_peer(name: str, token: dict[str, Any], pool: Any) -> tuple[str, Step] | None:
    """The peer that has the same step for a pool like this, and its step; None where there is none."""
    if name not in STEP_PEERS:
        return None
    peer, make = STEP_PEERS[name]
    try:
        step = make(token, pool)
    except ImportError:
        return None
    except Exception as error:
        step = _failing(error)
    return None if step is None else (peer, step)


def _ssd_step(token: dict[str, Any], pool: Tensor) -> Step:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    # One dt and one A for all of a head, which the peer sees by their strides of 0, as it does a bias.
    _, heads, headdim, d_state = pool.shape
    dt, A = token["s"].unsqueeze(-1).expand(-1, -1, headdim), (token["a"] / token["s"])[0]
    given = (token["x"], dt, A[:, None, None].expand(heads, headdim, d_state), token["B"], token["C"])
    D, bias = (t.unsqueeze(-1).expand(heads, headdim) for t in (token["D"], torch.zeros_like(A)))
    return lambda state: selective_state_update(state, *given, D, dt_bias=bias)


def _selective_step(token: dict[str, Any], pool: Tensor) -> Step:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    given = tuple(token[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    return lambda state: selective_state_update(state, *given, dt_softplus=True)


def _mamba3_step(token: dict[str, Any], pool: Any) -> Step | None:
    """It makes a new state and leaves the old one, in float32.

    Its norms of B and C and its dt are made outside of its kernel, and are not timed.
    """
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_step import mamba3_siso_step

    if pool.ssm.dtype != torch.float32:
        return None
    layer, projected, heads = token["layer"], token["projected"], pool.x.shape[1]
    z, inputs = enter(projected, None, layer, pool, rms_norm)
    z, lam, omega = z.unflatten(-1, (heads, -1)), torch.logit(inputs.lam), torch.atanh(inputs.omega / math.pi)
    turns = omega.unsqueeze(1).repeat(1, heads, 1)
    given = (
        inputs.C[:, 0], inputs.B[:, 0], inputs.x, inputs.A * inputs.dt, inputs.dt, lam,
        layer.C_bias[:, 0], layer.B_bias[:, 0], turns, layer.D, z,
    )  # fmt: skip
    dense = [tensor.contiguous() for tensor in given]
    return lambda state: mamba3_siso_step(*dense, (state.angle, state.ssm, state.k[:, 0], state.x))


def _attention_step(token: dict[str, Any], pool: Any) -> Step:
    """Our own form: the blocks of each sequence are gathered, then `scaled_dot_product_attention` reads them."""

    def step(state: Any) -> Any:
        with use("sdpa"):
            return OPS["attention_step_"](**token, state=state)

    return step


STEP_PEERS: dict[str, tuple[str, Callable[[dict[str, Any], Any], Step | None]]] = {
    "ssd_step_": ("mamba_ssm", _ssd_step),
    "selective_step_": ("mamba_ssm", _selective_step),
    "mamba3_step_": ("mamba_ssm", _mamba3_step),
    "attention_step_, paged": ("torch", _attention_step),
}
"""Name of what is measured -> peer, and what makes the peer's step."""
