"""What stands behind the scan of a layer on a GPU: its gate and norm, and the projection that reads them.

What that reads is not kept for its gradient, but made again by the kernel that finds the gradients of the gate. Numbers
of a token lie side by side, in z too.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everstate.ops.glu import triton as glu
from everstate.ops.norm import triton as norm


def leave(
    y: Float[Tensor, "b l e"], z: Float[Tensor, "b l e"], scale: Float[Tensor, " e"] | None,
    out_proj: Float[Tensor, "d e"] | None, eps: float, groups: int, before: bool,
) -> Float[Tensor, "b l d"]:  # fmt: skip
    """`norm(y silu(z))`, or `norm(y) silu(z)` if the norm is `before`, or `y silu(z)`; and the product with that."""
    if scale is None:
        out = glu.apply(z.flatten(0, 1), y.flatten(0, 1), "silu").view(y.shape)
    else:
        out = norm.normalise(y, z, scale, eps, groups, _mode(before))
    return out if out_proj is None else nn.functional.linear(out, out_proj.to(out.dtype))


def leave_gradients(
    dout: Float[Tensor, "b l d"], y: Float[Tensor, "b l e"], z: Float[Tensor, "b l e"],
    scale: Float[Tensor, " e"] | None, out_proj: Float[Tensor, "d e"] | None, eps: float, groups: int, before: bool,
    dz: Float[Tensor, "b l e"],
) -> tuple[Float[Tensor, "b l e"], Float[Tensor, " e"] | None, Float[Tensor, "d e"] | None]:  # fmt: skip
    """The gradients of y, of the scale of the norm, and of out_proj; that of z is written into `dz`."""
    rows, again = dout.flatten(0, 1), None
    if out_proj is not None:
        dout, again = (rows @ out_proj.to(y.dtype)).view(y.shape), torch.empty_like(y)
    if scale is not None:
        dy, dscale = norm.differentiate(dout, y, z, scale, eps, groups, _mode(before), dz, again)
    else:
        dy, dscale = torch.empty_like(y), None
        gate, up, dgate, dup = (t.flatten(0, 1) for t in (z, y, dz, dy))
        glu.differentiate(dout, gate, up, dgate, dup, "silu")
        again = None if again is None else glu.apply(gate, up, "silu")
    if out_proj is None or again is None:
        return dy, dscale, None
    return dy, dscale, (rows.T @ again.view(-1, y.shape[2])).to(out_proj.dtype)


def _mode(before: bool) -> int:
    return norm.GATE_LAST if before else norm.GATE_FIRST
