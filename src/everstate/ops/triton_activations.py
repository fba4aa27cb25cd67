"""The nonlinearities of `ops/activations.py` inside kernels, and their slopes."""

import triton
import triton.language as tl


@triton.jit
def act(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    if ACTIVATION == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * _tanh_part(x)


@triton.jit
def act_slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        part = tl.sigmoid(x)
        return part * (1.0 + x * (1.0 - part))
    if ACTIVATION == "relu2":
        return 2.0 * tl.maximum(x, 0.0)
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    part = _tanh_part(x)
    return part + x * 2.0 * part * (1.0 - part) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)


@triton.jit
def _tanh_part(x):
    """How much of x its approximate GELU is: `(1 + tanh(...)) / 2`."""
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return 1.0 - 1.0 / (tl.exp(tl.minimum(inner, 80.0)) + 1.0)  # beyond, it is 1 to the last bit
