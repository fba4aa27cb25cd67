"""The diagonal system in the form that the call asks for."""

from __future__ import annotations

from jaxtyping import Complex, Float
from torch import Tensor

from everstate.core.dtypes import complex_dtype, state_dtype
from everstate.core.packing import Packing, each_sequence
from everstate.ops.lti_conv import Mode
from everstate.ops.lti_diagonal import lti_diagonal as definition
from everstate.ops.lti_diagonal.convolution import convolution
from everstate.ops.lti_diagonal.discretize import Rule
from everstate.ops.lti_diagonal.scan import scan


def lti_diagonal(
    u: Float[Tensor, "b l d"],
    A: Complex[Tensor, "g n"],
    B: Complex[Tensor, "g n"],
    C: Complex[Tensor, "g n"],
    dt: Float[Tensor, " g"],
    state: Complex[Tensor, "seqs d n"],
    *,
    delta_t: Float[Tensor, "b l"] | None = None,
    discretization: Rule = "zoh",
    mode: Mode = "convolution",
    packing: Packing | None = None,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "seqs d n"]]:
    """See `everstate.ops.lti_diagonal`."""
    if packing is not None:
        fixed = {"A": A, "B": B, "C": C, "dt": dt, "discretization": discretization, "mode": mode}
        return each_sequence(lti_diagonal, packing, {"u": u, "delta_t": delta_t}, state, **fixed)
    if mode == "recurrence":
        return definition.reference(u, A, B, C, dt, state, delta_t=delta_t, discretization=discretization)
    real, inner = state_dtype(u.dtype), complex_dtype(u.dtype)
    system = A.to(inner), B.to(inner), C.to(inner), dt.to(real), state.to(inner), discretization
    if mode == "convolution" and delta_t is None:
        y, after = convolution(u.to(real), *system)
    else:
        y, after = scan(u.to(real), *system, None if delta_t is None else delta_t.to(real))
    return y.to(u.dtype), after
