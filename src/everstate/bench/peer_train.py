"""What `everstate bench train` compares with: a Llama of `transformers`, and stacks of the layers of `mamba_ssm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from everstate.bench.build import build
from everstate.bench.peer_ssm import SSMPeer, name_of, unavailable
from everstate.bench.report import package_version
from everstate.models import ModelConfig

T = TypeVar("T")
Make = Callable[[nn.Module, Callable[[Tensor], Tensor], torch.optim.Optimizer], T]


def peers_of(
    kind: str, config: ModelConfig, device: str, left_out: list[str], make: Make[T]
) -> dict[str, Callable[[], T]]:
    """Makers of the peers of a model, by name; `left_out` is told of those that are not there."""
    peers: dict[str, Callable[[], T]] = {}
    if package_version("transformers") is None:
        left_out.append("transformers is not installed")
    else:
        peers["transformers Llama"] = lambda: _llama(config, device, make)
    why = unavailable(kind) if torch.device(device).type == "cuda" else "mamba_ssm runs on a GPU"
    if why is None:
        peers[name_of(kind)] = lambda: _ssm(config, device, make)
    else:
        left_out.append(why)
    return peers


def _llama(config: ModelConfig, device: str, make: Make[T]) -> T:
    """About as many parameters as ours at the same width: 24 layers of 2816 at 1024."""
    import transformers

    transformers.logging.set_verbosity_error()
    width = config.d_model
    config_class: Any = transformers.LlamaConfig
    settings = config_class(
        vocab_size=config.vocab_size, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=24 if width >= 1024 else 1, num_attention_heads=width // 64, tie_word_embeddings=True,
        attn_implementation="sdpa", use_cache=False, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM(settings)

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(tokens[:, :-1]).logits
            return _loss(logits, tokens)

    return make(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))


def _ssm(config: ModelConfig, device: str, make: Make[T]) -> T:
    model = SSMPeer(build(config, device, torch.float32), torch.float32)

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return _loss(model.logits(model(tokens[:, :-1])), tokens)

    return make(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
