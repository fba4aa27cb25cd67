"""The most likely token of each row of logits."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.op import op
from everstate.ops.argmax.limits import accepts_argmax


@op
def argmax(x: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
    """Where the largest number of each row is; the first of several."""
    return x.argmax(-1)


argmax.add("triton", "everstate.ops.argmax.triton:argmax", accepts_argmax)
