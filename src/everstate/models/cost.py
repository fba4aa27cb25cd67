"""What a model costs, before a tensor of it exists: parameters, operations, and the bytes that a sequence holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from everstate.core.state import nbytes, tensors
from everstate.models.config import ModelConfig
from everstate.models.lm import LM


@dataclass(frozen=True)
class Cost:
    """Costs of one model at one context length.

    parameters: all weights, tied ones once.
    flops_per_token: to read one token with `context` tokens before it; a multiply-add counts 2.
    state_bytes: what one sequence holds after `context` tokens.
    kv_cache_bytes: what a Transformer of the same width and as many sequence layers would hold then: keys and values of
        `d_model` each per layer and token, in bfloat16, without grouped queries.
    """

    context: int
    parameters: int
    flops_per_token: int
    state_bytes: int
    kv_cache_bytes: int


def cost(config: ModelConfig, *, context: int = 4096, dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of a model with weights of `dtype`, computed on the meta device, so without memory or time.

    Raises `ConfigError` for shapes that do not fit.
    """
    model = LM(config, device="meta", dtype=dtype)
    head = 2 * config.d_model * config.vocab_size
    return Cost(
        context=context,
        parameters=sum(p.numel() for p in model.parameters()),
        flops_per_token=head + sum(block.mixer.flops_per_token(context) for block in model.layers),
        state_bytes=nbytes(model.init_state(1, context=context)),
        kv_cache_bytes=kv_cache_bytes(config.d_model, sequence_layers(model), context),
    )


def sequence_layers(model: LM) -> int:
    """Blocks that carry a state: those that a Transformer would have as attention."""
    return sum(bool(tensors(block.mixer.init_state(1, context=1))) for block in model.layers)


def kv_cache_bytes(d_model: int, layers: int, context: int) -> int:
    """Keys and values of `context` tokens in bfloat16."""
    return 2 * 2 * d_model * layers * context
