"""What kernels of several ops share."""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
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
