"""`everstate bench ops --device cuda`: the kernels of a GPU at the sizes of a 1.3B layer, beside those of `mamba_ssm`.

64k tokens as many short sequences, some, and one long one; and one token of many sequences. bfloat16 activations,
float32 states. Times are those of the GPU alone, as in a captured graph: what Python adds before is not in them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from everstate.bench.report import Row, machine, publishing
from everstate.bench.shapes import GPU_SHAPES, STEPS
from everstate.bench.timing import Gate, Timing, interleave
from everstate.core.errors import ConfigError
from everstate.core.op import REFERENCE
from everstate.core.state import clone, map_state, nbytes, tensors
from everstate.ops import OPS, rms_norm, use
from everstate.ops.example import Draw, Example
from everstate.ops.mamba3.ends import enter

D_INNER, TOKENS = 4096, 65_536
QUICK_D_INNER, QUICK_TOKENS = 128, 512
SPLITS = (32, 8, 1)
"""Into how many sequences the tokens are cut."""
STEP_BATCHES = (1, 16, 64, 256, 1024)
LOW = ("x", "B", "C", "z", "projected")
"""Arguments that a model trained in bfloat16 computes in it."""
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error of an output or a gradient against float64, of norms. Gradients of decays and angles, which are
what is left of large sums, have the largest."""
GATE_TOKENS, REPEATS = 300, 20

Call = Callable[[], object]


