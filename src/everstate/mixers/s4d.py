"""S4D: a diagonal state space model per channel.

Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space models" (arXiv 2206.11893).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.hippo import hippo_dplr, s4d_inv, s4d_lin
from everstate.mixers.lti import LTIConfig, System, SystemConfig, TimeInvariant, as_complex
from everstate.ops import lti_diagonal, lti_diagonal_step_
from everstate.ops.lti_diagonal.discretize import Rule


class DiagonalConfig(SystemConfig):
    """Settings of a diagonal state space model."""

    init: Literal["lin", "inv", "legs"] = "lin"
    discretization: Rule = "zoh"


class S4DConfig(DiagonalConfig, LTIConfig):
    """Settings of one S4D layer."""

    title = "s4d"


class DiagonalSystem(System):
    """`x = dA x + dB u; y = 2 Re(C x)`, elementwise."""

    config: DiagonalConfig
    flops_per_pair = 14

    def forward(
        self,
        u: Float[Tensor, "b l d"],
        state: Float[Tensor, "seqs d n 2"],
        packing: Packing | None,
        delta_t: Float[Tensor, "b l"] | None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d n 2"]]:
        y, after = lti_diagonal(
            u, self.A, as_complex(self.B), as_complex(self.C), self.dt, torch.view_as_complex(state),
            delta_t=delta_t, discretization=self.config.discretization, mode=self.config.mode, packing=packing,
        )  # fmt: skip
        return y, torch.view_as_real(after)

    def step_(
        self,
        u: Float[Tensor, "b d"],
        state: Float[Tensor, "slots d n 2"],
        slots: Slots,
        delta_t: Float[Tensor, " b"] | None,
    ) -> Float[Tensor, "b d"]:
        return lti_diagonal_step_(
            u, self.A, as_complex(self.B), as_complex(self.C), self.dt, torch.view_as_complex(state), slots,
            delta_t=delta_t, discretization=self.config.discretization,
        )  # fmt: skip

    def init_(self, generator: torch.Generator) -> None:
        n = self.config.d_state
        if self.config.init == "legs":
            # Half of B: with it the diagonal system tends to HiPPO-LegS as n grows (arXiv 2206.11893, theorem 3).
            A, _, B = hippo_dplr(n)
            self.init_dynamics_(A, B / 2, generator)
        else:
            A = s4d_lin(n) if self.config.init == "lin" else s4d_inv(n)
            self.init_dynamics_(A, torch.ones_like(A), generator)


class S4D(TimeInvariant):
    """A layer around a diagonal system per channel."""

    Config = S4DConfig

    def __init__(self, d_model: int, config: S4DConfig) -> None:
        super().__init__(d_model, config, DiagonalSystem(d_model, config))
