"""What Triton makes of kernels for GPUs, most for Hopper's, found without one.

In a process of its own, because the interpreter and the compiler exclude each other.

`python -m tests.lowered sums OP VARIANT` says of each kernel of an op whether it has a sum that Triton 3.6 may get
wrong: it may change the order of numbers where a loop sums a tile, as it was loaded, along its last dimension, and sums
of some rows then have numbers of others (mended in triton-lang/triton#11186). The interpreter does not know that pass.

`python -m tests.lowered operands` says of each kernel of `trapezoid_scan` and `ssd_scan` whether a product of matrices
reads constants from registers: ptxas 12.8 may set such a register only behind the product that reads it.

`python -m tests.lowered registers` says of each kernel of `trapezoid_scan` whether its machine code adds to a register
that nothing wrote; `python -m tests.lowered cache` names such kernels among all in Triton's cache.

`python -m tests.lowered memory` says of each kernel of `trapezoid_scan`, `attention` and `attention_step_` how many
bytes of shared memory it takes on a GPU that has no more than 99 KiB for a program.

`python -m tests.lowered compiles 90` names the kernels of `trapezoid_scan`, `ssd_scan` and, for Hopper alone, of steps
of Mamba-2 that defer, for a GPU of compute capability 9.0, and fails with what Triton cannot compile.

`python -m tests.lowered loads` says of the kernel of `linear_conv_step_`, with a pool in each dtype, whether something
is loaded again: Triton 3.6 may do so for threads that share numbers out otherwise.

`python -m tests.lowered laws` names the kernels of all ops at the sizes of the laws, and fails with what Triton's
language does not allow: the interpreter runs a kernel as Python, where a name may hold first one tile, then another.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from everstate.bench.examples import lower
from everstate.core import kernels
from everstate.core.kernels import interpreting
from everstate.core.state import tensors
from everstate.ops import OPS, Rope, attention_step_, linear_conv_step_, mamba2_step_, triton_launch, use
from everstate.ops.example import EXAMPLES, Draw, Example
from everstate.ops.trapezoid.limits import SHARED_MEMORY
from tests.machine_code import adds_to_nothing, disassembled
from tests.ops.test_attention_triton import draw as draw_attention
from tests.ops.test_ssd_pending import Layer
from tests.ops.test_ssd_triton import draw as draw_ssd
from tests.ops.test_trapezoid_triton import ONE_HEAD
from tests.ops.test_trapezoid_triton import draw as draw_trapezoid

LENGTH = 131
REORDERED = "allow_reorder"


class Driver:
    """All that the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Lowered(Exception):  # noqa: N818
    """No error: enough is known, the kernel need not become machine code."""


class Code(str):
    """What becomes of a kernel, and the bytes of shared memory that it takes."""

    shared: int


@contextmanager
def lowering(stage: str, capability: int) -> Iterator[dict[str, list[Code]]]:
    """Inside the block kernels are lowered up to a stage instead of launched, each variant once: name of each -> what
    becomes of it, of machine code as text."""
    found: dict[str, list[Code]] = {}
    given, launch, make = CUDABackend.__dict__[stage], JITFunction.run, JITFunction._do_compile
    lower = getattr(given, "__func__", given)
    latest, begun = "", set[tuple[int, str]]()

    def make_once(kernel: Any, key: str, *args: Any) -> Any:
        if (id(kernel), key) in begun:
            raise Lowered
        begun.add((id(kernel), key))
        return make(kernel, key, *args)

    def lower_and_stop(*args: Any) -> None:
        made = lower(*args)
        code = Code(disassembled(made) if isinstance(made, bytes) else made)
        code.shared = next(arg for arg in args if isinstance(arg, dict)).get("shared", 0)
        found.setdefault(latest, []).append(code)
        raise Lowered

    def launch_nothing(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **sizes: Any) -> None:
        nonlocal latest
        latest = kernel.fn.__name__
        try:
            launch(kernel, *args, grid=grid, warmup=True, **sizes)
        except Lowered:
            return
        raise AssertionError(f"{latest} came from a cache")

    setattr(CUDABackend, stage, staticmethod(lower_and_stop) if isinstance(given, staticmethod) else lower_and_stop)
    JITFunction.run, JITFunction._do_compile = launch_nothing, make_once
    triton.runtime.driver.set_active(Driver(capability))
    known, triton_launch._KNOWN = triton_launch._KNOWN, False  # nothing is compiled that could be known
    try:
        with interpreting():
            yield found
    finally:
        setattr(CUDABackend, stage, given)
        JITFunction.run, JITFunction._do_compile, triton_launch._KNOWN = launch, make, known


