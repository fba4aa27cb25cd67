"""What a Mamba-3 layer does to what `in_proj` gives before the trapezoid, and to what that gives before `out_proj`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu, sigmoid, softplus, tanh

from everstate.core.dtypes import state_dtype
from everstate.ops.trapezoid import TrapezoidInputs, TrapezoidState


class Mamba3Layer(NamedTuple):
    """A Mamba-3 layer without its projections: parameters, then settings.

    dt_bias, D: of each head; B_norm, C_norm: scales of the norms of B and C; B_bias, C_bias: what each head and rank
    adds to them; mimo_x, mimo_z, mimo_o: factors of the inputs, gates and outputs of each rank; norm: scale of the norm
    over each head of y, the heads one after the other.
    """

    dt_bias: Float[Tensor, " h"]
    B_norm: Float[Tensor, " n"]
    C_norm: Float[Tensor, " n"]
    B_bias: Float[Tensor, "h r n"]
    C_bias: Float[Tensor, "h r n"]
    D: Float[Tensor, " h"]
    mimo_x: Float[Tensor, "h r p"] | None = None
    mimo_z: Float[Tensor, "h r p"] | None = None
    mimo_o: Float[Tensor, "h r p"] | None = None
    norm: Float[Tensor, " e"] | None = None
    ngroups: int = 1
    interleaved: bool = True
    A_activation: Literal["softplus", "heavy_tail"] = "softplus"
    A_floor: float = 1e-4
    norm_eps: float = 1e-5


def enter(
    projected: Float[Tensor, "*b w"],
    delta_t: Float[Tensor, "*b"] | None,
    layer: Mamba3Layer,
    state: TrapezoidState,
    norm: Callable[..., Tensor],
) -> tuple[Float[Tensor, "*b e"], TrapezoidInputs]:
    """The gate z, and what the recurrence reads; `norm` is `rms_norm`."""
    dtype, headdim, pairs = state_dtype(projected.dtype), state.x.shape[-1], state.angle.shape[-1]
    heads, rank, d_state = layer.B_bias.shape
    width = rank * layer.ngroups * d_state
    widths = [heads * headdim, heads * headdim, width, width, heads, heads, heads, pairs]
    z, x, B, C, dt, A, lam, omega = projected.split(widths, -1)
    dt = softplus(dt.to(dtype) + layer.dt_bias.to(dtype))
    if delta_t is not None:
        dt = dt * delta_t.unsqueeze(-1)
    activation = softplus if layer.A_activation == "softplus" else heavy_tail
    each = (rank, layer.ngroups, d_state)
    return z, TrapezoidInputs(
        x=x.unflatten(-1, (heads, headdim)),
        dt=dt,
        A=-activation(A.to(dtype)).clamp(min=layer.A_floor),
        lam=sigmoid(lam.to(dtype)),
        omega=math.pi * tanh(omega.to(dtype)),
        B=norm(B.unflatten(-1, each), layer.B_norm, eps=layer.norm_eps),
        C=norm(C.unflatten(-1, each), layer.C_norm, eps=layer.norm_eps),
    )


def leave(
    y: Float[Tensor, "*b r h p"], z: Float[Tensor, "*b e"], layer: Mamba3Layer, gate: Callable[..., Tensor],
    gated_norm: Callable[..., Tensor],
) -> Float[Tensor, "*b e"]:  # fmt: skip
    """Gate and norm of each rank, and their sum; `gate` is `gated`, and `gated_norm` is `gated_rms_norm`."""
    heads = y.shape[-2]
    each = z.unflatten(-1, (1, heads, -1))
    if layer.mimo_z is not None:
        each = each * layer.mimo_z.transpose(0, 1)
    each = each.expand(*y.shape)
    if layer.norm is None:
        y = gate(y.flatten(-2), each.flatten(-2)).unflatten(-1, (heads, -1))
    else:
        settings = {"eps": layer.norm_eps, "groups": heads, "norm_before_gate": True}
        y = gated_norm(y.flatten(-2), each.flatten(-2), layer.norm, **settings).unflatten(-1, (heads, -1))
    if layer.mimo_o is not None:
        y = y * layer.mimo_o.transpose(0, 1)
    y = y.squeeze(-3) if y.shape[-3] == 1 else y.sum(-3)  # a sum of one would be a copy
    return y.flatten(-2).to(z.dtype)


def heavy_tail(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """`1 + x` for x >= 0 and `1 / (1 - x)` below: positive, smooth, and slower to vanish than softplus."""
    below = relu(-x)
    return x + below + 1 / (1 + below)  # not x.clamp(min=0), whose slope at 0 depends on the version of PyTorch
