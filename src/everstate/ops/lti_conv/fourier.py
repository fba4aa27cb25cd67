"""Convolution by the fast Fourier transform, causal to rounding: it mixes all times before it separates them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fft import irfft, rfft
from torch.nn.functional import pad

from everstate.core.dtypes import state_dtype
from everstate.core.packing import Packing, each_sequence

# Shorter frames would cost more in calls than they save in arithmetic.
SHORTEST = 64


def lti_conv(
    u: Float[Tensor, "b l d"],
    K: Float[Tensor, "d k"],
    state: Float[Tensor, "seqs d k1"],
    *,
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d k1"]]:
    """See `everstate.ops.lti_conv`."""
    if packing is not None:
        return each_sequence(lti_conv, packing, {"u": u}, state, K=K)
    dtype, length, before = state_dtype(u.dtype), u.shape[1], K.shape[1] - 1
    row = torch.cat([state.to(dtype), u.to(dtype).transpose(1, 2)], 2)
    after = row[:, :, row.shape[2] - before :]
    # A short input is one frame. A long one is cut into frames that each begin with the inputs before them: what a
    # circular convolution gets wrong are its first k - 1 outputs, and those belong to the frame before.
    size = 1 << (min(before + length, max(4 * before, SHORTEST)) - 1).bit_length()
    frames = pad(row, (0, -length % (size - before))).unfold(2, size, size - before)
    y = irfft(rfft(frames) * rfft(K.to(dtype), size).unsqueeze(1), size)[..., before:]
    return y.flatten(2)[:, :, :length].transpose(1, 2).to(u.dtype), after
