"""S4: a normal-plus-low-rank state space model per channel, which starts as HiPPO-LegS.

Source: Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces" (arXiv 2111.00396).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.hippo import hippo_dplr
from everstate.mixers.lti import LTIConfig, System, SystemConfig, TimeInvariant, as_complex
from everstate.ops import lti_dplr, lti_dplr_step_


class S4Config(LTIConfig):
    """Settings of one S4 layer."""

    title = "s4"


class DPLRSystem(System):
    """`x = dA x + dB u; y = 2 Re(C x)` with the matrix `diag(A) - P P^H` and the bilinear rule."""

    no_decay = System.no_decay | {"P"}
    in_float32 = no_decay
    flops_per_pair = 22

    def __init__(self, channels: int, config: SystemConfig) -> None:
        super().__init__(channels, config)
        self.P = nn.Parameter(torch.empty_like(self.B))

    def forward(
        self,
        u: Float[Tensor, "b l d"],
        state: Float[Tensor, "seqs d n 2"],
        packing: Packing | None,
        delta_t: Float[Tensor, "b l"] | None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "seqs d n 2"]]:
        P, B, C = (as_complex(m) for m in (self.P, self.B, self.C))
        y, after = lti_dplr(
            u, self.A, P, B, C, self.dt, torch.view_as_complex(state),
            delta_t=delta_t, mode=self.config.mode, packing=packing,
        )  # fmt: skip
        return y, torch.view_as_real(after)

    def step_(
        self,
        u: Float[Tensor, "b d"],
        state: Float[Tensor, "slots d n 2"],
        slots: Slots,
        delta_t: Float[Tensor, " b"] | None,
    ) -> Float[Tensor, "b d"]:
        P, B, C = (as_complex(m) for m in (self.P, self.B, self.C))
        return lti_dplr_step_(u, self.A, P, B, C, self.dt, torch.view_as_complex(state), slots, delta_t=delta_t)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        A, P, B = hippo_dplr(self.config.d_state)
        self.init_dynamics_(A, B, generator)
        self.P.copy_(torch.view_as_real(P))


class S4(TimeInvariant):
    """A layer around a normal-plus-low-rank system per channel."""

    Config = S4Config

    def __init__(self, d_model: int, config: S4Config) -> None:
        super().__init__(d_model, config, DPLRSystem(d_model, config))
