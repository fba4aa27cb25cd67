"""One SSD token on a GPU: one launch reads and writes each number of the state once."""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from everstate.core.kernels import kernel_op
from everstate.core.state import Slots
from everstate.ops.linear.limits import divides
from everstate.ops.norm import rms_norm
from everstate.ops.norm.normed import Normed
from everstate.ops.triton_common import softplus
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_rows import (
    dense,
    launch_options,
    reads_early,
    silu,
    slot_of,
    start_next,
    tile_of,
    wait_for_last,
    warps_of,
)


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


def mamba2_step_(
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A_log: Float[Tensor, " h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    state: Float[Tensor, "slots h p n"],
    slots: Slots = None,
    *,
    dt_bias: Float[Tensor, " h"],
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b h p"] | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    delta_t: Float[Tensor, " b"] | None = None,
    norm: Float[Tensor, " e"] | None = None,
    eps: float = 1e-5,
    norm_groups: int = 1,
) -> Float[Tensor, "b h p"] | Normed:
    """See `everstate.ops.mamba2_step_`. A norm is left undivided where a linear map of so many rows divides."""
    leaves = norm is not None and norm_groups == 1 and _is_divided_behind(x, B.shape[2])
    y, squares = _mamba2_step(
        x, dt, A_log, B, C, state, slots, dt_bias, D, z, *dt_limit, delta_t, norm if leaves else None
    )  # fmt: skip
    if norm is None:
        return y
    y = y.flatten(-2)
    return Normed(y, squares, eps) if leaves else Normed(rms_norm(y, norm, eps=eps, groups=norm_groups))


def _is_divided_behind(x: Float[Tensor, "b h p"], d_state: int) -> bool:
    """Whether the linear map behind such a step divides by the root of its norm."""
    batch, heads, headdim = x.shape
    return divides(batch, heads * headdim, heads * _tile(x, d_state)[1], x.dtype, x.device)


@kernel_op("ssd_step_", mutates={"state"})
def _step(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, D: Tensor | None
) -> Tensor:
    return _run(x, a, s, B, C, state, slots, D)[0]


@_step.register_fake
def _(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, D: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


@kernel_op("mamba2_step_", mutates={"state"})
def _mamba2_step(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, dt_bias: Tensor,
    D: Tensor | None, z: Tensor | None, lowest: float, highest: float, delta_t: Tensor | None, norm: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, or with the weight of a norm y times that; and the sums of squares of each row, without a norm no number."""
    return _run(x, A_log, dt, B, C, state, slots, D, dt_bias, z, lowest, highest, delta_t, norm)


@_mamba2_step.register_fake
def _(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, dt_bias: Tensor,
    D: Tensor | None, z: Tensor | None, lowest: float, highest: float, delta_t: Tensor | None, norm: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _results(x, B.shape[2], norm)


def _results(x: Tensor, d_state: int, norm: Tensor | None) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b parts"]]:
    """Memory for y, and for sums of squares."""
    parts = 0 if norm is None else x.shape[1] * _tile(x, d_state)[1]
    return x.new_empty(x.shape), x.new_empty(x.shape[0], parts, dtype=torch.float32)


def _tile(x: Float[Tensor, "b h p"], d_state: int) -> tuple[int, int]:
    """Channels of a program, and among how many programs those of a head are shared out."""
    batch, heads, headdim = x.shape
    tile = tile_of(headdim, power_of_2(d_state), batch * heads, x.device)
    return tile, cdiv(headdim, tile)


def _run(
    x: Tensor, a: Tensor, s: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, D: Tensor | None,
    dt_bias: Tensor | None = None, z: Tensor | None = None, lowest: float = 0.0, highest: float = math.inf,
    delta_t: Tensor | None = None, norm: Tensor | None = None,
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b parts"]]:  # fmt: skip
    """Launch the kernel; with `dt_bias`, `a` is A_log and `s` is dt before its bias."""
    (batch, heads, headdim), (groups, d_state) = x.shape, B.shape[1:]
    y, squares = _results(x, d_state, norm)
    if batch == 0:
        return y, squares
    x, B, C, z = dense(x), dense(B), dense(C), None if z is None else dense(z)
    width, (tile, tiles) = power_of_2(d_state), _tile(x, d_state)
    launch(
        _step_kernel, (batch * heads * tiles,),
        x, a, s, B, C, state, slots, D, y, dt_bias, z, delta_t, norm, squares, lowest, highest,
        *x.stride()[:2], *(a.stride() if a.ndim == 2 else (0, a.stride(0))), *s.stride(), *B.stride()[:2],
        *C.stride()[:2], *state.stride()[:3], *_strides_of_skip(D), *((0, 0) if z is None else z.stride()[:2]),
        0 if dt_bias is None else dt_bias.stride(0), 0 if delta_t is None else delta_t.stride(0),
        HEADS=heads, GROUPS=groups, P=headdim, N=d_state, BLOCK_P=tile, BLOCK_N=width,
        EARLY=reads_early(slots, batch),
        num_warps=warps_of(tile * width), **launch_options(x.device),
    )  # fmt: skip
    return y, squares


def _strides_of_skip(D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None) -> tuple[int, int]:
    """From head to head and from channel to channel of D, which may have one number per head."""
    if D is None:
        return 0, 0
    return D.stride(0), D.stride(1) if D.ndim == 2 else 0


@triton.jit
def _step_kernel(
    x, a, s, B, C, state, slots, D, y, dt_bias, z, delta_t, norm, squares, lowest, highest,
    x_row, x_head, a_row, a_head, s_row, s_head, B_row, B_group, C_row, C_group,
    state_slot, state_head, state_p, D_head, D_p, z_row, z_head, bias_head, delta_row,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row, head and tile of p, which nobody else reads or writes."""
    start_next(OVERLAP)
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile, head = tl.program_id(0) % TILES, tl.program_id(0) // TILES % HEADS
    row = (tl.program_id(0) // TILES // HEADS).to(tl.int64)
    group = head // (HEADS // GROUPS)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    # What belongs to the layer and not to the token may be read before the last kernel has ended.
    bias, rate, skip = 0.0, 0.0, p * 0.0
    if dt_bias is not None:
        bias, rate = tl.load(dt_bias + head * bias_head).to(tl.float32), tl.load(a + head * a_head).to(tl.float32)
    if D is not None:
        skip = tl.load(D + head * D_head + p * D_p, mask=p < P, other=0.0).to(tl.float32)
    weigh = None if norm is None else tl.load(norm + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    if not EARLY:
        wait_for_last(OVERLAP)
    own = state + slot_of(slots, row) * state_slot + head * state_head + p[:, None] * state_p + n[None, :]
    held = tl.load(own, mask=inside, other=0.0)
    if EARLY:
        wait_for_last(OVERLAP)
    scale = tl.load(s + row * s_row + head * s_head).to(tl.float32)
    if dt_bias is not None:
        scale = tl.minimum(tl.maximum(softplus(scale + bias), lowest), highest)
        if delta_t is not None:
            scale = scale * tl.load(delta_t + row * delta_row).to(tl.float32)
        decay = tl.exp(-tl.exp(rate) * scale)
    else:
        decay = tl.exp(tl.load(a + row * a_row + head * a_head).to(tl.float32))
    u = tl.load(x + row * x_row + head * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    k = tl.load(B + row * B_row + group * B_group + n, mask=n < N, other=0.0).to(tl.float32)
    q = tl.load(C + row * C_row + group * C_group + n, mask=n < N, other=0.0).to(tl.float32)
    h = held.to(tl.float32) * decay + (u * scale)[:, None] * k[None, :]
    tl.store(own, h.to(state.dtype.element_ty), mask=inside)
    out = tl.sum(h * q[None, :], 1)
    if D is not None:
        out += skip * u
    if z is not None:
        out = out * silu(tl.load(z + row * z_row + head * z_head + p, mask=p < P, other=0.0).to(tl.float32))
    if norm is not None:
        tl.store(squares + (row * HEADS + head) * TILES + tile, tl.sum(out * out, 0))
        out = out * weigh
    tl.store(y + (row * HEADS + head) * P + p, out.to(y.dtype.element_ty), mask=p < P)