def lowered(name: str, given: dict[str, Any], stage: str, capability: int = 90) -> dict[str, list[Code]]:
    """The kernels of an op, forward and backward, each in all its variants: given gradients of outputs, or of states
    too."""
    leaf = lambda v: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
    given = {k: each(leaf, v) for k, v in given.items()}
    with lowering(stage, capability) as found, use("triton"):
        y, *state = OPS[name](**given)
        parts = [t for v in given.values() for t in (v if isinstance(v, tuple) else [v]) if isinstance(t, Tensor)]
        wanted = [t for t in parts if t.requires_grad]
        for received in ((y,), (y, *tensors(state))):
            total = sum(t.sum() for t in received if t.requires_grad)
            torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=True)
    return found


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """A value, or the parts of a tuple such as the parameters of a layer, through `function`."""
    return type(value)(*map(function, value)) if hasattr(value, "_fields") else function(value)


def arguments(example: Example) -> dict[str, Any]:
    return {**example.timed, **example.fixed, "state": example.state}


def multiplies_constants(ptx: str) -> bool:
    """Whether a product takes its left side from registers, one of which holds a constant."""
    constants = set(re.findall(r"mov\.[bu]32 \s*(%r\d+), (?:-?\d+|0x\w+);", ptx))
    operands = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, \{([^}]*)\}", ptx)
    return any(not constants.isdisjoint(re.findall(r"%r\d+", registers)) for registers in operands)


def sums(name: str, variant: str) -> None:
    """For the arguments that the laws draw."""
    example = EXAMPLES[name][variant](Draw(dtype=torch.float32), 2, LENGTH, 2)
    for kernel, variants in lowered(name, arguments(example), "make_ttgir").items():
        print(kernel, "reordered" if any(REORDERED in text for text in variants) else "in order")


def operands() -> None:
    """In bfloat16: of the trapezoid at a size that its kernels for Hopper GPUs take, with and without what it need not
    be given, of SSD at one for all GPUs."""
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    trapezoid = draw_trapezoid(cpu, 1, 70, 2, 64, 1, 64, dtype=dtype)
    ssd = draw_ssd(cpu, 1, 70, 2, 32, 1, 16, dtype=dtype)
    calls = (
        ("trapezoid_scan", arguments(trapezoid), ""),
        ("trapezoid_scan", arguments(trapezoid._replace(fixed={})), "_bare"),
        ("ssd_scan", ssd, ""),
    )  # fmt: skip
    for name, given, suffix in calls:
        for kernel, variants in lowered(name, given, "make_ptx").items():
            print(f"{kernel}{suffix}", "constants" if any(map(multiplies_constants, variants)) else "no constants")


def registers() -> None:
    """In bfloat16, of some heads for which it was so once."""
    for headdim, d_state, pairs in ONE_HEAD[:2]:
        cpu, dtype = torch.device("cpu"), torch.bfloat16
        drawn = draw_trapezoid(cpu, 1, 70, 1, headdim, 1, d_state, pairs=pairs, dtype=dtype)
        for kernel, variants in lowered("trapezoid_scan", arguments(drawn), "make_cubin").items():
            print(f"{kernel}_{headdim}", "unwritten" if any(map(adds_to_nothing, variants)) else "written")


def cache() -> None:
    """Of all that was compiled on this machine, as by the tests on a GPU: which is wrong, and how many are not."""
    files = [*Path(triton.knobs.cache.dir).glob("*/*.cubin")]
    with ThreadPoolExecutor() as pool:
        wrong = [*pool.map(lambda file: adds_to_nothing(disassembled(file.read_bytes())), files)]
    for file in compress(files, wrong):
        print(file, "unwritten")
    print("others", wrong.count(False))