def run(*, quick: bool, output: Path | None, now: datetime, device: str, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, print a table and a line of JSON, write that to `output`, and return it.

    `only` names the ops to measure, by default all that have kernels. Raises `ConfigError` for other names.
    """
    known = [*(op for op in GPU_SHAPES if "triton" in OPS[op].backends()), *STEPS]
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(f"bench ops: {', '.join(unknown)} is not measured on a GPU; give some of {', '.join(known)}")
    d_inner, total = (QUICK_D_INNER, QUICK_TOKENS) if quick else (D_INNER, TOKENS)
    first_call_s: dict[str, float] = {}
    rows: list[Row] = []
    facts = {"quick": quick, "machine": machine(torch.device(device)), "d_inner": d_inner, "first_call_s": first_call_s}
    with (
        publishing("kernels", rows, facts, now, output) as result,
        Console(stderr=True).status("starting") as status,
    ):
        for name in only or known:
            status.update(name)
            if name in STEPS:
                rows += steps(name, d_inner, STEP_BATCHES[:2] if quick else STEP_BATCHES, device)
            else:
                rows += scans(name, d_inner, total, device, first_call_s)
    return result


def scans(op: str, d_inner: int, total: int, device: str, first_call_s: dict[str, float]) -> Iterator[Row]:
    """Forward, and forward with backward, of one op on the same tokens cut into more or fewer sequences."""
    draw = Draw(dtype=torch.float32, device=device, drawn_on=device)
    small = lower(GPU_SHAPES[op](draw, min(d_inner, 512), GATE_TOKENS))
    started = time.perf_counter()
    error = gate_error(op, small)
    first_call_s[op] = time.perf_counter() - started
    gate = Gate(error, ALLOWED[torch.bfloat16])
    long = lower(GPU_SHAPES[op](draw, d_inner, total))
    for batch in SPLITS:
        example = cut(long, batch)
        forward, both = calls(partial(run_op, op), example)
        candidates = {"forward": forward, "both": both}
        if (peer := peer_of(op, example)) is not None:
            candidates["peer forward"], candidates["peer both"] = calls(peer, example)
        timings = interleave(candidates, gate, REPEATS, device, on_device=True)
        for kind in ("forward", "both"):
            name = f"{op} {batch} x {total // batch}" + (" + backward" if kind == "both" else "")
            ours, theirs = timings.get(kind), timings.get(f"peer {kind}")
            yield Row(name, total, gate, ours, **compared(theirs, ours))
            if theirs is not None:
                yield Row("  mamba_ssm", total, gate, theirs)


def steps(name: str, d_inner: int, batches: tuple[int, ...], device: str) -> Iterator[Row]:
    """One token for each of many sequences: how fast the states move through memory."""
    op, shape = STEPS[name]
    for batch in batches:
        long = cut(lower(shape(Draw(dtype=torch.float32, device=device, drawn_on=device), d_inner, batch)), batch)
        token = {key: value[:, 0] for key, value in long.timed.items()} | long.fixed
        for dtype in (torch.float32, torch.bfloat16):
            pool = in_precision(long.state, dtype)
            gate = Gate(step_error(op, token, pool), ALLOWED[torch.bfloat16])
            # Several pools in turn, so that none is left in the cache.
            pools = [pool, *(clone(pool) for _ in range(256_000_000 // nbytes(pool)))][:32]
            candidates: dict[str, Call] = {"step": partial(step_each, partial(OPS[op], **token), pools)}
            if dtype == torch.float32 and (peer := peer_of_step(name, token, pool)) is not None:
                candidates["peer"] = partial(step_each, peer, pools)
            timings = {
                key: Timing(tuple(seconds / len(pools) for seconds in timing.seconds))
                for key, timing in interleave(candidates, gate, REPEATS, device, on_device=True).items()
            }
            title = f"{name} of {batch}, {str(dtype).removeprefix('torch.')} state"
            ours, theirs = timings.get("step"), timings.get("peer")
            speed = None if ours is None else 2 * nbytes(pool) / ours.median / 1e12
            yield Row(title, batch, gate, ours, ratio=speed, ratio_of="TB/s of states")
            if theirs is not None:
                yield Row("  mamba_ssm", batch, gate, theirs)


def step_each(step: Callable[..., object], pools: list[Any]) -> None:
    """One step of each pool."""
    with torch.no_grad():
        for pool in pools:
            step(state=pool)


def step_error(op: str, token: dict[str, Any], pool: Any) -> float:
    """Of the output of a step and of the state after it, against the torch form in float64."""
    mine, exact = clone(pool), map_state(Tensor.double, pool)
    with torch.no_grad():
        got = OPS[op](**token, state=mine)
        with use("torch"):
            expected = OPS[op](**{name: widen(value) for name, value in token.items()}, state=exact)
    pairs = zip([got, *tensors(mine)], [expected, *tensors(exact)], strict=True)
    return max(norm_error(one, other) for one, other in pairs)


def in_precision(state: Any, dtype: torch.dtype) -> Any:
    """A pool of states in another precision, all but angles."""
    if isinstance(state, Tensor):
        return state.to(dtype)
    named = state._asdict().items()
    return type(state)(*(part if name == "angle" else part.to(dtype) for name, part in named))


def widen(value: Any) -> Any:
    """An argument, or each part of a layer's parameters, in float64."""
    if isinstance(value, tuple):  # a NamedTuple
        return type(value)(*(widen(part) for part in value))
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def lower(example: Example) -> Example:
    """The example with the activations of a model in bfloat16."""
    low = lambda name, value: value.to(torch.bfloat16) if name in LOW else value
    return example._replace(timed={name: low(name, value) for name, value in example.timed.items()})


def cut(example: Example, batch: int) -> Example:
    """One row of tokens as `batch` rows, all from the same state."""
    timed = {name: value[0].unflatten(0, (batch, -1)) for name, value in example.timed.items()}
    repeat = lambda t: t.repeat_interleave(batch, 0)
    return example._replace(timed=timed, state=None if example.state is None else map_state(repeat, example.state))


def run_op(op: str, example: Example) -> list[Tensor]:
    """What the op returns, tensor by tensor."""
    state = {} if example.state is None else {"state": example.state}
    return tensors(OPS[op](**example.timed, **state, **example.fixed))


def calls(function: Callable[[Example], list[Tensor]], example: Example) -> tuple[Call, Call]:
    """Forward without gradients, and forward with backward."""
    leaves = differentiable(example)
    with torch.no_grad():
        upstream = [torch.randn_like(output) for output in function(example)]

    def forward() -> None:
        with torch.no_grad():
            function(example)

    def both() -> None:
        torch.autograd.grad(function(example), leaves, upstream, allow_unused=True)

    return forward, both


def differentiable(example: Example) -> list[Tensor]:
    """All tensors of an example that are not indices, made to want gradients."""
    state = [] if example.state is None else tensors(example.state)
    given = [*example.timed.values(), *state, *(v for v in example.fixed.values() if isinstance(v, Tensor))]
    return [tensor.requires_grad_() for tensor in given if tensor.is_floating_point()]


def gate_error(op: str, example: Example) -> float:
    """The largest error of an output or gradient against the torch form in float64, of norms."""

    def outcome(one: Example) -> list[Tensor]:
        leaves, outputs = differentiable(one), run_op(op, one)
        generator = torch.Generator(device=outputs[0].device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=outputs[0].device, dtype=torch.float64)
        upstream = [draw(output.shape).to(output.dtype) for output in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)]

    exact = Example(
        timed={name: widen(value) for name, value in example.timed.items()},
        fixed={name: widen(value) for name, value in example.fixed.items()},
        state=None if example.state is None else map_state(widen, example.state),
    )
    with use("torch", REFERENCE):
        expected = outcome(exact)
    return max(norm_error(got, want) for got, want in zip(outcome(example), expected, strict=True))


