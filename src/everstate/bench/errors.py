"""`everstate bench errors`: how far the output of an op and its gradients are from float64, beside the PyTorch form and
peers. Of scans and what surrounds them; what final states are and say is not in it.

The PyTorch form computes in float32, but for experts and the loss. Under autocast, as models are trained that have no
kernels, its products are bfloat16, as those of kernels are.

Activations are bfloat16, as in training. Errors are norms of differences, relative to the norm of what is right; that
of rounding normal numbers once to bfloat16 is 1.66e-3. How far a scan looks back decides which of its products are
large, so those of models are measured with decays as published, and with slower ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from everstate.bench.examples import arguments, cut, exactly, lower, outcome
from everstate.bench.kernels import ALLOWED, OURS, PEERS_ALLOWED, chosen, first_line, norm_error, with_kernels
from everstate.bench.peer_ops import Run, peers_of, run_op
from everstate.bench.report import Row, machine, publishing
from everstate.bench.shapes import GPU_SHAPES, op_of
from everstate.bench.timing import Gate
from everstate.bench.triton_tuning import compiled_together
from everstate.core.op import REFERENCE
from everstate.ops import use
from everstate.ops.example import Draw, Example

D_INNER, TOKENS = 512, 4096
QUICK_D_INNER, QUICK_TOKENS = 128, 256
DECAYS = {"ssd_scan": "a", "trapezoid_scan": "A", "selective_scan": "A"}
"""Arguments to which the logarithms of decays are proportional."""
SLOWER = 16
"""By which they are divided, the second time."""
FORM, FORM_IN_BFLOAT16 = "torch", "torch, autocast"
NO_PEERS = (OURS, FORM, FORM_IN_BFLOAT16)


def run(*, quick: bool, output: Path | None, now: datetime, device: str, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, print a table and a line of JSON, write that to `output`, and return it.

    `only` has names of `GPU_SHAPES`, by default all that have kernels. Raises `ConfigError` for others.
    """
    names = chosen("bench errors", with_kernels(), only)
    d_inner, tokens = (QUICK_D_INNER, QUICK_TOKENS) if quick else (D_INNER, TOKENS)
    rows: list[Row] = []
    left_out: list[str] = []
    facts = {"quick": quick, "machine": machine(device), "d_inner": d_inner, "left_out": left_out}
    with (
        publishing("errors", rows, facts, now, output, table) as result,
        compiled_together(),
        Console(stderr=True).status("starting") as status,
    ):
        for name in names:
            for title, example in cases(name, d_inner, tokens, device):
                status.update(f"{title}; a peer may compile and tune its kernels for minutes")
                rows += errors(name, title, example, tokens, left_out)
    return result


def cases(name: str, d_inner: int, tokens: int, device: str) -> Iterator[tuple[str, Example]]:
    """Titles and arguments, with decays as published and, where there are such, slower ones."""
    draw = Draw(dtype=torch.float32, device=device, drawn_on=device)
    example = cut(lower(GPU_SHAPES[name](draw, d_inner, tokens)), 1)
    yield name, example
    decays = DECAYS.get(op_of(name))
    if decays is not None:
        slow = lambda given: {key: value / SLOWER if key == decays else value for key, value in given.items()}
        slower = example._replace(timed=slow(example.timed), fixed=slow(example.fixed))
        yield f"{name}, {SLOWER} times slower decays", slower


def errors(name: str, title: str, example: Example, tokens: int, left_out: list[str]) -> Iterator[Row]:
    """A row for the output and one for each gradient. Peers, which are given other numbers in float32, are in those of
    tensors in bfloat16; one that computes less is not there."""
    expected, found = outcomes(name, title, example, left_out)
    for place, tensor in enumerate(["output", *(f"gradient of {each}" for each in arguments(example))]):
        rounded = found[FORM][place].dtype == torch.bfloat16
        figures: dict[str, float] = {}
        for who, tensors in found.items():
            got, right = tensors[place], expected[place]
            if who in NO_PEERS:
                figures[who] = norm_error(got, right)
            elif rounded and got.numel() == right.numel():
                error = norm_error(got.reshape(right.shape), right)
                if error <= PEERS_ALLOWED:
                    figures[who] = error
                else:
                    left_out.append(f"{title}, {tensor} of {who}: {error:.0e} from float64, which is something else")
        yield Row(f"{title}: {tensor}", tokens, Gate(figures[OURS], ALLOWED[torch.bfloat16]), None, figures=figures)


def outcomes(
    name: str, title: str, example: Example, left_out: list[str]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The output and the gradients of all arguments, in float64 and as each candidate finds them."""
    find, op = partial(outcome, outputs=1), partial(run_op, op_of(name))
    found = {OURS: find(op, example)}
    with use("torch", REFERENCE):
        expected = find(op, exactly(example))
        found[FORM] = find(op, example)
        found[FORM_IN_BFLOAT16] = find(partial(under_autocast, op), example)
    for peer, run in peers_of(name, example).items():
        if "without" not in peer:
            try:
                found[peer] = find(run, example)
            except Exception as error:
                left_out.append(f"{title} of {peer}: {first_line(error)}")
    return expected, found


def under_autocast(run: Run, example: Example) -> list[Tensor]:
    """The forward pass, as a training step has it. Backward, operations of PyTorch are in the same precision."""
    device = next(iter(example.timed.values())).device
    with torch.autocast(device.type, torch.bfloat16):
        return run(example)


def table(title: str, rows: Sequence[Row]) -> Table:
    """Each op, and under it a line for each tensor."""
    caption = "norm of the difference from float64, relative, in thousandths"
    table = Table(title=title, caption=caption, box=None, header_style="bold underline")
    table.add_column("what", min_width=24, overflow="fold")
    for name in NO_PEERS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peer", justify="right")
    last = None
    for row in rows:
        op, _, tensor = row.name.partition(": ")
        if op != last:
            table.add_row(f"[bold]{op}[/]")
        last = op
        peers = (f"{name} {1000 * error:.2f}" for name, error in row.figures.items() if name not in NO_PEERS)
        own = (f"{1000 * row.figures[name]:.2f}" for name in NO_PEERS)
        style = None if row.gate.passed else "red"
        table.add_row(f"  {tensor.replace('gradient of ', 'd')}", *own, ", ".join(peers), style=style)
    return table