def memory() -> None:
    """Of the sizes that take most: heads of 128 x 128 and of 64 x 256, whose columns all turn, in 16 bits; and of 128
    numbers, in both precisions; of a token many heads of a group through pages."""
    kernels._ask_capability, kernels._ask_shared_memory = (lambda device: (8, 9)), (lambda device: SHARED_MEMORY)
    cpu, calls = torch.device("cpu"), []
    for headdim, d_state in ((128, 128), (64, 256)):
        drawn = draw_trapezoid(cpu, 1, 70, 2, headdim, 1, d_state, pairs=d_state // 2, dtype=torch.bfloat16)
        calls.append(("trapezoid_scan", arguments(drawn)))
    for dtype in (torch.bfloat16, torch.float32):
        timed, state = draw_attention(cpu, 1, 70, 2, 1, 128, capacity=128, read=[20], dtype=dtype)
        calls.append(("attention", {**timed, "state": state}))
    with lowering("make_llir", 89) as found, use("triton"), torch.no_grad():
        for heads, headdim, dtype in ((64, 64, torch.bfloat16), (8, 64, torch.bfloat16), (64, 256, torch.float32)):
            now, blocks = draw_attention(cpu, 2, 1, heads, 1, headdim, capacity=16, read=[20, 3], dtype=dtype)
            token, pages = {name: t[:, 0] for name, t in now.items()}, torch.zeros(2, 2, dtype=torch.int64)
            for rope in (None, Rope()):
                attention_step_(**token, state=blocks, pages=pages, rope=rope)
    most = {f"attention_step_.{kernel}": max(code.shared for code in codes) for kernel, codes in found.items()}
    for op, given in calls:
        for kernel, variants in lowered(op, given, "make_llir", 89).items():
            name = f"{op}.{kernel}"
            most[name] = max(most.get(name, 0), *(code.shared for code in variants))
    for name, size in most.items():
        print(name, size)


def compiles(capability: str) -> None:
    """In bfloat16, of the heads of published models, of one rank and of four."""
    kernels._ask_capability = lambda device: divmod(int(capability), 10)
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    trapezoid = arguments(draw_trapezoid(cpu, 1, 70, 2, 64, 1, 128, dtype=dtype))
    ranks = arguments(draw_trapezoid(cpu, 1, 70, 2, 64, 1, 128, 4, 64, dtype=dtype))
    ssd = draw_ssd(cpu, 1, 70, 2, 64, 1, 128, dtype=dtype)
    for name, given in (("trapezoid_scan", trapezoid), ("trapezoid_scan", ranks), ("ssd_scan", ssd)):
        for kernel in lowered(name, given, "make_llir", int(capability)):
            print(kernel, "compiles")
    if capability != "90":
        return
    with lowering("make_llir", 90) as found, use("triton"), torch.no_grad():
        for x_dtype, state_dtype, headdim, d_state, uneven in (
            (dtype, dtype, 64, 128, False), (dtype, torch.float32, 64, 128, False), (dtype, dtype, 32, 256, True),
            (torch.float16, torch.float16, 64, 128, False), (dtype, torch.float32, 10, 16, False),
        ):  # fmt: skip
            layer = Layer(
                cpu, x_dtype, state_dtype, {"z", "D", "norm"}, headdim=headdim, d_state=d_state, uneven=uneven
            )
            token, settings = layer.token()
            mamba2_step_(*token, layer.pool, layer.slots, **settings, pending=layer.pending())
    for kernel in found:
        print(kernel, "compiles")


def loads() -> None:
    """Of one row, whose numbers are multiplied one by one."""
    empty = partial(torch.empty, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        counts = set()
        for stage in ("make_ttir", "make_ttgir"):
            with lowering(stage, 90) as found, use("triton"):
                pool = empty(1, 256, 3, dtype=dtype)
                linear_conv_step_(empty(1, 4096), empty(512, 4096), None, empty(256, 4), None, pool)
            counts |= {text.count("tt.load") for text in found["_linear_kernel"]}
        print(f"_linear_kernel_{dtype}", "once" if len(counts) == 1 else "again")


def laws() -> None:
    """What the laws draw of all ops, in float32 and in bfloat16, forward, backward and, where an op has a step, of one
    token; then the ops."""
    from tests.laws import test_ops as law  # takes seconds, which the other commands need not pay

    served = [(name, variant) for name, variant, backend in law.BACKENDS if backend == law.KERNELS]
    with lowering("make_ttir", 90) as found, use(law.KERNELS):
        for name, variant in served:
            drawn = law.draw(name, variant, 2, LENGTH, backend=law.KERNELS)
            for example in (drawn, lower(drawn)):
                law.gradients(name, law.KERNELS, example)
                token = law.token(example)
                if example.step is not None and law.KERNELS in law.accepting(example.step, example, token):
                    example.step(**token, **example.fixed, state=example.state)
    for name in (*found, *dict(served)):
        print(name, "compiles")


COMMANDS: dict[str, Callable[..., None]] = {
    "sums": sums, "operands": operands, "registers": registers, "cache": cache, "memory": memory,
    "compiles": compiles, "loads": loads, "laws": laws,
}  # fmt: skip

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
