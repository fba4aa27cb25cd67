"""What kernels of several ops share."""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
VERSIONS = "3.6", "3.7", "3.8", "3.9"
"""Those of Triton whose experimental and inner parts have been tried; others do without them."""
TRIED = triton.__version__.rpartition(".")[0] in VERSIONS
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x * LOG2E), and exp2 is one instruction."""


@triton.jit
def dot(a, b, added, PRECISION: tl.constexpr):
    """`a @ b + added` in float32."""
    if INTERPRETED:
        # The interpreter would multiply the bits of bfloat16 as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, added, input_precision=PRECISION)


@triton.jit
def sum_of(tile):
    """The sum of all numbers of a tile: a number, or a vector of one where Triton 3.6 does not compile the sum of a
    vector that came of a product."""
    if INTERPRETED or cuda_capability_geq(10):
        return tl.sum(tl.sum(tile, 1, keep_dims=True), 0)
    else:
        return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def reciprocal(x):
    """`1 / x` in float32 for x of at least 1, within 1 ulp: one instruction, where a division takes six."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def softplus(x):
    """`log(1 + exp(x))`, also where exp(x) is small beside 1: `max(x, 0) + log(1 + v)` with `v = exp(-|x|)`.

    log(1 + v) / v on [0, 1] is a polynomial with a relative error of 2e-7: half of what the logarithm of Triton costs.
    """
    v = tl.exp2(-tl.abs(x) * LOG2E)
    p = 0.00512610214 * v - 0.0290740647
    p = p * v + 0.0775160868
    p = p * v - 0.136022476
    p = p * v + 0.190768807
    p = p * v - 0.24835399
    p = p * v + 0.333181217
    p = p * v - 0.49999445
    p = p * v + 0.999999966
    return tl.maximum(x, 0.0) + p * v
