"""Cosines and sines of a chunk of a head on a Hopper GPU, made where keys are: by a warp, or by a group of four.

Angles are phases before the chunk, as in `everstate.ops.trapezoid.triton_keys`, and the sum of the turns up to a token.
A warp that does nothing else walks along time; a group that has no time for that sums all at once, as a product with
ones. Cosines and sines are float16: off by 1e-4, a tenth of what rounding a key to bfloat16 costs.
"""

from __future__ import annotations

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from everstate.ops.triton_hopper import in_parts, recast

COSINE = gl.constexpr("cos.approx.f32 $0, $1;")
SINE = gl.constexpr("sin.approx.f32 $0, $1;")
RADIANS = gl.constexpr(6.283185307179586 / 4294967296.0)
"""The angle of one phase."""
TURN = gl.constexpr(6.283185307179586)
"""The angle of a whole turn."""
WHOLE = gl.constexpr(12582912.0)
"""1.5 * 2^23: adding it leaves an integer."""
PHASE = gl.constexpr("""{
    .reg .f32 coarse, fine;
    .reg .b32 high, low;
    fma.rn.f32 coarse, $1, 0f3E22F983, 0f45400000;
    add.rn.f32 fine, coarse, 0fC5400000;
    neg.f32 fine, fine;
    fma.rn.f32 fine, $1, 0f3E22F983, fine;
    fma.rn.f32 fine, $1, 0f31DC9C88, fine;
    fma.rn.f32 fine, fine, 0f4F800000, 0f4B400000;
    mov.b32 high, coarse;
    mov.b32 low, fine;
    shl.b32 high, high, 20;
    add.s32 low, low, high;
    sub.s32 $0, low, 0x4B400000;
}""")
"""The phase of an angle, as `triton_keys.phase_of` makes it of two additions; 1 / (2 pi) has two parts, so that sums of
thousands are right."""


@gluon.jit
def trig_of(angles):
    """Cosines and sines: right to 5e-7 between -pi and pi, and to 4e-5 up to 100 pi."""
    c = gl.inline_asm_elementwise(COSINE, "=f,f", [angles], gl.float32, is_pure=True, pack=1)
    return c, gl.inline_asm_elementwise(SINE, "=f,f", [angles], gl.float32, is_pure=True, pack=1)


@gluon.jit
def reduced(turns):
    """Turns brought between -pi and pi."""
    return gl.fma(gl.fma(turns, 1.0 / TURN, WHOLE) - WHOLE, -TURN, turns)


@gluon.constexpr_function
def layout_of_walk(HALF: int) -> gl.BlockedLayout:
    """How a warp holds some tokens of all pairs: a thread has a pair and walks along time."""
    return gl.BlockedLayout([8, 1], [32 // HALF, HALF], [1, 1], [1, 0])


@gluon.jit
def _sum(a, b):
    return a + b


@gluon.jit
def summed(turns):
    """Sums of turns, or of phases, up to each token."""
    return gl.associative_scan(turns, 0, _sum)


@gluon.jit
def trig_by_walking(now, rates, dts, trig, at, OWN: gl.constexpr, HALF: gl.constexpr, BLOCK: gl.constexpr):
    """One warp: cosines and sines of a chunk of one of two heads, side by side in the tile of that head, given rates
    and dt in a room `at` and the phases before the chunk. Returns the phases after it."""
    one: gl.constexpr = layout_of_walk(HALF)
    TOKENS: gl.constexpr = 256 // HALF
    PARTS: gl.constexpr = BLOCK // TOKENS
    trig = recast(trig, trig.dtype, [2 * PARTS, TOKENS, 2 * HALF], trig.layout)
    rates = recast(rates, rates.dtype, [2 * PARTS, TOKENS, HALF], rates.layout)
    dts = recast(dts, dts.dtype, [4 * PARTS, TOKENS], dts.layout)
    for part in range(PARTS):
        dt = dts.index((at * 2 + OWN) * PARTS + part).load(gl.SliceLayout(1, one))
        turns = dt[:, None] * rates.index(at * PARTS + part).load(one)
        turns = gl.inline_asm_elementwise(PHASE, "=r,f", [turns], gl.int32, is_pure=True, pack=1)
        angles = (summed(turns) + now[None, :]).to(gl.float32) * RADIANS
        out = trig.index(OWN * PARTS + part)
        c, s = trig_of(angles)
        out.store(gl.join(c, s).to(out.dtype).reshape(out.shape))
        now = now + gl.sum(turns, 0)
    return now


@gluon.jit
def ones_up_to(known, dtype: gl.constexpr, narrow: gl.constexpr, BLOCK: gl.constexpr, AFTER: gl.constexpr):
    """The left side of a product that sums rows up to each, or AFTER, from each on.

    `known` is no negative number, which the compiler does not know: ptxas 12.8 may set a register that holds a constant
    only behind the product that reads it.
    """
    first: gl.constexpr = gl.DotOperandLayout(0, narrow, 2)
    row, column = gl.arange(0, BLOCK, gl.SliceLayout(1, first)), gl.arange(0, BLOCK, gl.SliceLayout(0, first))
    nought = (known < 0) * 1.0
    there = row[:, None] <= column[None, :] if AFTER else row[:, None] >= column[None, :]
    return gl.where(there, 1.0 - nought, nought).to(dtype)


@gluon.jit
def trig_by_products(cs, ss, dt, rates, before, known):
    """Four warps: cosines and sines `[token, pair]` into two tiles, given dt, rates and the phases before the chunk.

    Turns are brought between -pi and pi, and summed in two parts of float16, which together are off by 2e-7.
    """
    narrow: gl.constexpr = rates.type.layout
    turns = reduced(dt[:, None] * rates)
    coarse, fine = in_parts(turns, cs.dtype)
    cs.store(coarse)
    ss.store(fine)
    fence_async_shared()
    sums = gl.zeros(turns.shape, gl.float32, narrow) + (before.to(gl.float32) * RADIANS)[None, :]
    ones = ones_up_to(known, cs.dtype, narrow, cs.shape[0], False)
    sums = warpgroup_mma(ones, cs, sums, is_async=True)
    sums = warpgroup_mma(ones, ss, sums, is_async=True)
    c, s = trig_of(warpgroup_mma_wait(0, (sums,)))
    cs.store(c.to(cs.dtype))
    ss.store(s.to(cs.dtype))
