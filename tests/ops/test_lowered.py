"""What Triton and the assembler may get wrong in kernels, looked for in what becomes of them for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from everstate.ops import OPS
from everstate.ops.attention import limits as attention
from everstate.ops.example import EXAMPLES
from everstate.ops.trapezoid import limits as trapezoid

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the laws compare what is computed"),
]


def verdicts(cache: Path, *command: str) -> dict[str, str]:
    """What `tests/lowered.py` says of each kernel."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = (sys.executable, "-m", "tests.lowered", *command)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


def test_no_sum_of_a_loaded_tile_is_reordered(tmp_path: Path) -> None:
    """Without a gate and a bias nothing changes steps before they are summed: such a sum along a tile was wrong."""
    found = verdicts(tmp_path, "sums", "selective_scan", "mamba1")
    assert set(found) == {"scan_kernel", "ends_kernel", "pass_kernel", "states_kernel", "writes_kernel"}
    assert set(found.values()) == {"in order"}


def test_the_trapezoid_and_attention_run_with_little_shared_memory(tmp_path: Path) -> None:
    sizes = {kernel: int(size) for kernel, size in verdicts(tmp_path, "memory").items()}
    most = {
        "trapezoid_scan": trapezoid.SHARED_MEMORY,
        "attention": attention.SHARED_MEMORY,
        "attention_step_": attention.SHARED_MEMORY_STEP,
    }
    for op, names in (
        ("trapezoid_scan", ("scan_kernel", "sweep_kernel", "inputs_kernel", "keys_kernel")),
        ("attention", ("_forward_kernel", "_query_kernel", "_key_kernel")),
        ("attention_step_", ("_split_kernel",)),
    ):
        assert all(sizes[f"{op}.{kernel}"] > 0 for kernel in names)
        assert max(size for name, size in sizes.items() if name.startswith(f"{op}.")) <= most[op] <= 99 * 1024


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """With gradients of final states and without, of one rank and of four: the imitation runs what Triton refuses."""
    found = verdicts(tmp_path, "compiles", "90")
    ranks_alone = {"ranks_kernel", "turn_gradients_kernel"}
    scans = {"scan_kernel", "sweep_kernel", "gradients_kernel", "angle_gradients_kernel"}
    assert scans | ranks_alone | {"step_kernel"} <= found.keys()
    assert set(found.values()) == {"compiles"}


def test_kernels_compile_for_a_gpu_that_has_memory_for_products(tmp_path: Path) -> None:
    """On 10.0 products are kept there, and Triton 3.6 neither loads ahead nor sums all of them as elsewhere."""
    found = verdicts(tmp_path, "compiles", "100")
    scans = {"scan_kernel", "sweep_kernel", "inputs_kernel", "keys_kernel", "_scan_kernel", "_inputs_kernel"}
    assert scans <= found.keys()
    assert set(found.values()) == {"compiles"}


def test_no_product_reads_constants_from_registers(tmp_path: Path) -> None:
    """Sums that are products with ones; what an entry does not receive from later ones: the compiler may know none."""
    found = verdicts(tmp_path, "operands")
    trapezoid_kernels = {"scan_kernel", "sweep_kernel", "gradients_kernel"}
    assert {*trapezoid_kernels, "gradients_kernel_bare", "_scan_kernel", "_keys_kernel"} <= found.keys()
    assert set(found.values()) == {"no constants"}


def test_what_a_convolution_has_kept_is_loaded_once(tmp_path: Path) -> None:
    """Half as many registers again let half as many programs in, where a pool was float32."""
    found = verdicts(tmp_path, "loads")
    assert found == {"_linear_kernel_torch.float32": "once", "_linear_kernel_torch.bfloat16": "once"}


def test_no_sum_reads_what_nothing_wrote(tmp_path: Path) -> None:
    found = verdicts(tmp_path, "registers")
    assert {"keys_kernel_80", "keys_kernel_96"} <= found.keys()
    assert set(found.values()) == {"written"}


def test_kernels_of_all_laws_compile(tmp_path: Path) -> None:
    """The interpreter runs what Triton refuses, as a name that holds one tile and in a loop one of another shape."""
    found = verdicts(tmp_path, "laws")
    assert {op for op in EXAMPLES if "triton" in OPS[op].backends()} <= found.keys()
    assert {"angle_gradients_kernel", "_split_kernel"} <= found.keys()
    assert set(found.values()) == {"compiles"}
