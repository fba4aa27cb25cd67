"""S5: one state space model for all channels, read by a parallel scan.

Source: Smith et al. 2023, "Simplified state space layers for sequence modeling" (arXiv 2208.04933).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from pydantic import PositiveInt
from torch import Tensor, nn

from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import Mixer, TimeSteps, divide
from everstate.mixers.hippo import hippo_eigen
from everstate.mixers.lti import OutputConfig, as_complex, conjugate_pairs, normal_, project
from everstate.mixers.modules import Linear, init_linear_, log_uniform
from everstate.ops import linear_scan, linear_step_
from everstate.ops.lti_diagonal.discretize import discretize


class S5Config(TimeSteps, OutputConfig):
    """Settings of one S5 layer."""

    title = "s5"

    d_state: PositiveInt = 64
    """Size of the state of the layer, in real numbers: d_state / 2 conjugate pairs."""
    blocks: PositiveInt = 1
    """The state starts as so many copies of a smaller HiPPO-N."""


class S5State(NamedTuple):
    """ssm: the state, one of each conjugate pair as (real, imaginary)."""

    ssm: Float[Tensor, "b n 2"]


class S5(Mixer):
    """`x[t] = exp(dt A) x[t-1] + (exp(dt A) - 1) / A B u[t]; y = out_proj(act(2 Re(C x) + D u))`.

    A is diagonal, B and C are full matrices, dt belongs to a state. Complex parameters are stored as in `lti.System`.
    """

    Config = S5Config
    no_decay = frozenset({"log_dt", "log_A_real", "A_imag", "B", "D"})
    in_float32 = frozenset({"log_dt", "log_A_real", "A_imag", "B"})

    def __init__(self, d_model: int, config: S5Config) -> None:
        super().__init__()
        self.config = config
        conjugate_pairs("s5: d_state / blocks", divide("d_state", config.d_state, "blocks", config.blocks))
        self.pairs = config.d_state // 2
        self.log_dt = nn.Parameter(torch.empty(self.pairs))
        self.log_A_real = nn.Parameter(torch.empty(self.pairs))
        self.A_imag = nn.Parameter(torch.empty(self.pairs))
        self.B = nn.Parameter(torch.empty(self.pairs, d_model, 2))
        self.C = nn.Parameter(torch.empty(d_model, self.pairs, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = Linear(d_model, (1 + config.glu) * d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        config, d_model = self.config, self.D.shape[0]
        A, vectors = hippo_eigen(config.d_state // config.blocks)
        self.log_dt.copy_(log_uniform((self.pairs,), config.dt_min, config.dt_max, generator).log())
        self.log_A_real.copy_((-A.real).log().repeat(config.blocks))
        self.A_imag.copy_(A.imag.repeat(config.blocks))
        # B and C are drawn in the coordinates of HiPPO-N and turned into those of its eigenvectors.
        basis = torch.block_diag(*[vectors] * config.blocks)
        B, C = torch.empty(config.d_state, d_model, dtype=torch.float64), torch.empty(d_model, config.d_state)
        normal_(B, d_model**-0.5, generator)
        normal_(C, config.d_state**-0.5, generator)
        self.B.copy_(torch.view_as_real(basis.mH @ B.to(basis.dtype)))
        self.C.copy_(torch.view_as_real(C.to(basis.dtype) @ basis))
        nn.init.ones_(self.D)
        init_linear_(self.out_proj, generator)

    def init_state(self, batch: int, *, context: int | None = None) -> S5State:
        return S5State(self.log_dt.new_zeros(batch, self.pairs, 2))

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: S5State,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], S5State]:
        a, b = self._enter(x, delta_t)
        h, after = linear_scan(a, b, torch.view_as_complex(state.ssm), packing=packing)
        return self._leave(h, x), S5State(torch.view_as_real(after))

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: S5State,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        a, b = self._enter(x, delta_t)
        return self._leave(linear_step_(a, b, torch.view_as_complex(state.ssm), slots), x)

    def flops_per_token(self, context: int) -> int:
        return 2 * (self.out_proj.weight.numel() + self.B.numel() + self.C.numel()) + 8 * self.pairs

    def _enter(
        self, u: Float[Tensor, "*b d"], delta_t: Float[Tensor, "*b"] | None
    ) -> tuple[Complex[Tensor, "*b n"], Complex[Tensor, "*b n"]]:
        """The decay of each state and what each token adds to it."""
        A, dt = torch.complex(-torch.exp(self.log_A_real), self.A_imag), torch.exp(self.log_dt)
        step = dt if delta_t is None else dt * delta_t.unsqueeze(-1)
        decay, gain = (m.squeeze(-1) for m in discretize(A.unsqueeze(-1), step, "zoh"))
        added = torch.view_as_complex(torch.einsum("...d,ndx->...nx", u.to(self.B.dtype), self.B))
        return decay.expand(added.shape), gain * added

    def _leave(self, h: Complex[Tensor, "*b n"], u: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """`2 Re(C h) + D u`, activation, output projection."""
        read = torch.view_as_real((2 * as_complex(self.C)).conj().resolve_conj())
        y = torch.einsum("...nx,dnx->...d", torch.view_as_real(h), read).to(u.dtype)
        return project(y + self.D * u, self.out_proj, self.config)