def norm_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def peer_of(op: str, example: Example) -> Callable[[Example], list[Tensor]] | None:
    """The same op of `mamba_ssm`, where it is installed and has one."""
    peers = {"ssd_scan": mamba2_peer, "trapezoid_scan": mamba3_peer}
    try:
        return peers[op](example) if op in peers else None
    except ImportError:
        return None


def mamba2_peer(example: Example) -> Callable[[Example], list[Tensor]]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    # The peer takes dt and A, and multiplies them itself.
    A = (example.timed["a"][0, 0] / example.timed["s"][0, 0]).detach().requires_grad_()

    def scan(one: Example) -> list[Tensor]:
        x, dt, B, C = (one.timed[name] for name in ("x", "s", "B", "C"))
        settings = {"D": one.fixed["D"], "initial_states": one.state, "return_final_states": True}
        return list(mamba_chunk_scan_combined(x, dt, A, B, C, 256, **settings))

    return scan


def peer_of_step(name: str, token: dict[str, Any], pool: Any) -> Callable[..., object] | None:
    """The same step of `mamba_ssm`, where it is installed and has one. It makes a new state and leaves the old one.

    Its norms of B and C and its dt are made outside of its kernel, and are not timed.
    """
    if name != "mamba3_step_":
        return None
    try:
        from mamba_ssm.ops.triton.mamba3.mamba3_siso_step import mamba3_siso_step
    except ImportError:
        return None
    layer, projected, heads = token["layer"], token["projected"], pool.x.shape[1]
    z, inputs = enter(projected, None, layer, pool, rms_norm)
    z, lam, omega = z.unflatten(-1, (heads, -1)), torch.logit(inputs.lam), torch.atanh(inputs.omega / math.pi)
    turns = omega.unsqueeze(1).repeat(1, heads, 1)
    given = (
        inputs.C[:, 0], inputs.B[:, 0], inputs.x, inputs.A * inputs.dt, inputs.dt, lam,
        layer.C_bias[:, 0], layer.B_bias[:, 0], turns, layer.D, z,
    )  # fmt: skip
    dense = [tensor.contiguous() for tensor in given]
    return lambda state: mamba3_siso_step(*dense, (state.angle, state.ssm, state.k[:, 0], state.x))


def mamba3_peer(example: Example) -> Callable[[Example], list[Tensor]]:
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    # The peer takes numbers by head and token, A times dt, and a rate for each head, of which it takes pi tanh.
    timed, heads = {name: value.detach() for name, value in example.timed.items()}, example.timed["x"].shape[2]
    dt, lam = (timed[name].transpose(1, 2).contiguous() for name in ("dt", "lam"))
    rates = torch.atanh((timed["omega"] / torch.pi).clamp(-0.999, 0.999)).to(torch.bfloat16)
    prepared = (timed["A"].transpose(1, 2) * dt, dt, lam, rates.unsqueeze(2).expand(-1, -1, heads, -1))
    ADT, DT, Trap, Angles = (t.requires_grad_() for t in prepared)

    def scan(one: Example) -> list[Tensor]:
        B, C, x = (one.timed[name].squeeze(2) if name in "BC" else one.timed[name] for name in ("B", "C", "x"))
        B_bias, C_bias = (one.fixed[name].squeeze(1) for name in ("B_bias", "C_bias"))
        ssm, k, last, angle = one.state
        states = (angle, ssm, k.squeeze(1), last)
        settings = {"D": one.fixed["D"], "Input_States": states, "return_final_states": True}
        return list(mamba3_siso_combined(C, B, x, ADT, DT, Trap, C_bias, B_bias, Angles, **settings))

    return scan


def compared(theirs: Timing | None, ours: Timing | None) -> dict[str, Any]:
    """The fields of a row that say how many times as fast as the peer ours is."""
    return {} if theirs is None or ours is None else {"ratio": theirs.ratio(ours), "ratio_of": "mamba_ssm's speed"}
