"""Models to measure, made in seconds: blocks of one name share their values, on which speed does not depend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everstate.mixers.base import allocate_
from everstate.mixers.moe import MoE
from everstate.models import LM, ModelConfig


@torch.no_grad()
def build(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> LM:
    """The model of `config`, with equal values in all blocks of one name."""
    names = list(dict.fromkeys(config.blocks))
    pattern = LM(ModelConfig.parse({**config.table(), "layout": " ".join(names)}), dtype=dtype)
    model = LM(config, device="meta", dtype=dtype)
    allocate_(model, device)
    pairs: list[tuple[nn.Module, nn.Module]] = [(model.embedding, pattern.embedding), (model.norm, pattern.norm)]
    if model.head is not None and pattern.head is not None:
        pairs.append((model.head, pattern.head))
    by_name = dict(zip(names, pattern.layers, strict=True))
    pairs += [(block, by_name[name]) for name, block in zip(config.blocks, model.layers, strict=True)]
    for ours, values in pairs:
        for into, value in zip(ours.parameters(), values.parameters(), strict=True):
            into.copy_(value)
    for block in model.layers:
        for name, parameter in block.mixer.named_parameters():
            if name.endswith("out_proj.weight"):  # scaled by 1 / sqrt(blocks), as `LM` does it
                parameter.mul_((len(names) / len(config.blocks)) ** 0.5)
    return model


def preferred(device: torch.device | str) -> torch.dtype:
    """The dtype of weights that a device computes fastest with."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def weight_bytes(lm: LM, batch: int) -> float:
    """Bytes of what a step of so many tokens reads of the model.

    Not the embedding, unless it is the head too, and of the experts those that some token can be expected to choose.
    """
    read = float(sum(_bytes(t) for t in (*lm.parameters(), *lm.buffers())))
    if lm.head is not None:
        read -= _bytes(lm.embedding.weight)
    for layer in lm.modules():
        if isinstance(layer, MoE):
            unread = (1 - layer.config.top_k / layer.config.nexperts) ** batch
            read -= unread * (_bytes(layer.in_proj.weight) + _bytes(layer.out_proj.weight))
    return read


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
