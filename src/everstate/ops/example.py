"""What an op needs so that the laws can test it: arguments of any batch and length, drawn for it.

Each op's folder has an `example.py` with one function per op; `EXAMPLES` names them, and every test in `tests/laws`
runs over `EXAMPLES`. `everstate bench ops` and `everstate doctor` draw their arguments the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everstate.core.registry import Registry


class Draw:
    """Random tensors of one dtype on one device from one generator.

    The generator is the CPU's, so that every device gets the same numbers; with `drawn_on` a GPU's, which is faster.
    """

    def __init__(
        self,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        drawn_on: torch.device | str = "cpu",
    ) -> None:
        self.generator = torch.Generator(drawn_on).manual_seed(seed)
        self.dtype = dtype
        self.device = torch.device(device)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal with standard deviation `scale`."""
        return self._place(torch.randn(shape, **self._source) * scale)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high)."""
        return self._place(torch.rand(shape, **self._source) * (high - low) + low)

    def complex(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Complex normal."""
        real, imag = self.normal(*shape, scale=scale), self.normal(*shape, scale=scale)
        return torch.complex(real, imag)

    def integers(self, *shape: int, high: int) -> Tensor:
        """Integers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.generator.device).to(self.device)

    @property
    def _source(self) -> dict[str, Any]:
        return {"generator": self.generator, "dtype": torch.float64, "device": self.generator.device}

    def _place(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)


class Example(NamedTuple):
    """Keyword arguments of one call of an op.

    timed: tensors `(batch, length, ...)`, which can be cut along time; none where an op has no time, as a kernel.
    state: the initial state, or None for an op that carries none.
    fixed: everything else: parameters and settings.
    step: the in-place op that decodes one token with the same names, or None.
    packs: whether the op takes `packing`.
    """

    timed: dict[str, Tensor]
    state: Any = None
    fixed: dict[str, Any] = {}
    step: Callable[..., Any] | None = None
    packs: bool = True


Variants = dict[str, Callable[[Draw, int, int, int], Example]]
"""Name of a variant -> `(draw, batch, length, sequences) -> Example`; the state has `sequences` rows."""

EXAMPLES: Registry[Variants] = Registry("op example")
"""Op name -> `"everstate.ops.FOLDER.example:OP"`, a dict of variants."""

EXAMPLES.add("selective_scan", "everstate.ops.selective_scan.example:selective_scan")
EXAMPLES.add("ssd_scan", "everstate.ops.ssd.example:ssd_scan")
EXAMPLES.add("trapezoid_scan", "everstate.ops.trapezoid.example:trapezoid_scan")
EXAMPLES.add("mamba2_scan", "everstate.ops.mamba2.example:mamba2_scan")
EXAMPLES.add("mamba3_scan", "everstate.ops.mamba3.example:mamba3_scan")
EXAMPLES.add("gated_delta_scan", "everstate.ops.delta.example:gated_delta_scan")
EXAMPLES.add("causal_conv1d", "everstate.ops.conv1d.example:causal_conv1d")
EXAMPLES.add("linear_scan", "everstate.ops.linear_scan.example:linear_scan")
EXAMPLES.add("lti_conv", "everstate.ops.lti_conv.example:lti_conv")
EXAMPLES.add("lti_diagonal", "everstate.ops.lti_diagonal.example:lti_diagonal")
EXAMPLES.add("lti_kernel_diagonal", "everstate.ops.lti_diagonal.example:lti_kernel_diagonal")
EXAMPLES.add("lti_dplr", "everstate.ops.lti_dplr.example:lti_dplr")
EXAMPLES.add("lti_kernel_dplr", "everstate.ops.lti_dplr.example:lti_kernel_dplr")
EXAMPLES.add("rms_norm", "everstate.ops.norm.example:rms_norm")
EXAMPLES.add("gated_rms_norm", "everstate.ops.norm.example:gated_rms_norm")
EXAMPLES.add("add_rms_norm", "everstate.ops.norm.example:add_rms_norm")
EXAMPLES.add("gated", "everstate.ops.glu.example:gated")
EXAMPLES.add("glu", "everstate.ops.glu.example:glu")
EXAMPLES.add("rotate", "everstate.ops.rotary.example:rotate")
EXAMPLES.add("rotary", "everstate.ops.rotary.example:rotary")
EXAMPLES.add("attention", "everstate.ops.attention.example:attention")
EXAMPLES.add("experts", "everstate.ops.experts.example:experts")
EXAMPLES.add("linear_cross_entropy", "everstate.ops.cross_entropy.example:linear_cross_entropy")
