"""The nonlinearities of `ops/activations.py` inside kernels, and their slopes."""

import triton
import triton.language as tl


@triton.jit
def act(x, ACTIVATION: tl.constexpr):
    """One of `ACTIVATIONS`."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = positive * positive
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        y = x * _tanh_part(x)
    return y


@triton.jit
def act_slope(x, ACTIVATION: tl.constexpr):
    """Its derivative."""
    if ACTIVATION == "silu":
        part = tl.sigmoid(x)
        slope = part * (1.0 + x * (1.0 - part))
    elif ACTIVATION == "relu2":
        slope = 2.0 * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # exp(-x^2 / 2) / sqrt(2 pi)
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        part = _tanh_part(x)
        slope = part + x * part * (1.0 - part) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
    return slope


@triton.jit
def _tanh_part(x):
    """How much of x its approximate GELU is: `(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`."""
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi) times that
    return 1.0 - 1.0 / (tl.exp(tl.minimum(inner, 80.0)) + 1.0)  # beyond, it is 1 to the last bit
