"""H3: two time-invariant systems and two products, which recall what stood where.

Source: Fu et al. 2023, "Hungry hungry hippos" (arXiv 2212.14052), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from everstate.core.packing import Packing
from everstate.core.state import Slots
from everstate.mixers.base import Mixer, divide
from everstate.mixers.modules import Linear, init_linear_, uniform_
from everstate.mixers.s4d import DiagonalConfig, DiagonalSystem
from everstate.ops import causal_conv1d, causal_conv1d_step_


class H3Config(DiagonalConfig):
    """Settings of one H3 layer."""

    title = "h3"

    headdim: PositiveInt = 8
    """Channels per head; the state of a head has headdim^2 entries of d_state numbers."""
    bias: bool = True


class H3State(NamedTuple):
    """shift: the last d_state - 1 keys; ssm: the diagonal system of each entry of each head's outer product."""

    shift: Float[Tensor, "b d k1"]
    ssm: Float[Tensor, "b e n 2"]


class H3(Mixer):
    """`y = q * SSM_diag(SSM_shift(k) (x) v)` per head, then `out_proj`.

    SSM_shift holds the last d_state keys and reads them by learned weights: a causal filter of d_state taps.
    SSM_diag is one S4D per head, run on every entry of the outer product.
    """

    Config = H3Config
    no_decay = frozenset({"D"})

    def __init__(self, d_model: int, config: H3Config) -> None:
        super().__init__()
        self.config = config
        self.nheads = divide("d_model", d_model, "headdim", config.headdim)
        self.in_proj = Linear(d_model, 3 * d_model, bias=config.bias)
        self.shift_weight = nn.Parameter(torch.empty(d_model, config.d_state))
        self.system = DiagonalSystem(self.nheads, config)
        self.D = nn.Parameter(torch.empty(self.nheads))
        self.out_proj = Linear(d_model, d_model, bias=config.bias)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> None:
        init_linear_(self.in_proj, generator)
        uniform_(self.shift_weight, self.config.d_state**-0.5, generator)
        self.system.init_(generator)
        nn.init.ones_(self.D)
        init_linear_(self.out_proj, generator)

    def init_state(self, batch: int, *, context: int | None = None) -> H3State:
        make, d_model = self.system.log_dt.new_zeros, self.out_proj.in_features
        return H3State(
            shift=make(batch, d_model, self.config.d_state - 1),
            ssm=make(batch, d_model * self.config.headdim, self.system.pairs, 2),
        )

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        state: H3State,
        packing: Packing | None = None,
        delta_t: Float[Tensor, "b l"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], H3State]:
        q, k, v = self.in_proj(x).chunk(3, -1)
        k, shift = causal_conv1d(k, self.shift_weight, None, state.shift, packing=packing)
        kv = self._outer(k, v)
        y, ssm = self.system(kv.flatten(-3), state.ssm, packing, delta_t)
        return self._finish(q, kv, y), H3State(shift, ssm)

    def step_(
        self,
        x: Float[Tensor, "b d"],
        state: H3State,
        slots: Slots = None,
        delta_t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        q, k, v = self.in_proj(x).chunk(3, -1)
        k = causal_conv1d_step_(k, self.shift_weight, None, state.shift, slots)
        kv = self._outer(k, v)
        return self._finish(q, kv, self.system.step_(kv.flatten(-3), state.ssm, slots, delta_t))

    def flops_per_token(self, context: int) -> int:
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.shift_weight.numel()
        entry = self.system.flops_per_pair * self.system.pairs + 5
        return 2 * weights + self.out_proj.in_features * self.config.headdim * entry

    def _outer(self, k: Float[Tensor, "*b d"], v: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h p q"]:
        """The outer product of key and value of each head."""
        heads = (self.nheads, self.config.headdim)
        return k.unflatten(-1, heads).unsqueeze(-1) * v.unflatten(-1, heads).unsqueeze(-2)

    def _finish(
        self, q: Float[Tensor, "*b d"], kv: Float[Tensor, "*b h p q"], y: Float[Tensor, "*b e"]
    ) -> Float[Tensor, "*b d"]:
        """Read each head's matrix with its query, and the last projection."""
        memory = y.unflatten(-1, kv.shape[-3:]) + self.D[:, None, None] * kv
        heads = q.unflatten(-1, memory.shape[-3:-1])
        out: Tensor = self.out_proj(torch.einsum("...hp,...hpq->...hq", heads, memory).flatten(-2))
        return out
