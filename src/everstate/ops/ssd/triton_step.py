"""One SSD token on a GPU: one launch reads and writes each number of the state once."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.state import Slots
from everstate.ops.triton_rows import dense, slot_of, tile_of, warps_of


def ssd_step_(
    x: Float[Tensor, "b h p"],
    a: Float[Tensor, "b h"],
    s: Float[Tensor, "b h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "slots h p n"],
    slots: Slots = None,
    *,
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
) -> Float[Tensor, "b h p"]:
    """See `everstate.ops.ssd_step_`."""
    return _step(x, a, s, B, C, state, slots, D)


@torch.library.custom_op("everstate::ssd_step_", mutates_args={"state"})
def _step(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, D: Tensor | None
) -> Tensor:
    (batch, heads, headdim), (groups, d_state) = x.shape, B.shape[1:]
    y = x.new_empty(batch, heads, headdim)
    if batch == 0:
        return y
    x, B, C = dense(x), dense(B), dense(C)
    width = triton.next_power_of_2(d_state)
    tile = tile_of(headdim, width, batch * heads, x.device)
    _step_kernel[(batch * heads * triton.cdiv(headdim, tile),)](
        x, a, s, B, C, state, slots, D, y,
        *x.stride()[:2], *a.stride(), *s.stride(), *B.stride()[:2], *C.stride()[:2], *state.stride()[:3],
        *_strides_of_skip(D),
        HEADS=heads, GROUPS=groups, P=headdim, N=d_state, BLOCK_P=tile, BLOCK_N=width,
        num_warps=warps_of(tile * width),
    )  # fmt: skip
    return y


@_step.register_fake
def _(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, D: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


def _strides_of_skip(D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None) -> tuple[int, int]:
    """From head to head and from channel to channel of D, which may have one number per head."""
    if D is None:
        return 0, 0
    return D.stride(0), D.stride(1) if D.ndim == 2 else 0


@triton.jit
def _step_kernel(
    x, a, s, B, C, state, slots, D, y,
    x_row, x_head, a_row, a_head, s_row, s_head, B_row, B_group, C_row, C_group,
    state_slot, state_head, state_p, D_head, D_p,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per row, head and tile of p, which nobody else reads or writes."""
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile, head = tl.program_id(0) % TILES, tl.program_id(0) // TILES % HEADS
    row = (tl.program_id(0) // TILES // HEADS).to(tl.int64)
    group = head // (HEADS // GROUPS)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    own = state + slot_of(slots, row) * state_slot + head * state_head + p[:, None] * state_p + n[None, :]
    h = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(a + row * a_row + head * a_head).to(tl.float32))
    scale = tl.load(s + row * s_row + head * s_head).to(tl.float32)
    u = tl.load(x + row * x_row + head * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    k = tl.load(B + row * B_row + group * B_group + n, mask=n < N, other=0.0).to(tl.float32)
    q = tl.load(C + row * C_row + group * C_group + n, mask=n < N, other=0.0).to(tl.float32)
    h = h * decay + (u * scale)[:, None] * k[None, :]
    tl.store(own, h.to(state.dtype.element_ty), mask=inside)
    out = tl.sum(h * q[None, :], 1)
    if D is not None:
        out += tl.load(D + head * D_head + p * D_p, mask=p < P, other=0.0).to(tl.float32) * u
    tl.store(y + (row * HEADS + head) * P + p, out.to(y.dtype.element_ty), mask=p < P)
