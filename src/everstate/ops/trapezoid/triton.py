"""The trapezoid on a GPU: SSD with a look-ahead, whose keys and queries are rebuilt in each kernel.

The formulas are those of `everstate.ops.trapezoid.lookahead`, chunks and segments those of
`everstate.ops.triton_segments`.

Forward: `triton_prepare` makes numbers per token and the phases with which chunks start; then `triton_forward` walks
along time and makes cosines, sines, keys and queries where it uses them (`triton_keys`). It keeps the phases for
backward, and for a Hopper GPU the states that enter segments. Backward: two sweeps along time write the state that
enters each chunk and the gradient of that which leaves it; and from both states, what all later chunks say of the
angles. Then every chunk is independent (`triton_backward`). Of a head and token only a few numbers are written to
memory that could be made again: no cosines, keys or queries. All is summed in a fixed order: the same call gives the
same bits.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import capability, kernel_op, processors
from everstate.core.packing import Packing
from everstate.ops.glu import gate_heads
from everstate.ops.rotary.halves import deinterleave, interleave
from everstate.ops.trapezoid import TrapezoidState
from everstate.ops.trapezoid.triton_backward import inputs_kernel, keys_kernel, turn_gradients_kernel
from everstate.ops.trapezoid.triton_forward import scan_kernel, sweep_kernel
from everstate.ops.trapezoid.triton_keys import NUMBERS
from everstate.ops.trapezoid.triton_prepare import (
    VECTORS,
    angle_gradients_kernel,
    arrange_kernel,
    bias_gradients_kernel,
    chunks_kernel,
    enter_gradients_kernel,
    enter_halves_gradients_kernel,
    enter_halves_kernel,
    enter_kernel,
    halves_kernel,
    leave_gradients_kernel,
    leave_kernel,
    numbers_kernel,
    phases_kernel,
    rates_kernel,
    sources_kernel,
    steps_gradients_kernel,
    steps_kernel,
    turns_kernel,
)
from everstate.ops.trapezoid.triton_tables import homes
from everstate.ops.trapezoid.triton_values import Arguments, EnterGradients, InputGradients, KeyGradients
from everstate.ops.triton_launch import cdiv, launch, power_of_2
from everstate.ops.triton_replay import replayed
from everstate.ops.triton_rows import dense
from everstate.ops.triton_segments import (
    CHUNK,
    can_copy,
    copyable,
    fill,
    hopper_kernels,
    joined,
    only,
    pass_kernel,
    pieces_for,
    plan,
    rows_of,
    settings_for,
    splits_of,
)
from everstate.ops.triton_sums import COLUMNS, ROWS, total

HEADS_AT_ONCE, HEADS_IN_TURN = 32, 16
"""Heads whose numbers per token one program makes, and heads that one program takes one after the other."""

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
    z: Float[Tensor, "b l r h p"] | None = None,
    interleaved: bool = True,
    packing: Packing | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Float[Tensor, "b l r h p"], TrapezoidState]:
    """See `everstate.ops.trapezoid_scan`. `chunk_size` is the business of other implementations."""
    ssm, k, last, angle = (t.to(torch.float32) for t in state)
    ends = [] if packing is None else list(packing.cu_seqlens)
    y, ssm, k, last, angle, _, _ = _scan(
        x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D, interleaved, ends
    )
    return gate_heads(y, z), TrapezoidState(ssm, k, last, angle)


@kernel_op("trapezoid_scan")
@replayed
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None,
    interleaved: bool, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, the state at the end, and what backward asks for: `Call.phases` and `Call.kept`."""
    given = Arguments(x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    call = Call(given, interleaved, ends)
    y, final, final_angle = call.scan()
    return y, final, *call.leave(final_angle), final_angle, call.phases, call.kept


@_scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None,
    interleaved: bool, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(*x.shape[:2], B.shape[2], *x.shape[2:])
    empty = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)
    given = Arguments(x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    return y, empty(ssm), empty(k), empty(last), empty(angle), *phases_and_kept(given, ends)


def phases_and_kept(given: Arguments, ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Memory for what forward keeps for backward."""
    x, B = given.x, given.B
    lengths = [b - a for a, b in pairwise(ends)] if ends else [x.shape[1]] * x.shape[0]
    chunks = sum(cdiv(length, CHUNK // power_of_2(B.shape[2])) for length in lengths)
    phases = x.new_empty(chunks + len(lengths), *given.angle.shape[1:], dtype=torch.int32)
    return phases, _empty_kept(given, lengths)


def _has_sizes(x: Tensor, B: Tensor) -> bool:
    """Whether heads and states are of the sizes of the kernels for Hopper GPUs."""
    (heads, headdim), (groups, d_state) = x.shape[2:], B.shape[3:]
    return headdim == 64 and d_state in (64, 128) and heads // groups % 2 == 0


def _is_single(x: Tensor, omega: Tensor, B: Tensor, mimo_x: Tensor | None) -> bool:
    """Whether these suit the kernels for Hopper GPUs and one rank, of whose columns half turn."""
    return _has_sizes(x, B) and B.shape[2] == 1 and mimo_x is None and 4 * omega.shape[2] == B.shape[4]


def _empty_kept(given: Arguments, lengths: Sequence[int]) -> Float[Tensor, "states p n"]:
    """For states that enter segments of sequences of these lengths: where a Hopper GPU may ask."""
    x = given.x
    single = _is_single(x, given.omega, given.B, given.mimo_x) and x.dtype.itemsize == 2
    chunks, heads = [cdiv(length, CHUNK) for length in lengths], x.shape[2]
    pieces = fill(len(chunks) * heads // 2, x.device) if single and capability(x.device)[0] == 9 else 1
    states = 0 if pieces == 1 else sum(cdiv(count, cdiv(count, pieces)) for count in chunks) * heads
    return given.ssm.new_empty(states, *given.ssm.shape[2:])


@kernel_op("trapezoid_scan_backward")
@replayed
def _backward(
    dy: Tensor, dssm: Tensor | None, dk: Tensor | None, dlast: Tensor | None, dangle: Tensor | None, phases: Tensor,
    kept: Tensor, x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None,
    interleaved: bool, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of all arguments that are given, in their order."""
    given = Arguments(x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    grads = Call(given, interleaved, ends, phases, kept).gradients(dy, dssm, dk, dlast, dangle)
    return [grad.to(t.dtype) for grad, t in zip(grads, given, strict=True) if t is not None and grad is not None]


@_backward.register_fake
def _(
    dy: Tensor, dssm: Tensor | None, dk: Tensor | None, dlast: Tensor | None, dangle: Tensor | None, phases: Tensor,
    kept: Tensor, x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None,
    interleaved: bool, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    given = (x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.interleaved, ctx.ends = inputs
    ctx.save_for_backward(*output[5:], *tensors)
    ctx.set_materialize_grads(False)  # final states rarely have one


def _differentiate(
    ctx: Any, dy: Tensor | None, dssm: Tensor | None, dk: Tensor | None, dlast: Tensor | None, dangle: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    saved = ctx.saved_tensors
    if dy is None:
        x, B = saved[2], saved[7]
        dy = x.new_zeros(*x.shape[:2], B.shape[2], *x.shape[2:])
    grads = iter(_backward(dy, dssm, dk, dlast, dangle, *saved, ctx.interleaved, ctx.ends))
    return (*(None if t is None else next(grads) for t in saved[2:]), None, None)


_scan.register_autograd(_differentiate, setup_context=_save)


def _rows(t: Float[Tensor, "b l *h p"]) -> Float[Tensor, "t *h p"]:
    """`t` with b and l as one dimension, as `rows_of`."""
    return rows_of(t).squeeze(0)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _hopper(call: "Call", bounds: Sequence[int]) -> ModuleType | None:
    """The kernels that are written for Hopper GPUs, where they serve."""
    x, omega, B = call.given.x, call.given.omega, call.given.B
    chunks = sum(cdiv(b - a, call.tokens) for a, b in pairwise(bounds))
    if not can_copy(call.x) or chunks * CHUNK * call.heads * call.headdim >= 2**31:
        return None
    if _is_single(x, omega, B, call.mimo_x):
        return hopper_kernels("everstate.ops.trapezoid.triton_hopper", call.x)
    # As models with several ranks are published, all of their columns turn. The gradients of two ranks with a state
    # of 128 would need more shared memory than there is.
    several = call.rank in (2, 4, 8) and 2 * call.pairs == call.d_state and (call.rank > 2 or call.d_state < 128)
    if several and _has_sizes(x, B):
        return hopper_kernels("everstate.ops.trapezoid.triton_hopper_mimo", call.x)
    return None


class Call:
    """The arguments as the kernels want them, and the launches that forward and backward share."""

    def __init__(
        self, given: Arguments, interleaved: bool, ends: Sequence[int], phases: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:  # fmt: skip
        x, B, self.given = given.x, given.B, given
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.rank, self.groups, self.d_state = B.shape[2:]
        self.pairs, self.ranks = given.omega.shape[-1], power_of_2(B.shape[2])
        self.tokens = CHUNK // self.ranks
        self.x, self.omega = _rows(x), _rows(given.omega)
        self.dt, self.A, self.lam = given.dt.flatten(0, 1), given.A.flatten(0, 1), given.lam.flatten(0, 1)
        self.mimo_x, self.D = map(_dense, given[13:])
        bounds = tuple(ends) or tuple(range(0, (self.batch + 1) * self.length, self.length))
        # ptxas 12.8 may lose tiles where a product of float32 has a side of 16 (docs/learn/kernels.md, traps).
        smallest = 32 if x.dtype == torch.float32 else 16
        filled = lambda size: max(power_of_2(size), smallest)
        self.block_p, still = filled(self.headdim), self.d_state - 2 * self.pairs
        self.hopper = _hopper(self, bounds) if not ends or all(end % self.tokens == 0 for end in ends) else None
        self.single = self.hopper is not None and self.rank == 1  # the kernels for one rank, which make more themselves
        programs = (len(bounds) - 1) * self.heads * cdiv(self.headdim, TILE_P)
        self.pieces = pieces_for(programs, x.device) if self.hopper is None else fill(programs // 2, x.device)
        self.bounds, self.plan = bounds, plan(bounds, self.tokens, self.pieces, x.device)
        self.homes = homes(bounds, self.tokens, x.device)
        half, still = filled(self.pairs), filled(still) if still else 0
        self.width = 2 * half + still
        self.sizes: dict[str, Any] = {
            "HEADS": self.heads, "GROUPS": self.groups, "P": self.headdim, "RANK": self.rank, "RANKS": self.ranks,
            "TOKENS": self.tokens, "PAIRS": self.pairs, "HALF": half, "STILL": still,
            "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        self.order = {"N": self.d_state, "PAIRS": self.pairs, "HALF": half, "INTERLEAVED": interleaved}
        self.interleaved = interleaved
        if phases is not None:
            self.phases = phases
        # The states that enter segments, where forward has found them; members of pairs lie side by side.
        self.found = kept is not None and self.single and len(self.plan.segments) > len(bounds) - 1
        self.kept = _empty_kept(given, [b - a for a, b in pairwise(bounds)]) if kept is None else kept

    # What only some kernels ask for is made when they do.

    @cached_property
    def arranged(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """B and C by chunk, group and entry, and their biases in float32, all with the columns in parts. On Hopper, for
        one rank, zeros stand for one bias that is not there, and both are one tensor."""
        given = self.given
        if self.single:
            return self._arranged_on_hopper()
        first, second = (
            None if t is None else self._arranged(t.unsqueeze(2), torch.float32) for t in (given.B_bias, given.C_bias)
        )
        return self._by_chunk(_rows(given.B)), self._by_chunk(_rows(given.C)), first, second

    def _arranged_on_hopper(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        (B, C), count = map(_rows, (self.given.B, self.given.C)), len(self.plan.chunks) * self.groups
        given = [_dense(t) for t in (self.given.B_bias, self.given.C_bias)]
        out = B.new_empty(2, count * self.tokens, self.width)
        missing = sum(t is None for t in given)
        allocate = B.new_zeros if missing == 1 else B.new_empty
        biases = allocate(2, self.heads, 1, 1, self.width, dtype=torch.float32)
        launch(
            sources_kernel, (count + 1, 2),
            B, C, *given, out, biases, self.plan.chunks, count, B.stride(0), B.stride(2), C.stride(0), C.stride(2),
            HEADS=self.heads, GROUPS=self.groups, TOKENS=self.tokens, HALF=self.pairs,
            INTERLEAVED=self.interleaved,
        )  # fmt: skip
        first, second = (None, None) if missing == 2 else biases
        return out[0], out[1], first, second

    @property
    def B(self) -> Float[Tensor, "rows w"]:
        return self.arranged[0]

    @property
    def C(self) -> Float[Tensor, "rows w"]:
        return self.arranged[1]

    @property
    def B_bias(self) -> Float[Tensor, "h r 1 w"] | None:
        return self.arranged[2]

    @property
    def C_bias(self) -> Float[Tensor, "h r 1 w"] | None:
        return self.arranged[3]

    # What the kernels for Hopper read instead: as the caller has it, the two members of a pair side by side.

    @cached_property
    def sources(self) -> list[Float[Tensor, "t g n"]]:
        return [copyable(self.side_by_side(t).flatten(0, 1).squeeze(1)) for t in (self.given.B, self.given.C)]

    @cached_property
    def biases(self) -> list[Float[Tensor, "h r n"] | None]:
        """Both, or none."""
        given = [self.given.B_bias, self.given.C_bias]
        there = [t for t in given if t is not None]
        if len(there) == 1:
            given = [torch.zeros_like(there[0]) if t is None else t for t in given]
        return [None if t is None else self.side_by_side(t).float().contiguous() for t in given]

    def side_by_side(self, t: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """From the caller's order of columns."""
        return t if self.interleaved else interleave(t)

    def as_given(self, t: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """The reverse of `side_by_side`."""
        return t if self.interleaved else deinterleave(t)

    def _by_chunk(self, t: Float[Tensor, "t r g n"]) -> Float[Tensor, "rows w"]:
        """B or C by chunk, group and entry, with the columns in parts."""
        count = len(self.plan.chunks) * self.groups
        out = t.new_empty(count * self.tokens * self.ranks, self.width)
        launch(
            chunks_kernel, (count,),
            t, out, self.plan.chunks, *t.stride()[:3], RANK=self.rank, RANKS=self.ranks, TOKENS=self.tokens,
            GROUPS=self.groups, **self.order, WIDTH=self.width, BLOCK_N=power_of_2(self.width),
        )  # fmt: skip
        return out

    def _arranged(self, t: Float[Tensor, "t r g n"], dtype: torch.dtype) -> Float[Tensor, "t r g w"]:
        """`t` with its columns in parts."""
        t = dense(t)
        out = t.new_empty(*t.shape[:-1], self.width, dtype=dtype)
        if self.single and t.is_contiguous():
            rows, block = math.prod(t.shape[:-1]), 32
            launch(
                halves_kernel, (cdiv(rows, block),),
                t, out, rows, HALF=self.pairs, INTERLEAVED=self.interleaved, BLOCK=block,
            )  # fmt: skip
        else:
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
        rows, block_n = math.prod(t.shape[:-1]), power_of_2(self.width)
        block = max(4096 // block_n, 1)
        launch(
            arrange_kernel, (cdiv(rows, block),),
            t, out, rows, *strides, RANK=middle[0], GROUPS=middle[1], **self.order, WIDTH=self.width, BACK=back,
            BLOCK=block, BLOCK_N=block_n,
        )  # fmt: skip

    @cached_property
    def steps(self) -> Float[Tensor, "chunks h 5 t"]:
        """Numbers per token."""
        count, dt = len(self.plan.chunks), self.dt
        steps = self.x.new_empty(count, self.heads, NUMBERS.value, self.tokens, dtype=torch.float32)
        launch(
            steps_kernel, (count, cdiv(self.heads, HEADS_AT_ONCE)),
            dt, self.A, self.lam, steps, self.plan.chunks, self.homes.chunks,
            *dt.stride(), *self.A.stride(), *self.lam.stride(),
            HEADS=self.heads, TOKENS=self.tokens, BLOCK_H=HEADS_AT_ONCE,
        )  # fmt: skip
        return steps

    @cached_property
    def numbers(self) -> Float[Tensor, "chunks h 7 t"]:
        """What the kernels for Hopper want instead to find outputs of one rank."""
        count, (B, C) = len(self.plan.chunks), self.sources
        numbers = self.x.new_empty(count, self.heads, VECTORS.value, self.tokens, dtype=torch.float32)
        launch(
            numbers_kernel, (count, self.groups * cdiv(self.heads // self.groups, HEADS_AT_ONCE)),
            self.dt, self.A, self.lam, B, C, *self.biases, self.D, numbers,
            self.plan.chunks, self.homes.chunks, *self.dt.stride(), *self.A.stride(), *self.lam.stride(),
            B.stride(0), C.stride(0), HEADS=self.heads, GROUPS=self.groups, TOKENS=self.tokens,
            N=self.d_state, BLOCK_H=HEADS_AT_ONCE,
        )  # fmt: skip
        return numbers

    @cached_property
    def rates(self) -> Float[Tensor, "chunks t s"]:
        """omega by chunk, for Hopper."""
        rates = self.x.new_empty(len(self.plan.chunks), self.tokens, self.pairs, dtype=torch.float32)
        launch(
            rates_kernel, (len(rates),),
            self.omega, rates, self.plan.chunks, self.omega.stride(0), TOKENS=self.tokens, PAIRS=self.pairs,
        )  # fmt: skip
        return rates

    @cached_property
    def phases(self) -> Int[Tensor, "chunks_and_seqs h s"]:
        """At the start of each chunk, and behind these at the end of each sequence."""
        count = len(self.plan.chunks)
        phases = self.empty_phases()
        pairs = power_of_2(self.pairs)
        launch(
            turns_kernel, (count, cdiv(self.heads, HEADS_IN_TURN)),
            self.steps, self.omega, phases, self.plan.chunks, self.omega.stride(0),
            HEADS=self.heads, TOKENS=self.tokens, PAIRS=self.pairs, BLOCK_PAIRS=pairs, BLOCK_H=HEADS_IN_TURN,
        )  # fmt: skip
        launch(
            phases_kernel, (len(self.homes.sequences) * self.heads,),
            phases, self.given.angle.contiguous(), phases[count:], self.homes.sequences,
            HEADS=self.heads, PAIRS=self.pairs, BLOCK_PAIRS=pairs, BLOCK=64,
        )  # fmt: skip
        return phases

    def empty_phases(self) -> Int[Tensor, "chunks_and_seqs h s"]:
        rows = len(self.plan.chunks) + len(self.homes.sequences)
        return self.x.new_empty(rows, self.heads, self.pairs, dtype=torch.int32)

    @cached_property
    def final_angle(self) -> Float[Tensor, "seqs h s"]:
        return self.phases[len(self.plan.chunks) :].to(torch.float32) * (math.tau / 2**32)

    @property
    def block(self) -> int:
        """Rows of the state in one program of a sweep."""
        return min(self.block_p, TILE_P)

    @property
    def warps(self) -> int:
        """A state of 64 x 128 in float32 takes half of the registers of four warps."""
        return 4 if self.block * self.width <= 64 * 128 else 8

    @property
    def paired(self) -> bool:
        """Whether half of the columns turn, of one rank, and the members of a pair lie side by side."""
        return self.single and self.interleaved

    @property
    def rows(self) -> int:
        """Rows of a state at the boundary of a chunk: whole tiles."""
        return cdiv(self.headdim, self.block) * self.block

    def _edges(self, *, parts: bool = True) -> dict[str, int]:
        """Sizes for the kernels of the ends of sequences, whose columns lie in parts or as the caller has them."""
        half = self.d_state // 2
        kept = {"N": self.d_state, "PAIRS": half, "HALF": half, "INTERLEAVED": False}
        width = self.width if parts else self.d_state
        return {
            "HEADS": self.heads, "P": self.headdim, "RANK": self.rank, **(self.order if parts else kept),
            "WIDTH": width, "BLOCK_P": power_of_2(self.headdim), "BLOCK_N": power_of_2(width),
        }  # fmt: skip

    def enter(self, *, parts: bool = True) -> Float[Tensor, "seqs h p w"]:
        """The states that enter the sequences, with what the tokens before them owe."""
        given, sizes = self.given, self._edges(parts=parts)
        entered = given.ssm.new_empty(*given.ssm.shape[:-1], sizes["WIDTH"])
        if parts and self.paired:
            launch(
                enter_halves_kernel, (len(self.homes.sequences) * self.heads, self.headdim // 16),
                self.dt, self.lam, given.ssm.contiguous(), given.k.contiguous(), given.last.contiguous(), entered,
                self.homes.sequences, self.plan.chunks, *self.dt.stride(), *self.lam.stride(),
                HEADS=self.heads, P=self.headdim, HALF=self.pairs, BLOCK_P=16,
            )  # fmt: skip
            return entered
        launch(
            enter_kernel, (len(self.homes.sequences) * self.heads,),
            self.dt, self.lam, given.ssm.contiguous(), given.k.contiguous(), given.last.contiguous(), self.mimo_x,
            entered, self.homes.sequences, self.plan.chunks, *self.dt.stride(), *self.lam.stride(), **sizes,
        )  # fmt: skip
        return entered

    def leave(
        self, angle: Float[Tensor, "seqs h s"] | None = None
    ) -> tuple[Float[Tensor, "seqs r h n"], Float[Tensor, "seqs h p"]]:
        """The rotated keys and the inputs of the last tokens; the angles there are found unless given."""
        given = self.given
        k, x = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (given.k, given.last))
        B, angle = _rows(given.B), self.final_angle if angle is None else angle
        launch(
            leave_kernel, (len(self.homes.sequences) * self.heads,),
            self.x, B, _dense(given.B_bias), angle, k, x, self.homes.chunks, self.homes.sequences,
            *self.x.stride()[:2], *B.stride()[:3], GROUPS=self.groups, **self._edges(),
        )  # fmt: skip
        return k, x

    def scan(self) -> tuple[Float[Tensor, "b l r h p"], Float[Tensor, "seqs h p n"], Float[Tensor, "seqs h s"]]:
        """Outputs, and the state and the angle after each sequence."""
        final = torch.empty_like(self.given.ssm, memory_format=torch.contiguous_format)
        y = self.x.new_empty(self.batch, self.length, self.rank, self.heads, self.headdim)
        if self.hopper is not None:
            return y, *self.hopper.forward(self, y, final)
        entering = self.entering(self.enter())
        grid = (len(self.plan.segments) * self.heads * cdiv(self.headdim, TILE_P),)
        launch(
            scan_kernel, grid,
            self.x, self.mimo_x, self.steps, self.omega, self.phases, self.B, self.C,
            self.B_bias, self.C_bias, self.D, entering, y, final, self.plan.chunks, self.plan.segments,
            *self.x.stride()[:2], self.omega.stride(0), **self.sizes, N=self.d_state, INTERLEAVED=self.interleaved,
            BLOCK_P=self.block, num_warps=self.warps, **settings_for(self.x, 2),
        )  # fmt: skip
        return y, final, self.final_angle

    def entering(self, state: Tensor | None, dy: Tensor | None = None) -> Float[Tensor, "segments h p w"] | None:
        """The state that enters each segment; given dy, the gradient of the state that leaves it. None is zeros."""
        segments, sequences = self.plan.segments, self.plan.sequences
        if len(segments) == len(sequences):
            return state
        if dy is None and self.found:
            return self._arranged(self.as_given(self.kept_states), torch.float32)
        ends = self._empty_states(len(segments))
        kept = ends.new_empty(len(segments), self.heads)
        self._sweep(dy, None, None, ends, kept)
        size = self.headdim * self.width
        launch(
            pass_kernel, (len(sequences) * self.heads, cdiv(size, 1024)),
            ends, kept, state, sequences, HEADS=self.heads, SIZE=size, REVERSE=dy is not None, BLOCK=1024,
        )  # fmt: skip
        return ends

    @property
    def kept_states(self) -> Float[Tensor, "segments h p n"]:
        return self.kept[: len(self.plan.segments) * self.heads].unflatten(0, (-1, self.heads))

    def _empty_states(self, count: int) -> Float[Tensor, "count h p w"]:
        return self.given.ssm.new_empty(count, self.heads, self.headdim, self.width)

    def _boundaries(
        self,
        state: Tensor | None,
        dy: Tensor | None = None,
        entered: Tensor | None = None,
        turned: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The state that enters each chunk (given dy, the gradient of that which leaves it), and the one at the end.
        `sweep_kernel` says what it does with `entered` and `turned`."""
        entering = self.entering(state, dy)
        chunks = self.x.new_empty(len(self.plan.chunks), self.heads, self.rows, self.width)
        last = self._empty_states(len(self.plan.sequences))
        self._sweep(dy, entering, chunks, last, None, entered, turned)
        return chunks, last

    def _sweep(
        self, dy: Tensor | None, entering: Tensor | None, chunks: Tensor | None, ends: Tensor,
        kept: Tensor | None, entered: Tensor | None = None, turned: Tensor | None = None,
    ) -> None:  # fmt: skip
        if self.hopper is not None and (self.single or kept is None):
            kernels = hopper_kernels(self.hopper.__name__ + "_sweep", self.x)
            assert kernels is not None
            kernels.sweep(self, dy, entering, chunks, ends, entered, turned, *([kept] if self.single else []))
            return
        grid = (len(self.plan.segments) * self.heads * cdiv(self.headdim, TILE_P),)
        x, keys, bias = (self.x, self.B, self.B_bias) if dy is None else (dy, self.C, self.C_bias)
        token, head = x.stride(0), x.stride(-2)
        launch(
            sweep_kernel, grid,
            x, None if dy is not None else self.mimo_x, self.steps, self.omega, self.phases,
            keys, bias, entering, chunks, ends, kept, entered, turned, self.plan.chunks, self.plan.segments,
            token, 0 if dy is None else x.stride(1), head, self.omega.stride(0),
            **self.sizes, BLOCK_P=self.block, REVERSE=dy is not None, num_warps=self.warps,
            **settings_for(self.x, 2),
        )  # fmt: skip

    def gradients(
        self, dy: Tensor, dssm: Tensor | None, dk: Tensor | None, dlast: Tensor | None, dangle: Tensor | None,
        into: Float[Tensor, "t h p"] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Those of all arguments, in their order; None for arguments that are not given. Of what follows the last
        tokens, None stands for zeros. That of x is written `into` memory of the caller, if there is such."""
        dy = _rows(dy)
        if self.hopper is not None and (self.rank > 1 or not can_copy(dy.squeeze(1))):
            dy = dy.contiguous()
        entering, ended = self._boundaries(self.enter())
        turned = self.steps.new_empty(len(self.plan.chunks), self.heads, self.rows // self.block, self.sizes["HALF"])
        dended = None if dssm is None else self._arranged(dssm, torch.float32)
        leaving, dentered = self._boundaries(dended, dy, entering, turned)
        dlast_B, dleaving = self._leave_gradients(dk, dangle)
        later, dstart = self._angle_gradients(turned, ended, dended, dleaving)
        inputs, keys = self._chunk_gradients(dy, entering, leaving, later, into)
        del entering, leaving
        enter = self._enter_gradients(dentered)
        if into is not None and inputs.x is not into:
            inputs = inputs._replace(x=into.copy_(inputs.x))
        if dlast is not None:
            inputs.x[self.homes.last] += dlast.to(inputs.x.dtype)
        dB_bias = keys.B_bias
        if dlast_B is not None:
            each = dlast_B.unflatten(2, (self.groups, -1)).sum(3)  # a group's key is that of its heads
            keys.B.view(-1, *each.shape[1:])[self.homes.last] += each.to(keys.B.dtype)
            dB_bias = None if dB_bias is None else dB_bias + dlast_B.sum(0).transpose(0, 1)
        ddt, dA, dlam = self._step_gradients(inputs, keys.dt, enter.owed)
        dmimo_x = None
        if inputs.mimo_x is not None and enter.mimo_x is not None:
            dmimo_x = total(inputs.mimo_x, torch.float32) + enter.mimo_x.sum(0)
        return [
            inputs.x.view(self.given.x.shape), ddt, dA, dlam, keys.omega.view(self.given.omega.shape), keys.B, keys.C,
            enter.ssm, enter.k, enter.x, dstart,
            dB_bias, keys.C_bias,
            dmimo_x, None if inputs.D is None else total(inputs.D, torch.float32),
        ]  # fmt: skip

    def _chunk_gradients(
        self, dy: Tensor, entering: Tensor, leaving: Tensor, later: Tensor, into: Tensor | None
    ) -> tuple[InputGradients, KeyGradients]:
        """What chunks say, given what later ones say of angles."""
        if self.hopper is None:
            given = (dy, entering, leaving)
            return self._input_gradients(*given), self._key_gradients(*given, later)
        backward = hopper_kernels(self.hopper.__name__ + "_backward", self.x)
        assert backward is not None
        splits, own = self._splits(), [into] if self.single else []
        inputs, keys = backward.gradients(self, dy, entering, leaving, later, splits, *own)
        biases = self._bias_gradients(keys.B_bias, keys.C_bias, parts=self.groups * splits)
        return inputs, KeyGradients(joined(keys.B), joined(keys.C), *biases, joined(keys.omega), keys.dt)

    def _bias_gradients(
        self, dB_bias: Tensor | None, dC_bias: Tensor | None, *, parts: int | None = None
    ) -> tuple[Float[Tensor, "h r n"] | None, Float[Tensor, "h r n"] | None]:
        """Of those that are given, from what chunks say: of each head, or of the heads of one of `parts` up to it."""
        rows = self.heads * self.rank
        empty = lambda t: None if t is None else t.new_empty(t.shape, dtype=torch.float32)
        out = empty(self.given.B_bias), empty(self.given.C_bias)
        if dB_bias is not None or dC_bias is not None:
            launch(
                bias_gradients_kernel, (2 * rows, cdiv(self.width, COLUMNS)),
                dB_bias, dC_bias, *out, len(self.plan.chunks), rows, BEFORE=0 if parts is None else self.rank,
                PART=rows // (parts or 1), **self.order, WIDTH=self.width, BLOCK=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
        return out

    def _input_gradients(self, dy: Tensor, entering: Tensor, leaving: Tensor) -> InputGradients:
        count, steps = len(self.plan.chunks), self.steps
        dx = self.x.new_empty(self.batch * self.length, self.heads, self.headdim)
        decays, scales, owns = steps.new_empty(3, count, self.heads, self.tokens).unbind(0)
        dmimo_x = None if self.mimo_x is None else steps.new_empty(count, self.heads, self.rank, self.headdim)
        dD = None if self.D is None else steps.new_empty(count, self.heads)
        launch(
            inputs_kernel, (count * self.heads,),
            self.x, self.mimo_x, dy, steps, self.omega, self.phases, self.B, self.C, self.B_bias, self.C_bias,
            self.D, entering, leaving, dx, decays, scales, owns, dmimo_x, dD, self.plan.chunks,
            *self.x.stride()[:2], *dy.stride()[:3], self.omega.stride(0), **self.sizes, BLOCK_P=self.block_p,
            num_warps=4 if self.block_p <= 64 else 8, **settings_for(self.x, 1),
        )  # fmt: skip
        return InputGradients(dx, decays, scales, owns, dmimo_x, dD)

    def _splits(self) -> int:
        """Programs among which the heads of a group are divided in the gradients: as few as fill the GPU."""
        return splits_of(self.heads // self.groups, len(self.plan.chunks) * self.groups, 2 * processors(self.x.device))

    def _key_gradients(self, dy: Tensor, entering: Tensor, leaving: Tensor, later: Tensor) -> KeyGradients:
        splits, count, steps = self._splits(), len(self.plan.chunks), self.steps
        tokens, shape, half = self.batch * self.length, (*self.given.B.shape[:-1], self.width), self.sizes["HALF"]
        dB, dC = (t.new_empty(splits, *shape, dtype=torch.float32 if splits > 1 else t.dtype) for t in (self.B, self.C))
        dB_bias, dC_bias = (None if t is None else steps.new_empty(count, *t.shape) for t in (self.B_bias, self.C_bias))
        dangles = steps.new_empty(count, self.heads, CHUNK, half)
        # On Hopper four warps multiply 64 rows; of eight, each half would do all of it.
        warps = 4 if self.block_p <= 64 or capability(self.x.device)[0] == 9 else 8
        for turn in (True, False) if self.sizes["STILL"] else (True,):
            launch(
                keys_kernel, (count * self.groups * splits,),
                self.x, self.mimo_x, dy, steps, self.omega, self.phases, self.B, self.C, self.B_bias, self.C_bias,
                entering, leaving, dB, dC, dB_bias, dC_bias, dangles, self.plan.chunks,
                *self.x.stride()[:2], *dy.stride()[:3], self.omega.stride(0), tokens, **self.sizes,
                BLOCK_P=self.block_p, SPLITS=splits, TURN=turn, num_warps=warps, **settings_for(self.x, 2),
            )  # fmt: skip
        turns = self.turn_gradients(dangles, later, self.ranks)
        dB, dC = (self._returned(joined(t)) for t in (dB, dC))
        return KeyGradients(dB, dC, *self._bias_gradients(dB_bias, dC_bias), *turns)

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
        launch(
            turn_gradients_kernel, (count * splits,),
            dangles, steps, self.omega, later, dt, omega, self.plan.chunks, self.omega.stride(0),
            self.batch * self.length, HEADS=self.heads, RANKS=ranks, TOKENS=self.tokens, PAIRS=self.pairs,
            HALF=self.sizes["HALF"], BLOCK=max(self.tokens, 32), SPLITS=splits, PRECISION=self.sizes["PRECISION"],
            DTYPE=tl.float32 if exact else tl.bfloat16, **settings_for(self.x, 3),
        )  # fmt: skip
        return joined(omega), dt

    def _enter_gradients(self, dentered: Tensor) -> EnterGradients:
        """Those of the start of a sequence, given that of the state that enters it."""
        given, sequences = self.given, len(self.homes.sequences)
        owed = dentered.new_empty(sequences, self.heads)
        dssm, dk, dx = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (given.ssm, given.k, given.last)
        )
        if self.paired:
            launch(
                enter_halves_gradients_kernel, (sequences * self.heads,),
                self.dt, self.lam, dentered, given.k.contiguous(), given.last.contiguous(), dssm, owed, dk, dx,
                self.homes.sequences, self.plan.chunks, *self.dt.stride(), *self.lam.stride(),
                HEADS=self.heads, P=self.headdim, HALF=self.pairs,
            )  # fmt: skip
            return EnterGradients(dssm, owed, dk, dx, None)
        dmimo_x = None if self.mimo_x is None else owed.new_empty(sequences, *self.mimo_x.shape)
        launch(
            enter_gradients_kernel, (sequences * self.heads,),
            self.dt, self.lam, dentered, given.k.contiguous(), given.last.contiguous(), self.mimo_x,
            dssm, owed, dk, dx, dmimo_x, self.homes.sequences, self.plan.chunks, *self.dt.stride(), *self.lam.stride(),
            **self._edges(),
        )  # fmt: skip
        return EnterGradients(dssm, owed, dk, dx, dmimo_x)

    def _leave_gradients(self, dk: Tensor | None, dangle: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the keys of the last tokens say of B, for each head, and of the angles at the end, with `dangle`."""
        if dk is None:
            return None, None if dangle is None else dangle.contiguous()
        k, _ = self.leave()
        dangle = torch.zeros_like(self.given.angle) if dangle is None else dangle
        dB, leaving = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dk, dangle))
        launch(
            leave_gradients_kernel, (len(self.homes.sequences) * self.heads,),
            k, self.final_angle, dk.contiguous(), dangle.contiguous(), dB, leaving,
            **only(self._edges(), leave_gradients_kernel),
        )  # fmt: skip
        return dB, leaving

    def _angle_gradients(
        self, turned: Tensor, ended: Tensor, dended: Tensor | None, dleaving: Tensor | None
    ) -> tuple[Float[Tensor, "chunks h *two s"], Float[Tensor, "seqs h s"]]:
        """What all that comes after each chunk says of angles, and the gradient of the angle that enters.

        For the kernels written for one rank, the bits of the phases before the chunk are in front of the first.
        """
        later = turned.new_empty(*turned.shape[:2], *([2] if self.single else []), self.pairs)
        dangle = torch.empty_like(self.given.angle, memory_format=torch.contiguous_format)
        launch(
            angle_gradients_kernel, (len(self.homes.sequences) * self.heads,),
            turned, None if dended is None else ended, dended, dleaving, dangle, self.phases if self.single else None,
            later, self.homes.sequences,
            HEADS=self.heads, P=self.headdim, PAIRS=self.pairs, HALF=self.sizes["HALF"], WIDTH=self.width,
            TILES=turned.shape[2], BLOCK_P=power_of_2(self.headdim), BLOCK=64,
        )  # fmt: skip
        return later, dangle

    def _step_gradients(self, inputs: InputGradients, dsteps: Tensor, owed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of dt, A and lam, given what the angles say of dt."""
        count, given = len(self.plan.chunks), self.given
        ddt, dA, dlam = (self.steps.new_empty(given.dt.shape) for _ in range(3))
        launch(
            steps_gradients_kernel, (count, cdiv(self.heads, HEADS_AT_ONCE)),
            self.dt, self.A, self.lam, inputs.decays, inputs.scales, inputs.owns, dsteps, owed,
            ddt, dA, dlam, self.plan.chunks, self.homes.chunks,
            *self.dt.stride(), *self.A.stride(), *self.lam.stride(),
            HEADS=self.heads, TOKENS=self.tokens, BLOCK_H=HEADS_AT_ONCE,
        )  # fmt: skip
        return ddt, dA, dlam
