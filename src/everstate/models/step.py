"""One token through the blocks of a model with few launches, where kernels serve.

What a block gives may not be made yet (`Unmade`): the residual stream takes it in where it is made, together with the
norm that comes next, whose division is left to what reads it (decision 0009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.state import Slots
from everstate.mixers import State
from everstate.mixers.base import has_linear_ends
from everstate.mixers.modules import Norm, RMSNorm, Unmade, is_untouched, made
from everstate.ops import Normed

if TYPE_CHECKING:
    from everstate.models.lm import LM, Block

Given: TypeAlias = Float[Tensor, "b d"] | Unmade | None
"""What a block gives the residual stream, before its multiplier; None before the first block."""


def step_blocks_(
    model: LM, x: Float[Tensor, "b d"], state: State, slots: Slots, delta_t: Float[Tensor, " b"] | None
) -> Float[Tensor, "b d"] | Normed:
    """Read one token, whose embedding begins the residual stream x: what the head reads.

    Parts of a model that are not of this library, or have been replaced, or have hooks, see tensors as in `forward`.
    """
    y: Given = None
    for block, pool in zip(model.layers, state, strict=True):
        x, y = _step_block_(block, x, y, model.dtype, pool, slots, delta_t)
    if model.reads_undivided:
        added = _add_and_norm(x, y, model.norm, model.config.residual_multiplier)
        if added is not None:
            return added[1]
    return model.finish(x, _made(y))


def _step_block_(
    block: Block, x: Float[Tensor, "b d"], y: Given, dtype: torch.dtype, state: State, slots: Slots,
    delta_t: Float[Tensor, " b"] | None,
) -> tuple[Float[Tensor, "b d"], Given]:  # fmt: skip
    """The residual stream with what the block before gave, and what this one gives."""
    mixer = block.mixer
    if not block.is_plain or not has_linear_ends(mixer):
        x, h = block.take(x, _made(y), dtype)
        return x, block.give(mixer.step_(h, state, slots, delta_t))
    x, read = _add_and_norm(x, y, block.norm, block.multiplier) or block.take(x, _made(y), dtype)
    return x, mixer.product_step_(read, state, slots, delta_t)


def _add_and_norm(
    x: Float[Tensor, "b d"], y: Given, norm: Norm, multiplier: float
) -> tuple[Float[Tensor, "b d"], Normed] | None:
    """The residual stream with y, and the norm of it, if they can be made in one launch."""
    if not isinstance(y, Unmade):
        return None
    if not isinstance(norm, RMSNorm) or not is_untouched(norm, RMSNorm, "add", "forward"):
        return None
    return y.add_to(x, norm, multiplier)


def _made(y: Given) -> Float[Tensor, "b d"] | None:
    return None if y is None else made(y)
