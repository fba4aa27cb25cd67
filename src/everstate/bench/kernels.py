"""`everstate bench ops --device cuda`: the kernels of a GPU at the sizes of a 1.3B layer, beside those of its peers.

64k tokens as many short sequences, some, and one long one; and one token of many sequences. bfloat16 activations,
float32 states. Times are those of the GPU alone, as in a captured graph: what Python adds before is not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from everstate.bench.examples import Call, calls, cut, exactly, first, in_precision, lower, outcome, widen
from everstate.bench.peer_ops import Run, peers_of, run_op, step_peer
from everstate.bench.report import Row, machine, publishing
from everstate.bench.shapes import GPU_SHAPES, STEPS, op_of
from everstate.bench.timing import Gate, Timing, interleave
from everstate.bench.triton_first_call import first_call
from everstate.bench.triton_tuning import compiled_together
from everstate.core.errors import ConfigError
from everstate.core.op import REFERENCE
from everstate.core.state import clone, nbytes, tensors
from everstate.ops import OPS, AttentionState, use
from everstate.ops.example import Draw, Example

D_INNER, TOKENS = 4096, 65_536
QUICK_D_INNER, QUICK_TOKENS = 128, 512
SPLITS = (32, 8, 1)
"""Into how many sequences the tokens are cut."""
FEW = (64, 16, 4, 1)
"""Tokens that experts are measured with too, as decoding gives them."""
STEP_BATCHES = (1, 16, 64, 256, 1024)
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error of an output or a gradient against float64, of norms. Gradients of decays and angles, which are
what is left of large sums, have the largest."""
PEERS_ALLOWED = 5e-2
"""Largest difference between the outputs of a peer and ours, of norms: whether both compute the same."""
GATE_TOKENS, REPEATS = 300, 20

KINDS = ("forward", "both")
"""What is timed of an op: forward without gradients, and forward with backward."""
OURS = "everstate"


