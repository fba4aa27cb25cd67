"""The trapezoid on a GPU: SSD with a look-ahead, whose keys and queries are rebuilt in each kernel.

The formulas are those of `everstate.ops.trapezoid.lookahead`, chunks and segments those of
`everstate.ops.triton_segments`. Nothing that every head has its own of is written to memory, but y and, backwards, one
state and one gradient of it per chunk; keys, queries and angles are made of B, C and a phase per chunk, head and pair
where they are used (`triton_keys`).

Forward: `triton_prepare` makes numbers per token and phases per chunk, then `triton_forward` walks along time.
Backward: two sweeps along time write the state that enters each chunk and the gradient of that which leaves it, then
every chunk is independent (`triton_backward`). All is summed in a fixed order: the same call gives the same bits.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from everstate.core.kernels import processors
from everstate.core.packing import Packing
from everstate.ops.rotary.halves import deinterleave, interleave
from everstate.ops.trapezoid import TrapezoidState
from everstate.ops.trapezoid.triton_backward import inputs_kernel, keys_kernel
from everstate.ops.trapezoid.triton_forward import scan_kernel, sweep_kernel
from everstate.ops.trapezoid.triton_keys import NUMBERS
from everstate.ops.trapezoid.triton_prepare import (
    angle_gradients_kernel,
    enter_gradients_kernel,
    enter_kernel,
    leave_gradients_kernel,
    leave_kernel,
    omega_gradients_kernel,
    phases_kernel,
    steps_gradients_kernel,
    steps_kernel,
    turns_kernel,
)
from everstate.ops.triton_segments import CHUNK, pass_kernel, pieces_for, plan

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
    if not interleaved:
        # Sums over n do not mind its order; B and C are small before they meet the heads.
        B, C, ssm, k = (interleave(t) for t in (B, C, ssm, k))
        B_bias, C_bias = (None if bias is None else interleave(bias) for bias in (B_bias, C_bias))
    ends = [] if packing is None else list(packing.cu_seqlens)
    y, ssm, k, last, angle = _scan(x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D, ends)
    if not interleaved:
        ssm, k = deinterleave(ssm), deinterleave(k)
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


@torch.library.custom_op("everstate::trapezoid_scan", mutates_args=())
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = _Arguments(x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    call = _Call(given, ends)
    (y, final), (final_k, final_x) = call.scan(), call.leave()
    return y, final, final_k, final_x, call.final_angle


@_scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(*x.shape[:2], B.shape[2], *x.shape[2:])
    empty = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format)
    return y, empty(ssm), empty(k), empty(last), empty(angle)


@torch.library.custom_op("everstate::trapezoid_scan_backward", mutates_args=())
def _backward(
    dy: Tensor, dssm: Tensor, dk: Tensor, dlast: Tensor, dangle: Tensor,
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of all arguments that are given, in their order."""
    given = _Arguments(x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    grads = _Call(given, ends).gradients(dy, dssm, dk, dlast, dangle)
    return [grad.to(t.dtype) for grad, t in zip(grads, given, strict=True) if t is not None and grad is not None]


@_backward.register_fake
def _(
    dy: Tensor, dssm: Tensor, dk: Tensor, dlast: Tensor, dangle: Tensor,
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, omega: Tensor, B: Tensor, C: Tensor,
    ssm: Tensor, k: Tensor, last: Tensor, angle: Tensor,
    B_bias: Tensor | None, C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, ends: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    given = (x, dt, A, lam, omega, B, C, ssm, k, last, angle, B_bias, C_bias, mimo_x, D)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.ends = inputs[-1]


def _differentiate(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = iter(_backward(*upstream, *saved, ctx.ends))
    return (*(None if t is None else next(grads) for t in saved), None)


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
    """Of B and C; of the biases, by chunk; of omega, in parts; of dt and the turns of a chunk, by chunk and head."""

    B: Tensor
    C: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    omega: Tensor
    dt: Tensor
    turns: Tensor


class _EnterGradients(NamedTuple):
    """By sequence: of what the token before owes, its key, its input, and the factors."""

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


class _Call:
    """The arguments as the kernels want them, and the launches that forward and backward share."""

    def __init__(self, given: _Arguments, ends: Sequence[int]) -> None:
        x, B, self.given = given.x, given.B, given
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.rank, self.groups, self.d_state = B.shape[2:]
        self.pairs, self.ranks = given.omega.shape[-1], triton.next_power_of_2(B.shape[2])
        self.tokens = CHUNK // self.ranks
        self.x, self.B, self.C, self.omega = _rows(x), _rows(B), _rows(given.C), _rows(given.omega)
        self.dt, self.A, self.lam = given.dt.flatten(0, 1), given.A.flatten(0, 1), given.lam.flatten(0, 1)
        self.B_bias, self.C_bias, self.mimo_x, self.D = map(_dense, given[11:])
        bounds = tuple(ends) or tuple(range(0, (self.batch + 1) * self.length, self.length))
        # Triton 3.6 reads beyond its shared memory where a product of float32 has a side of 16.
        smallest = 32 if x.dtype == torch.float32 else 16
        filled = lambda size: max(triton.next_power_of_2(size), smallest)
        self.block_p, still = filled(self.headdim), self.d_state - 2 * self.pairs
        programs = (len(bounds) - 1) * self.heads * triton.cdiv(self.headdim, TILE_P)
        self.plan = plan(bounds, self.tokens, pieces_for(programs, x.device), x.device)
        self.homes = _homes(bounds, self.tokens, x.device)
        self.sizes = {
            "HEADS": self.heads, "GROUPS": self.groups, "P": self.headdim, "N": self.d_state, "RANK": self.rank,
            "RANKS": self.ranks, "TOKENS": self.tokens, "PAIRS": self.pairs, "BLOCK_T": filled(2 * self.pairs),
            "BLOCK_S": filled(still) if still else 0, "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        self.steps, self.phases, self.final_angle = self._prepare()

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

    def _keys(self, t: Tensor) -> tuple[int, int, int]:
        """Strides of B or C: of tokens, ranks and groups."""
        token, rank, group, _ = t.stride()
        return token, rank, group

    @property
    def block(self) -> int:
        """Rows of the state in one program of a sweep."""
        return min(self.block_p, TILE_P)

    @property
    def warps(self) -> int:
        """A state of 64 x 128 in float32 takes half of the registers of four warps."""
        return 4 if self.block * (self.sizes["BLOCK_T"] + self.sizes["BLOCK_S"]) <= 64 * 128 else 8

    @property
    def stages(self) -> int:
        """Chunks of which a program holds what it has loaded: the next one too, unless float32 fills the memory."""
        return 2 if self.x.dtype.itemsize == 2 else 1

    def _edges(self) -> dict[str, int]:
        """Sizes for the kernels of the ends of sequences."""
        return {
            "HEADS": self.heads, "P": self.headdim, "N": self.d_state, "RANK": self.rank,
            "BLOCK_P": triton.next_power_of_2(self.headdim), "BLOCK_N": triton.next_power_of_2(self.d_state),
        }  # fmt: skip

    def enter(self) -> Float[Tensor, "seqs h p n"]:
        """The states that enter the sequences, with what the tokens before them owe."""
        given, entered = self.given, torch.empty_like(self.given.ssm, memory_format=torch.contiguous_format)
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
            self.homes.chunks, *self.x.stride()[:2], *self._keys(self.B), HEADS=self.heads, GROUPS=self.groups,
            P=self.headdim, N=self.d_state, RANK=self.rank, PAIRS=self.pairs,
            BLOCK_P=triton.next_power_of_2(self.headdim), BLOCK_HALF=triton.next_power_of_2(self.d_state // 2),
        )  # fmt: skip
        return k, x

    def scan(self) -> tuple[Float[Tensor, "b l r h p"], Float[Tensor, "seqs h p n"]]:
        """Outputs, and the state after each sequence."""
        entered = self.enter()
        entering, final = self._entering(entered, None), torch.empty_like(entered)
        y = self.x.new_empty(self.batch, self.length, self.rank, self.heads, self.headdim)
        grid = (len(self.plan.segments) * self.heads * triton.cdiv(self.headdim, TILE_P),)
        scan_kernel[grid](
            self.x, self.mimo_x, self.steps, self.omega, self.phases, self.B, self.C, self.B_bias, self.C_bias, self.D,
            entering, y, final, self.plan.chunks, self.plan.segments,
            *self.x.stride()[:2], self.omega.stride(0), *self._keys(self.B), *self._keys(self.C), **self.sizes,
            BLOCK_P=self.block, num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip
        return y, final

    def _entering(self, state: Tensor, dy: Tensor | None) -> Float[Tensor, "segments h p n"]:
        """The state that enters each segment; given dy, the gradient of the state that leaves it."""
        segments, sequences = self.plan.segments, self.plan.sequences
        if len(segments) == len(sequences):
            return state
        ends = state.new_empty(len(segments), *state.shape[1:])
        kept = state.new_empty(len(segments), self.heads)
        self._sweep(dy, None, None, ends, kept)
        size = self.headdim * self.d_state
        pass_kernel[(len(sequences) * self.heads, triton.cdiv(size, 1024))](
            ends, kept, state, sequences, HEADS=self.heads, SIZE=size, REVERSE=dy is not None, BLOCK=1024
        )
        return ends

    def _boundaries(self, state: Tensor, dy: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state that enters each chunk (given dy, the gradient of that which leaves it), and the one at the end."""
        entering = self._entering(state, dy)
        chunks = self.x.new_empty(len(self.plan.chunks), *state.shape[1:])
        last = torch.empty_like(state)
        self._sweep(dy, entering, chunks, last, None)
        return chunks, last

    def _sweep(
        self, dy: Tensor | None, entering: Tensor | None, chunks: Tensor | None, ends: Tensor, kept: Tensor | None
    ) -> None:
        grid = (len(self.plan.segments) * self.heads * triton.cdiv(self.headdim, TILE_P),)
        x, keys, bias = (self.x, self.B, self.B_bias) if dy is None else (dy, self.C, self.C_bias)
        token, head = x.stride(0), x.stride(-2)
        sweep_kernel[grid](
            x, None if dy is not None else self.mimo_x, self.steps, self.omega, self.phases, keys, bias,
            entering, chunks, ends, kept, self.plan.chunks, self.plan.segments,
            token, 0 if dy is None else x.stride(1), head, self.omega.stride(0), *self._keys(keys), **self.sizes,
            BLOCK_P=self.block, REVERSE=dy is not None, num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip

    def gradients(self, dy: Tensor, dssm: Tensor, dk: Tensor, dlast: Tensor, dangle: Tensor) -> list[Tensor | None]:
        """Those of all arguments, in their order; None for arguments that are not given."""
        dy = _rows(dy)
        entering, _ = self._boundaries(self.enter(), None)
        leaving, dentered = self._boundaries(dssm.contiguous(), dy)
        inputs = self._input_gradients(dy, entering, leaving)
        keys = self._key_gradients(dy, entering, leaving)
        del entering, leaving
        enter = self._enter_gradients(dentered)
        inputs.x[self.homes.last] += dlast.to(inputs.x.dtype)
        dlast_B, dangle = self._leave_gradients(dk.contiguous(), dangle.contiguous())
        each = dlast_B.unflatten(2, (self.groups, -1)).sum(3)  # a group's key is that of its heads
        keys.B.view(-1, *each.shape[1:])[self.homes.last] += each.to(keys.B.dtype)
        dB_bias = None if keys.B_bias is None else keys.B_bias.sum(0) + dlast_B.sum(0).transpose(0, 1)
        ddt, dA, dlam, domega, dstart = self._step_gradients(inputs, keys, enter.owed, dangle)
        dmimo_x = None
        if inputs.mimo_x is not None and enter.mimo_x is not None:
            dmimo_x = inputs.mimo_x.sum(0) + enter.mimo_x.sum(0)
        return [
            inputs.x.view(self.given.x.shape), ddt, dA, dlam, domega, keys.B, keys.C,
            dentered, enter.k, enter.x, dstart,
            dB_bias, None if keys.C_bias is None else keys.C_bias.sum(0),
            dmimo_x, None if inputs.D is None else inputs.D.sum(0),
        ]  # fmt: skip

    def _input_gradients(self, dy: Tensor, entering: Tensor, leaving: Tensor) -> _InputGradients:
        count, steps = len(self.plan.chunks), self.steps
        dx = self.x.new_empty(self.batch * self.length, self.heads, self.headdim)
        decays, scales, owns = steps.new_empty(3, count, self.heads, self.tokens).unbind(0)
        dmimo_x = None if self.mimo_x is None else steps.new_empty(count, self.heads, self.rank, self.headdim)
        dD = None if self.D is None else steps.new_empty(count, self.heads)
        inputs_kernel[(count * self.heads,)](
            self.x, self.mimo_x, dy, steps, self.omega, self.phases, self.B, self.C, self.B_bias, self.C_bias, self.D,
            entering, leaving, dx, decays, scales, owns, dmimo_x, dD, self.plan.chunks,
            *self.x.stride()[:2], *dy.stride()[:3], self.omega.stride(0), *self._keys(self.B), *self._keys(self.C),
            **self.sizes, BLOCK_P=self.block_p, num_warps=4 if self.block_p <= 64 else 8, num_stages=1,
        )  # fmt: skip
        return _InputGradients(dx, decays, scales, owns, dmimo_x, dD)

    def _splits(self) -> int:
        """Programs among which the heads of a group are divided in the gradients: as few as fill the GPU."""
        each, splits = self.heads // self.groups, 1
        chunks = len(self.plan.chunks) * self.groups
        while chunks * splits < 2 * processors(self.x.device) and each % (2 * splits) == 0:
            splits *= 2
        return splits

    def _key_gradients(self, dy: Tensor, entering: Tensor, leaving: Tensor) -> _KeyGradients:
        splits, count, steps = self._splits(), len(self.plan.chunks), self.steps
        total, shape = self.batch * self.length, self.given.B.shape
        dB, dC = (t.new_empty(splits, *shape, dtype=torch.float32 if splits > 1 else t.dtype) for t in (self.B, self.C))
        dB_bias, dC_bias = (None if t is None else steps.new_empty(count, *t.shape) for t in (self.B_bias, self.C_bias))
        omega = steps.new_empty(self.groups * splits, total, self.pairs)
        dt = steps.new_empty(count, self.heads, self.tokens)
        turns = steps.new_empty(count, self.heads, self.pairs)
        for turn in (True, False) if self.sizes["BLOCK_S"] else (True,):
            keys_kernel[(count * self.groups * splits,)](
                self.x, self.mimo_x, dy, steps, self.omega, self.phases, self.B, self.C, self.B_bias, self.C_bias,
                entering, leaving, dB, dC, dB_bias, dC_bias, omega, dt, turns, self.plan.chunks,
                *self.x.stride()[:2], *dy.stride()[:3], self.omega.stride(0), *self._keys(self.B), *self._keys(self.C),
                total, **self.sizes, BLOCK_P=self.block_p, SPLITS=splits, TURN=turn,
                num_warps=4 if self.block_p <= 64 else 8, num_stages=self.stages,
            )  # fmt: skip
        dB, dC = (t.sum(0) if splits > 1 else t[0] for t in (dB, dC))
        return _KeyGradients(dB, dC, dB_bias, dC_bias, omega, dt, turns)

    def _enter_gradients(self, dentered: Tensor) -> _EnterGradients:
        """Those of the start of a sequence, given that of the state that enters it."""
        given, sequences = self.given, len(self.homes.sequences)
        owed = dentered.new_empty(sequences, self.heads)
        dk, dx = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (given.k, given.last))
        dmimo_x = None if self.mimo_x is None else owed.new_empty(sequences, *self.mimo_x.shape)
        enter_gradients_kernel[(sequences * self.heads,)](
            self.dt, self.lam, dentered, given.k.contiguous(), given.last.contiguous(), self.mimo_x,
            owed, dk, dx, dmimo_x, self.homes.sequences, self.plan.chunks, *self.dt.stride(), *self.lam.stride(),
            **self._edges(),
        )  # fmt: skip
        return _EnterGradients(owed, dk, dx, dmimo_x)

    def _leave_gradients(self, dk: Tensor, dangle: Tensor) -> tuple[Tensor, Tensor]:
        """What the keys of the last tokens say of B, for each head, and of the angles at the end, with `dangle`."""
        k, _ = self.leave()
        dB, leaving = torch.empty_like(dk), torch.empty_like(dangle)
        leave_gradients_kernel[(len(self.homes.sequences) * self.heads,)](
            k, self.final_angle, dk, dangle, dB, leaving, HEADS=self.heads, N=self.d_state, RANK=self.rank,
            PAIRS=self.pairs, BLOCK_HALF=triton.next_power_of_2(self.d_state // 2),
        )  # fmt: skip
        return dB, leaving

    def _step_gradients(
        self, inputs: _InputGradients, keys: _KeyGradients, owed: Tensor, dangle: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of dt, A, lam, omega, and of the angle that enters."""
        count, given, pairs = len(self.plan.chunks), self.given, triton.next_power_of_2(self.pairs)
        dstart = torch.empty_like(dangle)
        angle_gradients_kernel[(len(self.homes.sequences) * self.heads,)](
            keys.turns, dangle, dstart, self.homes.sequences,
            HEADS=self.heads, PAIRS=self.pairs, BLOCK_PAIRS=pairs, BLOCK=64,
        )  # fmt: skip
        ddt, dA, dlam = (self.steps.new_empty(given.dt.shape) for _ in range(3))
        steps_gradients_kernel[(count, triton.cdiv(self.heads, BLOCK_H))](
            self.dt, self.A, self.lam, self.omega, inputs.decays, inputs.scales, inputs.owns, keys.dt, keys.turns, owed,
            ddt, dA, dlam, self.plan.chunks, self.homes.chunks,
            *self.dt.stride(), *self.A.stride(), *self.lam.stride(), self.omega.stride(0),
            HEADS=self.heads, TOKENS=self.tokens, PAIRS=self.pairs, BLOCK_H=BLOCK_H,
        )  # fmt: skip
        domega = self.steps.new_empty(given.omega.shape)
        omega_gradients_kernel[(count,)](
            self.steps, keys.omega, keys.turns, domega, self.plan.chunks, self.batch * self.length,
            HEADS=self.heads, TOKENS=self.tokens, PAIRS=self.pairs, BLOCK_PAIRS=pairs, PARTS=len(keys.omega),
        )  # fmt: skip
        return ddt, dA, dlam, domega, dstart
