"""The trapezoid on a GPU: SSD with a look-ahead, whose keys and queries are rebuilt in each kernel.

The formulas are those of `everstate.ops.trapezoid.lookahead`, chunks and segments those of
`everstate.ops.triton_segments`.

Forward: `triton_prepare` makes numbers per token, cosines and sines; then `triton_forward` walks along time and makes
keys and queries of B, C and these where it uses them (`triton_keys`). Backward: two sweeps along time write the state
that enters each chunk and the gradient of that which leaves it, and on their way the keys and queries of all heads,
but for a Hopper GPU; and from both states, what all later chunks say of the angles. Then every chunk is independent
(`triton_backward`). All is summed in a fixed order: the same call gives the same bits.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import kernel_op, processors
from everstate.core.packing import Packing
from everstate.ops.trapezoid import TrapezoidState
from everstate.ops.trapezoid.triton_backward import inputs_kernel, keys_kernel, ranks_kernel, turn_gradients_kernel
from everstate.ops.trapezoid.triton_forward import scan_kernel, sweep_kernel
from everstate.ops.trapezoid.triton_keys import NUMBERS
from everstate.ops.trapezoid.triton_prepare import (
    angle_gradients_kernel,
    angles_kernel,
    arrange_kernel,
    chunks_kernel,
    enter_gradients_kernel,
    enter_kernel,
    leave_gradients_kernel,
    leave_kernel,
    phases_kernel,
    steps_gradients_kernel,
    steps_kernel,
    turns_kernel,
)
from everstate.ops.triton_segments import (
    CHUNK,
    can_copy,
    fill,
    hopper_kernels,
    joined,
    only,
    pass_kernel,
    pieces_for,
    plan,
    splits_of,
    stages_for,
)

BLOCK_H = 16
"""Heads whose numbers per token one program makes."""

TILE_P = 64
"""Rows of the state that one program of a sweep holds."""


def trapezoid_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, "b l h"],
    lam: Float[Tensor, "b l h"],
    omega: Float[Tensor, "b l s"],
    B: Float[Tensor, "b l r g n"],
    C: Float[Tensor, "b l r g n"],
    state: TrapezoidState,
    *,
    B_bias: Float[Tensor, "h r n"] | None = None,
    C_bias: Float[Tensor, "h r n"] | None = None,
    mimo_x: Float[Tensor, "h r p"] | None = None,
    D: Float[Tensor, " h"] | None = None,
    interleaved: bool = True,
    packing: Packing | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Float[Tensor, "b l r h p"], TrapezoidState]:
    """See `everstate.ops.trapezoid_scan`. `chunk_size` is the business of other implementations."""
    ssm, k, last, angle = (t.to(torch.float32) for t in state)
    ends = [] if packing is None else list(packing.cu_seqlens)
    y, ssm, k, last, angle = _scan(
        x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D, interleaved, ends
    )
    return y, TrapezoidState(ssm, k, last, angle)


class _Arguments(NamedTuple):
    """What the op reads, in the order of its own signature."""

    x: Tensor
    dt: Tensor
    A: Tensor
    lam: Tensor
    omega: Tensor
    B: Tensor
    C: Tensor
    ssm: Tensor
    k: Tensor
    last: Tensor
    angle: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    mimo_x: Tensor | None
    D: Tensor | None


@kernel_op("trapezoid_scan")
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None,
    interleaved: bool, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = _Arguments(x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    call = _Call(given, interleaved, ends)
    (y, final), (final_k, final_x) = call.scan(), call.leave()
    return y, final, final_k, final_x, call.final_angle


@_scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None,
    interleaved: bool, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(*x.shape[:2], B.shape[2], *x.shape[2:])
    empty = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)
    return y, empty(ssm), empty(k), empty(last), empty(angle)


@kernel_op("trapezoid_scan_backward")
def _backward(
    dy: Tensor, dssm: Tensor, dk: Tensor, dlast: Tensor, dangle: Tensor,
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None,
    interleaved: bool, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of all arguments that are given, in their order."""
    given = _Arguments(x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    grads = _Call(given, interleaved, ends).gradients(dy, dssm, dk, dlast, dangle)
    return [grad.to(t.dtype) for grad, t in zip(grads, given, strict=True) if t is not None and grad is not None]


@_backward.register_fake
def _(
    dy: Tensor, dssm: Tensor, dk: Tensor, dlast: Tensor, dangle: Tensor,
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None,
    interleaved: bool, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    given = (x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.interleaved, ctx.ends = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = iter(_backward(*upstream, *saved, ctx.interleaved, ctx.ends))
    return (*(None if t is None else next(grads) for t in saved), None, None)


_scan.register_autograd(_differentiate, setup_context=_save)


class _Homes(NamedTuple):
    """Which chunks belong to which sequences.

    chunks: index, first token and end of the sequence. sequences: first chunk and number of chunks. last: last token.
    """

    chunks: Int[Tensor, "chunks 3"]
    sequences: Int[Tensor, "seqs 2"]
    last: Int[Tensor, " seqs"]


class _InputGradients(NamedTuple):
    """By chunk and head, but for x: of the sums of decays, the scales, the own weights, the factors and D."""

    x: Tensor
    decays: Tensor
    scales: Tensor
    owns: Tensor
    mimo_x: Tensor | None
    D: Tensor | None


class _KeyGradients(NamedTuple):
    """Of B and C; of the biases; of omega; and of dt, as the angles say, by chunk and head."""

    B: Tensor
    C: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    omega: Tensor
    dt: Tensor


class _EnterGradients(NamedTuple):
    """By sequence: of the state, of what the token before owes, its key, its input, and the factors."""

    ssm: Tensor
    owed: Tensor
    k: Tensor
    x: Tensor
    mimo_x: Tensor | None


# Cached by value, as the plan is.
@lru_cache(maxsize=64)
def _homes(ends: tuple[int, ...], chunk: int, device: torch.device) -> _Homes:
    chunks: list[tuple[int, int, int]] = []
    sequences: list[tuple[int, int]] = []
    for sequence, (start, end) in enumerate(pairwise(ends)):
        count = triton.cdiv(end - start, chunk)
        sequences.append((len(chunks), count))
        chunks += [(sequence, start, end)] * count
    table = lambda rows, dtype=torch.int32: torch.tensor(rows, dtype=dtype, device=device)
    return _Homes(table(chunks), table(sequences), table([end - 1 for end in ends[1:]], torch.int64))


def _rows(t: Tensor) -> Tensor:
    """`t` with b and l as one dimension, the last one dense: a view where it can be one."""
    t = t.flatten(0, 1)
    return t if t.stride(-1) == 1 else t.contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _hopper(call: "_Call", bounds: Sequence[int]) -> ModuleType | None:
    """The kernels that are written for Hopper GPUs, where they serve."""
    sizes = call.headdim == 64 and call.d_state in (64, 128) and call.heads // call.groups % 2 == 0
    if not sizes or not can_copy(call.x):
        return None
    chunks = sum(triton.cdiv(b - a, call.tokens) for a, b in pairwise(bounds))
    if chunks * CHUNK * call.heads * call.headdim >= 2**31:
        return None
    # As models are published: with one rank half of the columns turn, with several all of them.
    if call.rank == 1 and call.mimo_x is None and 4 * call.pairs == call.d_state:
        return hopper_kernels("everstate.ops.trapezoid.triton_hopper", call.x)
    if call.rank in (2, 4, 8) and 2 * call.pairs == call.d_state:
        return hopper_kernels("everstate.ops.trapezoid.triton_hopper_mimo", call.x)
    return None


def _apart(sums: Float[Tensor, "h *n"], parts: int) -> Float[Tensor, "h *n"]:
    """From the sums over the heads of a part up to each to what each has added."""
    each = sums.unflatten(0, (parts, -1))
    return torch.cat([each[:, :1], each.diff(dim=1)], 1).flatten(0, 1)


class _Call:
    """The arguments as the kernels want them, and the launches that forward and backward share."""

    def __init__(self, given: _Arguments, interleaved: bool, ends: Sequence[int]) -> None:
        x, B, self.given = given.x, given.B, given
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.rank, self.groups, self.d_state = B.shape[2:]
        self.pairs, self.ranks = given.omega.shape[-1], triton.next_power_of_2(B.shape[2])
        self.tokens = CHUNK // self.ranks
        self.x, self.omega = _rows(x), _rows(given.omega)
        self.dt, self.A, self.lam = given.dt.flatten(0, 1), given.A.flatten(0, 1), given.lam.flatten(0, 1)
        self.mimo_x, self.D = map(_dense, given[13:])
        bounds = tuple(ends) or tuple(range(0, (self.batch + 1) * self.length, self.length))
        # Triton 3.6 reads beyond its shared memory where a product of float32 has a side of 16.
        smallest = 32 if x.dtype == torch.float32 else 16
        filled = lambda size: max(triton.next_power_of_2(size), smallest)
        self.block_p, still = filled(self.headdim), self.d_state - 2 * self.pairs
        self.hopper = _hopper(self, bounds) if not ends or all(end % self.tokens == 0 for end in ends) else None
        programs = (len(bounds) - 1) * self.heads * triton.cdiv(self.headdim, TILE_P)
        pieces = pieces_for(programs, x.device) if self.hopper is None else fill(programs // 2, x.device)
        self.plan = plan(bounds, self.tokens, pieces, x.device)
        self.homes = _homes(bounds, self.tokens, x.device)
        half, still = filled(self.pairs), filled(still) if still else 0
        self.width = 2 * half + still
        self.sizes = {
            "HEADS": self.heads, "GROUPS": self.groups, "P": self.headdim, "RANK": self.rank, "RANKS": self.ranks,
            "TOKENS": self.tokens, "HALF": half, "STILL": still,
            "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        self.order = {"N": self.d_state, "PAIRS": self.pairs, "HALF": half, "INTERLEAVED": interleaved}
        self.B, self.C = (self._by_chunk(t.flatten(0, 1)) for t in (given.B, given.C))
        self.B_bias, self.C_bias = (
            None if t is None else self._arranged(t.unsqueeze(2), torch.float32) for t in (given.B_bias, given.C_bias)
        )
        self.steps, self.phases, self.final_angle = self._prepare()
        self.cos, self.sin = self._angles()

    def _by_chunk(self, t: Float[Tensor, "t r g n"]) -> Float[Tensor, "rows w"]:
        """B or C by chunk, group and entry, with the columns in parts."""
        t = t if t.stride(-1) == 1 else t.contiguous()
        count = len(self.plan.chunks) * self.groups
        out = t.new_empty(count * self.tokens * self.ranks, self.width)
        chunks_kernel[(count,)](
            t, out, self.plan.chunks, *t.stride()[:3], RANK=self.rank, RANKS=self.ranks, TOKENS=self.tokens,
            GROUPS=self.groups, **self.order, WIDTH=self.width, BLOCK_N=triton.next_power_of_2(self.width),
        )  # fmt: skip
        return out

    def _arranged(self, t: Float[Tensor, "t r g n"], dtype: torch.dtype) -> Float[Tensor, "t r g w"]:
        """`t` with its columns in parts."""
        t = t if t.stride(-1) == 1 else t.contiguous()
        out = t.new_empty(*t.shape[:-1], self.width, dtype=dtype)
        self._arrange(t, out, t.stride()[:3], t.shape[1:3], back=False)
        return out

    def _returned(self, t: Float[Tensor, "*rows w"]) -> Float[Tensor, "*rows n"]:
        """The reverse of `_arranged`."""
        out = t.new_empty(*t.shape[:-1], self.d_state)
        self._arrange(t, out, (0, 0, 0), (1, 1), back=True)
        return out

    def _arrange(
        self, t: Tensor, out: Tensor, strides: tuple[int, ...], middle: tuple[int, ...], *, back: bool
    ) -> None:
        rows, block_n = math.prod(t.shape[:-1]), triton.next_power_of_2(self.width)
        block = max(4096 // block_n, 1)
        arrange_kernel[(triton.cdiv(rows, block),)](
            t, out, rows, *strides, RANK=middle[0], GROUPS=middle[1], **self.order, WIDTH=self.width, BACK=back,
            BLOCK=block, BLOCK_N=block_n,
        )  # fmt: skip

    def _prepare(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers per token, the phase at the start of each chunk, and the angle at the end of each sequence."""
        count, blocks, dt = len(self.plan.chunks), triton.cdiv(self.heads, BLOCK_H), self.dt
        steps = self.x.new_empty(count, self.heads, NUMBERS.value, self.tokens, dtype=torch.float32)
        steps_kernel[(count, blocks)](
            dt, self.A, self.lam, steps, self.plan.chunks, self.homes.chunks,
            *dt.stride(), *self.A.stride(), *self.lam.stride(),
            HEADS=self.heads, TOKENS=self.tokens, BLOCK_H=BLOCK_H,
        )  # fmt: skip
        phases = self.x.new_empty(count, self.heads, self.pairs, dtype=torch.int32)
        final = torch.empty_like(self.given.angle, memory_format=torch.contiguous_format)
        pairs = triton.next_power_of_2(self.pairs)
        turns_kernel[(count, blocks)](
            steps, self.omega, phases, self.plan.chunks, self.omega.stride(0),
            HEADS=self.heads, TOKENS=self.tokens, PAIRS=self.pairs, BLOCK_PAIRS=pairs, BLOCK_H=BLOCK_H,
        )  # fmt: skip
        phases_kernel[(len(self.homes.sequences) * self.heads,)](
            phases, self.given.angle.contiguous(), final, self.homes.sequences,
            HEADS=self.heads, PAIRS=self.pairs, BLOCK_PAIRS=pairs, BLOCK=64,
        )  # fmt: skip
        return steps, phases, final

    def _angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each token, head and pair, by chunk."""
        count, half = len(self.plan.chunks), self.sizes["HALF"]
        dtype = torch.float32 if self.x.dtype == torch.float32 else torch.float16
        cos, sin = self.x.new_empty(2, count, self.heads, self.tokens, half, dtype=dtype).unbind(0)
        block = max(min(triton.next_power_of_2(self.heads), 512 // half), 1)
        angles_kernel[(count, triton.cdiv(self.heads, block))](
            self.steps, self.omega, self.phases, cos, sin, self.plan.chunks, self.omega.stride(0),
            HEADS=self.heads, TOKENS=self.tokens, PAIRS=self.pairs, HALF=half, BLOCK_H=block,
        )  # fmt: skip
        return cos, sin

    @property
    def block(self) -> int:
        """Rows of the state in one program of a sweep."""
        return min(self.block_p, TILE_P)

    @property
    def warps(self) -> int:
        """A state of 64 x 128 in float32 takes half of the registers of four warps."""
        return 4 if self.block * self.width <= 64 * 128 else 8

    @property
    def rows(self) -> int:
        """Rows of a state at the boundary of a chunk: whole tiles."""
        return triton.cdiv(self.headdim, self.block) * self.block

    def _edges(self) -> dict[str, int]:
        """Sizes for the kernels of the ends of sequences."""
        return {
            "HEADS": self.heads, "P": self.headdim, "RANK": self.rank, **self.order, "WIDTH": self.width,
            "BLOCK_P": triton.next_power_of_2(self.headdim), "BLOCK_N": triton.next_power_of_2(self.width),
        }  # fmt: skip

    def enter(self) -> Float[Tensor, "seqs h p w"]:
        """The states that enter the sequences, with what the tokens before them owe."""
        given = self.given
        entered = given.ssm.new_empty(*given.ssm.shape[:-1], self.width)
        enter_kernel[(len(self.homes.sequences) * self.heads,)](
            self.dt, self.lam, given.ssm.contiguous(), given.k.contiguous(), given.last.contiguous(), self.mimo_x,
            entered, self.homes.sequences, self.plan.chunks, *self.dt.stride(), *self.lam.stride(), **self._edges(),
        )  # fmt: skip
        return entered

    def leave(self) -> tuple[Float[Tensor, "seqs r h n"], Float[Tensor, "seqs h p"]]:
        """The rotated keys and the inputs of the last tokens."""
        given = self.given
        k, x = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (given.k, given.last))
        leave_kernel[(len(self.homes.sequences) * self.heads,)](
            self.x, self.B, self.B_bias, self.final_angle, k, x, self.homes.sequences, self.plan.chunks,
            self.homes.chunks, *self.x.stride()[:2], GROUPS=self.groups, RANKS=self.ranks, TOKENS=self.tokens,
            **self._edges(),
        )  # fmt: skip
        return k, x

    def scan(self) -> tuple[Float[Tensor, "b l r h p"], Float[Tensor, "seqs h p n"]]:
        """Outputs, and the state after each sequence."""
        entering = self._entering(self.enter(), None, None)
        final = torch.empty_like(self.given.ssm, memory_format=torch.contiguous_format)
        y = self.x.new_empty(self.batch, self.length, self.rank, self.heads, self.headdim)
        if self.hopper is not None:
            self.hopper.scan(self, entering, y, final)
            return y, final
        grid = (len(self.plan.segments) * self.heads * triton.cdiv(self.headdim, TILE_P),)
        scan_kernel[grid](
            self.x, self.mimo_x, self.steps, self.cos, self.sin, self.B, self.C,
            self.B_bias, self.C_bias, self.D, entering, y, final, self.plan.chunks, self.plan.segments,
            *self.x.stride()[:2], **{**self.sizes, **self.order}, BLOCK_P=self.block, num_warps=self.warps,
            num_stages=stages_for(self.x, 2),
        )  # fmt: skip
        return y, final

    def _entering(self, state: Tensor, dy: Tensor | None, made: Tensor | None) -> Float[Tensor, "segments h p w"]:
        """The state that enters each segment; given dy, the gradient of the state that leaves it."""
        segments, sequences = self.plan.segments, self.plan.sequences
        if len(segments) == len(sequences):
            return state
        ends = state.new_empty(len(segments), *state.shape[1:])
        kept = state.new_empty(len(segments), self.heads)
        self._sweep(dy, made, None, None, ends, kept, make=True)
        size = self.headdim * self.width
        pass_kernel[(len(sequences) * self.heads, triton.cdiv(size, 1024))](
            ends, kept, state, sequences, HEADS=self.heads, SIZE=size, REVERSE=dy is not None, BLOCK=1024
        )
        return ends

    def _boundaries(
        self, state: Tensor, dy: Tensor | None = None, entered: Tensor | None = None, turned: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The state that enters each chunk (given dy, the gradient of that which leaves it), the one at the end, and,
        but for a Hopper GPU, all keys (queries). `sweep_kernel` says what it does with `entered` and `turned`."""
        count = len(self.plan.chunks)
        made = self.x.new_empty(count, self.heads, CHUNK, self.width) if self.hopper is None else None
        entering = self._entering(state, dy, made)
        chunks = self.x.new_empty(count, self.heads, self.rows, self.width)
        last = torch.empty_like(state)
        if self.hopper is not None and self.rank > 1:
            hopper = hopper_kernels(self.hopper.__name__ + "_sweep", self.x)
            assert hopper is not None
            hopper.sweep(self, dy, entering, chunks, last, entered, turned)
            return chunks, last, made
        make = made is None or len(self.plan.segments) == len(self.plan.sequences)
        self._sweep(dy, made, entering, chunks, last, None, entered, turned, make=make)
        return chunks, last, made

    def _sweep(
        self, dy: Tensor | None, made: Tensor | None, entering: Tensor | None, chunks: Tensor | None, ends: Tensor,
        kept: Tensor | None, entered: Tensor | None = None, turned: Tensor | None = None, *, make: bool,
    ) -> None:  # fmt: skip
        grid = (len(self.plan.segments) * self.heads * triton.cdiv(self.headdim, TILE_P),)
        x, keys, bias = (self.x, self.B, self.B_bias) if dy is None else (dy, self.C, self.C_bias)
        token, head = x.stride(0), x.stride(-2)
        sweep_kernel[grid](
            x, None if dy is not None else self.mimo_x, self.steps, self.cos, self.sin,
            keys if make or made is None else made, bias, made, entering, chunks,
            ends, kept, entered, turned, self.plan.chunks, self.plan.segments,
            token, 0 if dy is None else x.stride(1), head,
            **self.sizes, BLOCK_P=self.block, REVERSE=dy is not None, MAKE=make, num_warps=self.warps,
            num_stages=stages_for(self.x, 2),
        )  # fmt: skip

    def gradients(self, dy: Tensor, dssm: Tensor, dk: Tensor, dlast: Tensor, dangle: Tensor) -> list[Tensor | None]:
        """Those of all arguments, in their order; None for arguments that are not given."""
        dy = _rows(dy)
        if self.hopper is not None and (self.rank > 1 or not can_copy(dy.squeeze(1))):
            dy = dy.contiguous()
        entering, ended, k = self._boundaries(self.enter())
        turned = self.steps.new_empty(len(self.plan.chunks), self.heads, self.rows // self.block, self.sizes["HALF"])
        dended = self._arranged(dssm, torch.float32)
        leaving, dentered, q = self._boundaries(dended, dy, entering, turned)
        dlast_B, dleaving = self._leave_gradients(dk.contiguous(), dangle.contiguous())
        later, dstart = self._angle_gradients(turned, ended, dended, dleaving)
        inputs, keys = self._chunk_gradients(dy, k, q, entering, leaving, later)
        del entering, leaving, k, q
        enter = self._enter_gradients(dentered)
        inputs.x[self.homes.last] += dlast.to(inputs.x.dtype)
        each = dlast_B.unflatten(2, (self.groups, -1)).sum(3)  # a group's key is that of its heads
        keys.B.view(-1, *each.shape[1:])[self.homes.last] += each.to(keys.B.dtype)
        dB_bias = None if keys.B_bias is None else keys.B_bias + dlast_B.sum(0).transpose(0, 1)
        ddt, dA, dlam = self._step_gradients(inputs, keys.dt, enter.owed)
        dmimo_x = None
        if inputs.mimo_x is not None and enter.mimo_x is not None:
            dmimo_x = inputs.mimo_x.sum(0) + enter.mimo_x.sum(0)
        return [
            inputs.x.view(self.given.x.shape), ddt, dA, dlam, keys.omega.view(self.given.omega.shape), keys.B, keys.C,
            enter.ssm, enter.k, enter.x, dstart,
            dB_bias, keys.C_bias,
            dmimo_x, None if inputs.D is None else inputs.D.sum(0),
        ]  # fmt: skip

    def _chunk_gradients(
        self, dy: Tensor, k: Tensor | None, q: Tensor | None, entering: Tensor, leaving: Tensor, later: Tensor
    ) -> tuple[_InputGradients, _KeyGradients]:
        """What chunks say, given what later ones say of angles."""
        if k is not None and q is not None:
            given = (dy, k, q, entering, leaving)
            return self._input_gradients(*given), self._key_gradients(*given, later)
        assert self.hopper is not None
        backward = hopper_kernels(self.hopper.__name__ + "_backward", self.x)
        assert backward is not None
        splits = self._splits()
        inputs, keys = backward.gradients(self, dy, entering, leaving, later, splits)
        dB, dC = joined(keys.B), joined(keys.C)
        dB_bias, dC_bias = (
            None if t is None else self._returned(_apart(t.sum(0), self.groups * splits)).squeeze(2)
            for t in (keys.B_bias, keys.C_bias)
        )
        return inputs, _KeyGradients(dB, dC, dB_bias, dC_bias, joined(keys.omega), keys.dt)

    def _input_gradients(self, dy: Tensor, k: Tensor, q: Tensor, entering: Tensor, leaving: Tensor) -> _InputGradients:
        count, steps = len(self.plan.chunks), self.steps
        dx = self.x.new_empty(self.batch * self.length, self.heads, self.headdim)
        decays, scales, owns = steps.new_empty(3, count, self.heads, self.tokens).unbind(0)
        dmimo_x = None if self.mimo_x is None else steps.new_empty(count, self.heads, self.rank, self.headdim)
        dD = None if self.D is None else steps.new_empty(count, self.heads)
        inputs_kernel[(count * self.heads,)](
            self.x, self.mimo_x, dy, steps, k, q, self.D, entering, leaving,
            dx, decays, scales, owns, dmimo_x, dD, self.plan.chunks, *self.x.stride()[:2], *dy.stride()[:3],
            **only(self.sizes, inputs_kernel), BLOCK_P=self.block_p,
            num_warps=4 if self.block_p <= 64 else 8, num_stages=1,
        )  # fmt: skip
        return _InputGradients(dx, decays, scales, owns, dmimo_x, dD)

    def _splits(self) -> int:
        """Programs among which the heads of a group are divided in the gradients: as few as fill the GPU."""
        programs = len(self.plan.chunks) * self.groups
        return splits_of(self.heads // self.groups, programs, 2 * processors(self.x.device))

    def _key_gradients(
        self, dy: Tensor, k: Tensor, q: Tensor, entering: Tensor, leaving: Tensor, later: Tensor
    ) -> _KeyGradients:
        splits, count, steps = self._splits(), len(self.plan.chunks), self.steps
        total, shape, half = self.batch * self.length, (*self.given.B.shape[:-1], self.width), self.sizes["HALF"]
        dB, dC = (t.new_empty(splits, *shape, dtype=torch.float32 if splits > 1 else t.dtype) for t in (self.B, self.C))
        dB_bias, dC_bias = (None if t is None else steps.new_empty(count, *t.shape) for t in (self.B_bias, self.C_bias))
        dangles = steps.new_empty(count, self.heads, CHUNK, half)
        for turn in (True, False) if self.sizes["STILL"] else (True,):
            keys_kernel[(count * self.groups * splits,)](
                self.x, self.mimo_x, dy, steps, self.cos, self.sin, k, q, entering, leaving,
                dB, dC, dB_bias, dC_bias, dangles, self.plan.chunks, *self.x.stride()[:2], *dy.stride()[:3],
                total, **self.sizes, BLOCK_P=self.block_p, SPLITS=splits, TURN=turn,
                num_warps=4 if self.block_p <= 64 else 8, num_stages=stages_for(self.x, 2),
            )  # fmt: skip
        turns = self.turn_gradients(dangles, later, self.ranks)
        dB, dC = (self._returned(joined(t)) for t in (dB, dC))
        dB_bias, dC_bias = (None if t is None else self._returned(t.sum(0)).squeeze(2) for t in (dB_bias, dC_bias))
        return _KeyGradients(dB, dC, dB_bias, dC_bias, *turns)

    def turn_gradients(
        self, dangles: Float[Tensor, "chunks h e s"], later: Float[Tensor, "chunks h s"], ranks: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of omega, and of dt, from those of the angles of entries, of which a token has as many as `ranks`,
        and what later chunks say."""
        count, steps = len(self.plan.chunks), self.steps
        splits = splits_of(self.heads, count, 4 * processors(self.x.device))
        omega = steps.new_empty(splits, self.batch * self.length, self.pairs)
        dt = steps.new_empty(count, self.heads, self.tokens)
        exact = self.x.dtype == torch.float32
        turn_gradients_kernel[(count * splits,)](
            dangles, steps, self.omega, later, dt, omega, self.plan.chunks, self.omega.stride(0),
            self.batch * self.length, HEADS=self.heads, RANKS=ranks, TOKENS=self.tokens, PAIRS=self.pairs,
            HALF=self.sizes["HALF"], BLOCK=max(self.tokens, 32), SPLITS=splits, PRECISION=self.sizes["PRECISION"],
            DTYPE=tl.float32 if exact else tl.bfloat16, num_stages=stages_for(self.x, 3),
        )  # fmt: skip
        return joined(omega), dt

    def rank_gradients(
        self, du: Float[Tensor, "t r h p"], numbers: Float[Tensor, "numbers chunks h e"], dD: Tensor | None
    ) -> _InputGradients:
        """Gradients of inputs, decays, scales and own weights from those of entries."""
        count, steps = len(self.plan.chunks), self.steps
        dx = self.x.new_empty(self.batch * self.length, self.heads, self.headdim)
        sums = steps.new_empty(3, count, self.heads, self.tokens)
        dmimo_x = None if self.mimo_x is None else steps.new_empty(count, self.heads, self.rank, self.headdim)
        ranks_kernel[(count * self.heads,)](
            self.x, self.mimo_x, du, numbers, dx, sums, dmimo_x, self.plan.chunks, count, *self.x.stride()[:2],
            **only(self.sizes, ranks_kernel), BLOCK_P=self.block_p, num_warps=2, num_stages=1,
        )  # fmt: skip
        return _InputGradients(dx, sums[0], sums[1], sums[2], dmimo_x, dD)

    def _enter_gradients(self, dentered: Tensor) -> _EnterGradients:
        """Those of the start of a sequence, given that of the state that enters it."""
        given, sequences = self.given, len(self.homes.sequences)
        owed, dssm = dentered.new_empty(sequences, self.heads), torch.empty_like(given.ssm)
        dk, dx = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (given.k, given.last))
        dmimo_x = None if self.mimo_x is None else owed.new_empty(sequences, *self.mimo_x.shape)
        enter_gradients_kernel[(sequences * self.heads,)](
            self.dt, self.lam, dentered, given.k.contiguous(), given.last.contiguous(), self.mimo_x,
            dssm, owed, dk, dx, dmimo_x, self.homes.sequences, self.plan.chunks, *self.dt.stride(), *self.lam.stride(),
            **self._edges(),
        )  # fmt: skip
        return _EnterGradients(dssm, owed, dk, dx, dmimo_x)

    def _leave_gradients(self, dk: Tensor, dangle: Tensor) -> tuple[Tensor, Tensor]:
        """What the keys of the last tokens say of B, for each head, and of the angles at the end, with `dangle`."""
        k, _ = self.leave()
        dB, leaving = torch.empty_like(dk), torch.empty_like(dangle)
        leave_gradients_kernel[(len(self.homes.sequences) * self.heads,)](
            k, self.final_angle, dk, dangle, dB, leaving, **only(self._edges(), leave_gradients_kernel),
        )  # fmt: skip
        return dB, leaving

    def _angle_gradients(
        self, turned: Tensor, ended: Tensor, dended: Tensor, dleaving: Tensor
    ) -> tuple[Float[Tensor, "chunks h s"], Float[Tensor, "seqs h s"]]:
        """What all that comes after each chunk says of angles, and the gradient of the angle that enters."""
        later, dangle = turned.new_empty(*turned.shape[:2], self.pairs), torch.empty_like(dleaving)
        angle_gradients_kernel[(len(self.homes.sequences) * self.heads,)](
            turned, ended, dended, dleaving, dangle, later, self.homes.sequences, HEADS=self.heads, P=self.headdim,
            PAIRS=self.pairs, HALF=self.sizes["HALF"], WIDTH=self.width, TILES=turned.shape[2],
            BLOCK_P=triton.next_power_of_2(self.headdim), BLOCK=64,
        )  # fmt: skip
        return later, dangle

    def _step_gradients(self, inputs: _InputGradients, dsteps: Tensor, owed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of dt, A and lam, given what the angles say of dt."""
        count, given = len(self.plan.chunks), self.given
        ddt, dA, dlam = (self.steps.new_empty(given.dt.shape) for _ in range(3))
        steps_gradients_kernel[(count, triton.cdiv(self.heads, BLOCK_H))](
            self.dt, self.A, self.lam, inputs.decays, inputs.scales, inputs.owns, dsteps, owed,
            ddt, dA, dlam, self.plan.chunks, self.homes.chunks,
            *self.dt.stride(), *self.A.stride(), *self.lam.stride(),
            HEADS=self.heads, TOKENS=self.tokens, BLOCK_H=BLOCK_H,
        )  # fmt: skip
        return ddt, dA, dlam