def run(*, quick: bool, output: Path | None, now: datetime, device: str, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, print a table and a line of JSON, write that to `output`, and return it.

    `only` has names of `GPU_SHAPES` and `STEPS`, by default all that have kernels. Raises `ConfigError` for others.
    """
    names = chosen("bench ops", [*with_kernels(), *STEPS], only)
    d_inner, total = (QUICK_D_INNER, QUICK_TOKENS) if quick else (D_INNER, TOKENS)
    first_call_s: dict[str, float] = {}
    rows: list[Row] = []
    left_out: list[str] = []
    facts = {"quick": quick, "machine": machine(device), "d_inner": d_inner, "first_call_s": first_call_s}
    facts["left_out"] = left_out
    with (
        publishing("kernels", rows, facts, now, output) as result,
        compiled_together(),
        Console(stderr=True).status("starting") as status,
    ):
        for name in names:
            status.update(name)
            if name in STEPS:
                rows += steps(name, d_inner, STEP_BATCHES[:2] if quick else STEP_BATCHES, device, left_out)
            else:
                if not quick:
                    first_call_s |= first_calls(name, d_inner, total, device, left_out)
                rows += scans(name, d_inner, total, device, left_out, status.update)
    return result


def with_kernels() -> list[str]:
    """The scans and what surrounds them that have kernels."""
    return [name for name in GPU_SHAPES if "triton" in OPS[op_of(name)].backends()]


def chosen(command: str, known: list[str], only: Sequence[str]) -> Sequence[str]:
    """What is measured: all that is known, or `only` some; raises `ConfigError` for others."""
    if unknown := [name for name in only if name not in known]:
        allowed = "; ".join(known)
        raise ConfigError(f"{command}: {'; '.join(unknown)} is not measured on a GPU; give one or more of: {allowed}")
    return only or known


def first_calls(name: str, d_inner: int, total: int, device: str, left_out: list[str]) -> dict[str, float]:
    """The seconds of the first call of an op, under its name; why there are none goes to `left_out`."""
    batch, _ = sizes(op_of(name), total)[0]
    try:
        return {name: first_call(name, d_inner, total, batch, device)}
    except ChildProcessError as error:
        left_out.append(f"{name}, first call: {error}")
        return {}


def scans(
    name: str, d_inner: int, total: int, device: str, left_out: list[str], tell: Callable[[str], None]
) -> Iterator[Row]:  # fmt: skip
    """Forward, and forward with backward, of one op on the same tokens cut into more or fewer sequences."""
    op, draw = op_of(name), Draw(dtype=torch.float32, device=device, drawn_on=device)
    small = lower(GPU_SHAPES[name](draw, min(d_inner, 512), GATE_TOKENS))
    error = gate_error(op, cut(small, 3) if "packing" in small.fixed else small)
    gate = Gate(error, ALLOWED[torch.bfloat16])
    long = lower(GPU_SHAPES[name](draw, d_inner, total))
    for batch, length in sizes(op, total):
        example = cut(first(long, batch * length), batch)
        candidates = dict(zip(KINDS, calls(partial(run_op, op), example), strict=True))
        for peer, run in peers_of(name, example).items():
            tell(f"{name} {batch} x {length}: {peer}, which may compile and tune its kernels for minutes")
            if reason := scan_disagreement(op, peer, run, example):
                left_out.append(reason)
            else:
                candidates |= {f"{peer} {kind}": call for kind, call in working(op, peer, run, example, left_out)}
        timings = interleave(candidates, gate, REPEATS, device, on_device=True)
        for kind in KINDS:
            end = f" {kind}"
            theirs = {key.removesuffix(end): timing for key, timing in timings.items() if key.endswith(end)}
            title = f"{name} {batch} x {length}" + (" + backward" if kind == "both" else "")
            yield from beside(title, batch * length, gate, timings.get(kind), theirs)


def sizes(op: str, total: int) -> list[tuple[int, int]]:
    """Sequences, and tokens of each. Experts know no sequences: what matters to them is how many tokens there are."""
    if op == "experts":
        return [(1, tokens) for tokens in (total, *FEW)]
    return [(batch, total // batch) for batch in SPLITS]


def working(op: str, peer: str, run: Run, example: Example, left_out: list[str]) -> Iterator[tuple[str, Call]]:
    """The calls of a peer that do not fail; those that do are left out."""
    for place, kind in enumerate(KINDS):
        try:
            call = calls(run, example)[place]
            call()
        except Exception as error:
            left_out.append(f"{op} of {peer}, {'with backward' if kind == 'both' else kind}: {first_line(error)}")
        else:
            yield kind, call


def first_line(error: Exception) -> str:
    """What an error says first, or its name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def beside(title: str, tokens: int, gate: Gate, ours: Timing | None, theirs: dict[str, Timing]) -> Iterator[Row]:
    """A row of ours, compared with the fastest peer, and one of each peer."""
    compared: dict[str, Any] = {}
    if ours is not None and theirs:
        fastest = min(theirs, key=lambda name: theirs[name].median)
        compared = {"ratio": theirs[fastest].ratio(ours), "ratio_of": f"{fastest}'s speed"}
    yield Row(title, tokens, gate, ours, **compared)
    for name, timing in theirs.items():
        yield Row(f"  {name}", tokens, gate, timing)


def scan_disagreement(op: str, peer: str, run: Run, example: Example) -> str | None:
    """Why a peer is left out, or None. Its kernels are compared at the sizes at which they are timed, so that none is
    compiled and tuned for others. One without D is compared without."""
    plain = example._replace(fixed={name: value for name, value in example.fixed.items() if name != "D"})
    asked = plain if "without D" in peer else example
    with torch.no_grad():
        return disagreement(f"{op} of {peer}", partial(run, asked), run_op(op, asked)[0])


def steps(name: str, d_inner: int, batches: tuple[int, ...], device: str, left_out: list[str]) -> Iterator[Row]:
    """One token for each of many sequences: how fast the states move through memory."""
    op, shape = op_of(name), STEPS[name]
    for batch in batches:
        long = cut(lower(shape(Draw(dtype=torch.float32, device=device, drawn_on=device), d_inner, batch)), batch)
        token = {key: value[:, 0] for key, value in long.timed.items()} | long.fixed
        keys = isinstance(long.state, AttentionState)
        # Keys and values are copies of inputs, and in their dtype.
        for dtype in (torch.bfloat16,) if keys else (torch.float32, torch.bfloat16):
            pool = in_precision(long.state, dtype)
            gate = Gate(step_error(op, token, pool), ALLOWED[torch.bfloat16])
            # Both before the pool is stepped: keys grow.
            size, extent = moved(pool), f"{batch} x {pool.pos[0]}" if keys else f"{batch}"
            title = f"{name} of {extent}, {str(dtype).removeprefix('torch.')} state"
            # Several pools in turn, so that none is left in the cache.
            pools = [pool, *(clone(pool) for _ in range(256_000_000 // nbytes(pool)))][:32]
            candidates: dict[str, Call] = {OURS: partial(step_each, partial(OPS[op], **token), pools)}
            if (found := step_peer(name, token, pool)) is not None:
                peer, step = found
                if reason := step_disagreement(op, peer, step, token, pool):
                    left_out.append(reason)
                else:
                    candidates[peer] = partial(step_each, step, pools)
            timings = {
                key: Timing(tuple(seconds / len(pools) for seconds in timing.seconds))
                for key, timing in interleave(candidates, gate, REPEATS, device, on_device=True).items()
            }
            ours = timings.pop(OURS, None)
            speed = None if ours is None else size / ours.median / 1e12
            yield Row(title, batch, gate, ours, ratio=speed, ratio_of="TB/s of states")
            for other, theirs in timings.items():
                yield Row(f"  {other}", batch, gate, theirs)


def moved(pool: Any) -> int:
    """Bytes of a pool that a step moves: all of it, in and out; of keys and values what has been filled, in."""
    if isinstance(pool, AttentionState):
        return nbytes((pool.k[0, 0], pool.v[0, 0])) * int(pool.pos.sum())
    return 2 * nbytes(pool)


def step_each(step: Callable[..., object], pools: list[Any]) -> None:
    """One step of each pool."""
    with torch.no_grad():
        for pool in pools:
            step(state=pool)


def step_error(op: str, token: dict[str, Any], pool: Any) -> float:
    """Of the output of a step and of the state after it, against the torch form in float64."""
    mine, exact = clone(pool), widen(clone(pool))
    with torch.no_grad():
        got = OPS[op](**token, state=mine)
        with use("torch"):
            expected = OPS[op](**{name: widen(value) for name, value in token.items()}, state=exact)
    pairs = zip([got, *written(mine, token)], [expected, *written(exact, token)], strict=True)
    return max(norm_error(one, other) for one, other in pairs)


def written(pool: Any, token: dict[str, Any]) -> list[Tensor]:
    """What a step has written: all of a state; of keys and values in blocks those of its token, and positions."""
    if not isinstance(pool, AttentionState):
        return tensors(pool)
    last, size = pool.pos - 1, pool.k.shape[1]
    blocks = token["pages"].gather(1, (last // size).unsqueeze(1)).squeeze(1)
    return [pool.k[blocks, last % size], pool.v[blocks, last % size], pool.pos]


def step_disagreement(op: str, peer: str, step: Callable[..., object], token: dict[str, Any], pool: Any) -> str | None:
    """Why the step of a peer is left out, or None."""
    with torch.no_grad():
        return disagreement(f"{op} of {peer}", partial(step, clone(pool)), OPS[op](**token, state=clone(pool)))


def disagreement(what: str, peer: Callable[[], object], ours: Tensor) -> str | None:
    """A sentence about a peer that fails, or gives first what is not ours, or None."""
    try:
        error = norm_error(tensors(peer())[0].reshape(ours.shape), ours)
    except Exception as failure:
        return f"{what}: {first_line(failure)}"
    return None if error <= PEERS_ALLOWED else differing(what, error)


def differing(what: str, error: float) -> str:
    """Why a peer with such an error is left out."""
    return f"{what}: its outputs differ from ours by {error:.0e}, of norms"


def gate_error(op: str, example: Example) -> float:
    """The largest error of an output or gradient against the torch form in float64, of norms."""
    run = partial(run_op, op)
    with use("torch", REFERENCE):
        expected = outcome(run, exactly(example))
    return max(norm_error(got, want) for got, want in zip(outcome(run, example), expected, strict=True))


def norm_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    got, expected = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (got, expected))
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
