"""One SSD token on a GPU: one launch reads and writes each number of the state once."""

import math
from types import ModuleType

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
from everstate.ops.ssd.pending import Pending
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
from everstate.ops.triton_segments import hopper_kernels


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
    pending: Pending | None = None,
) -> Float[Tensor, "b h p"] | Normed:
    """See `everstate.ops.mamba2_step_`. A norm is left undivided where a linear map of so many rows divides."""
    leaves = norm is not None and norm_groups == 1 and _is_divided_behind(x, B.shape[2], pending)
    token, settings = (x, dt, A_log, B, C, state, slots), (dt_bias, D, z, *dt_limit, delta_t, norm if leaves else None)
    if pending is None:
        y, squares = _mamba2_step(*token, *settings)
    else:
        y, squares = _mamba2_step_pending(*token, *pending, *settings)
    if norm is None:
        return y
    y = y.flatten(-2)
    return Normed(y, squares, eps) if leaves else Normed(rms_norm(y, norm, eps=eps, groups=norm_groups))


def _is_divided_behind(x: Float[Tensor, "b h p"], d_state: int, pending: Pending | None) -> bool:
    """Whether the linear map behind such a step divides by the root of its norm."""
    batch, heads, headdim = x.shape
    parts = _tile(x, d_state)[1] if pending is None else pending.decay.shape[2]
    return divides(batch, heads * headdim, heads * parts, x.dtype, x.device)


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
    return _results(x, norm, x.shape[1] * _tile(x, B.shape[2])[1])


@kernel_op("mamba2_step_pending_", mutates={"state", "past_x", "past_B", "weight", "decay", "waiting"})
def _mamba2_step_pending(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, past_x: Tensor,
    past_B: Tensor, weight: Tensor, decay: Tensor, waiting: Tensor, dt_bias: Tensor, D: Tensor | None, z: Tensor | None,
    lowest: float, highest: float, delta_t: Tensor | None, norm: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `_mamba2_step`, with the parts of `Pending` behind the slots."""
    y, squares = _results(x, norm, decay.shape[1] * decay.shape[2])
    kernels, pending = pending_kernels(x), (past_x, past_B, weight, decay, waiting)
    assert kernels is not None, "asked by `accepts_mamba2_step`"
    if len(x) > 0:
        kernels.step(
            x, dt, A_log, B, C, state, slots, pending, dt_bias, D, z, lowest, highest, delta_t, norm, y, squares
        )
    return y, squares


@_mamba2_step_pending.register_fake
def _(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, state: Tensor, slots: Tensor | None, past_x: Tensor,
    past_B: Tensor, weight: Tensor, decay: Tensor, waiting: Tensor, dt_bias: Tensor, D: Tensor | None, z: Tensor | None,
    lowest: float, highest: float, delta_t: Tensor | None, norm: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _results(x, norm, decay.shape[1] * decay.shape[2])


def pending_kernels(x: Tensor) -> ModuleType | None:
    """The kernels that leave entries pending, where they serve such inputs."""
    return hopper_kernels("everstate.ops.ssd.triton_hopper_step", x)


def _results(x: Tensor, norm: Tensor | None, parts: int) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b parts"]]:
    """Memory for y, and for sums of squares of so many parts."""
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 0 if norm is None else parts, dtype=torch.float32)


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
    width, (tile, tiles) = power_of_2(d_state), _tile(x, d_state)
    y, squares = _results(x, norm, heads * tiles)
    if batch == 0:
        return y, squares
    x, B, C, z = dense(x), dense(B), dense(C), None if z is None else dense(z)
    launch(
        _step_kernel, (batch * heads * tiles,),
        x, a, s, B, C, state, slots, D, y, dt_bias, z, delta_t, norm, squares, lowest, highest,
        *x.stride()[:2], *(a.stride() if a.ndim == 2 else (0, a.stride(0))), *s.stride(), *B.stride()[:2],
        *C.stride()[:2], *state.stride()[:3], *strides_of_skip(D), *((0, 0) if z is None else z.stride()[:2]),
        0 if dt_bias is None else dt_bias.stride(0), 0 if delta_t is None else delta_t.stride(0),
        HEADS=heads, GROUPS=groups, P=headdim, N=d_state, BLOCK_P=tile, BLOCK_N=width,
        EARLY=reads_early(slots, batch),
        num_warps=warps_of(tile * width), **launch_options(x.device),
    )  # fmt: skip
    return y, squares


def strides_of_skip(D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None) -> tuple[int, int]:
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
    bias, rate = 0.0, 0.0
    if dt_bias is not None:
        bias, rate = tl.load(dt_bias + head * bias_head).to(tl.float32), tl.load(a + head * a_head).to(tl.float32)
    skip = None if D is None else tl.load(D + head * D_head + p * D_p, mask=p < P, other=0.0).to(tl.float32)
    weigh = None if norm is None else tl.load(norm + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    if not EARLY:
        wait_for_last(OVERLAP)
    own = state + slot_of(slots, row) * state_slot + head * state_head + p[:, None] * state_p + n[None, :]
    held = tl.load(own, mask=inside, other=0.0)
    if EARLY:
        wait_for_last(OVERLAP)
    if dt_bias is not None:
        elapsed = None if delta_t is None else delta_t + row * delta_row
        scale, log_decay = time_step(s + row * s_row + head * s_head, bias, rate, elapsed, lowest, highest)
    else:
        scale = tl.load(s + row * s_row + head * s_head).to(tl.float32)
        log_decay = tl.load(a + row * a_row + head * a_head).to(tl.float32)
    u = tl.load(x + row * x_row + head * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    gate = None if z is None else tl.load(z + row * z_row + head * z_head + p, mask=p < P, other=0.0)
    k = tl.load(B + row * B_row + group * B_group + n, mask=n < N, other=0.0).to(tl.float32)
    q = tl.load(C + row * C_row + group * C_group + n, mask=n < N, other=0.0).to(tl.float32)
    h = held.to(tl.float32) * tl.exp(log_decay) + (u * scale)[:, None] * k[None, :]
    tl.store(own, h.to(state.dtype.element_ty), mask=inside)
    out = tl.sum(h * q[None, :], 1)
    at = row * HEADS + head
    write_output(out, u, skip, gate, weigh, None if norm is None else squares + at * TILES + tile, y + at * P, p, P)


@triton.jit
def time_step(dt, bias, rate, elapsed, lowest, highest):
    """The step of a head, and its log decay."""
    step = tl.minimum(tl.maximum(softplus(tl.load(dt).to(tl.float32) + bias), lowest), highest)
    if elapsed is not None:
        step = step * tl.load(elapsed).to(tl.float32)
    return step, -tl.exp(rate) * step


@triton.jit
def write_output(out, u, skip, gate, weigh, square, y, p, P: tl.constexpr):
    """Write what a head, or a part of it, gives: with D x, the gate, and the sum of squares and weight of a norm."""
    if skip is not None:
        out += skip * u
    if gate is not None:
        out = out * silu(gate.to(tl.float32))
    if weigh is not None:
        tl.store(square, tl.sum(out * out, 0))
        out = out * weigh
    tl.store(y + p, out.to(y.dtype.element_ty), mask=p < P)
