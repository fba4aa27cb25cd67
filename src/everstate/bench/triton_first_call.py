"""How long the first call of an op takes: in a process of its own, where no kernel has been compiled before."""

from __future__ import annotations

import subprocess
import sys
import time
from tempfile import TemporaryDirectory

import torch

from everstate.bench.examples import cut, differentiable, lower
from everstate.bench.peer_ops import run_op
from everstate.bench.shapes import GPU_SHAPES, op_of
from everstate.ops.example import Draw


def first_call(name: str, d_inner: int, total: int, batch: int, device: str) -> float:
    """Seconds of an op and its gradients, of `total` tokens of `batch` sequences of `GPU_SHAPES[name]`, without the
    imports before. Raises `ChildProcessError` with what such a process says last if it fails."""
    call = [sys.executable, "-m", __name__, name, str(d_inner), str(total), str(batch), device]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ChildProcessError((done.stderr.splitlines() or [f"it ended with {done.returncode}"])[-1])
    return float(done.stdout.split()[-1])


def measure(name: str, d_inner: int, total: int, batch: int, device: str) -> float:
    """Seconds of the call in this process."""
    draw = Draw(dtype=torch.float32, device=device, drawn_on=device)
    example = cut(lower(GPU_SHAPES[name](draw, d_inner, total)), batch)
    leaves = differentiable(example)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    outputs = run_op(op_of(name), example)
    torch.autograd.grad(outputs, leaves, [torch.randn_like(output) for output in outputs], allow_unused=True)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    from triton import knobs  # here only: not every machine that imports this file has Triton

    asked, d_inner, total, batch, device = sys.argv[1:]
    with TemporaryDirectory() as knobs.cache.dir:
        print(measure(asked, int(d_inner), int(total), int(batch), device))
