"""The same weights in the layers of `mamba_ssm`, where it is installed, stacked as its own models stack them.

Its layers need its Triton kernels only. Without the package `causal_conv1d` they convolve as PyTorch does, which the
name of the peer then says.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everstate.mixers.mamba2 import Mamba2
from everstate.mixers.mamba3 import Mamba3
from everstate.mixers.mlp import MLP
from everstate.models import LM

KINDS = ("mamba2", "mamba3")


class SSMPeer(nn.Module):
    """A model of `mamba_ssm` layers with the weights of ours, in `dtype`. `unavailable` says whether it can be made."""

    def __init__(self, model: LM, dtype: torch.dtype) -> None:
        super().__init__()
        layers = model.layers
        mixers = [block for block in layers if not isinstance(block.mixer, MLP)]
        mlp = layers[1].mixer if len(mixers) < len(layers) else None
        place: dict[str, Any] = {"device": model.device, "dtype": dtype}
        block = _block(layers[0].mixer, mlp if isinstance(mlp, MLP) else None, model.config.norm_eps, place)
        self.embedding = nn.Embedding(model.config.vocab_size, model.config.d_model, **place)
        self.layers = nn.ModuleList(block(model.config.d_model, layer) for layer in range(len(mixers)))
        self.norm_f = _norm()(model.config.d_model, eps=model.config.norm_eps, **place)
        self._copy_(model)

    def forward(self, tokens: Int[Tensor, "b l"], inference_params: Any = None) -> Float[Tensor, "b l d"]:
        """What `LM.hidden` computes; `inference_params` hold the states of the layers, if these are to step."""
        from mamba_ssm.ops.triton.layer_norm import layer_norm_fn

        x, residual = self.embedding(tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual, inference_params=inference_params)
        return cast(
            Tensor,
            layer_norm_fn(
                x, self.norm_f.weight, None, residual=residual, eps=self.norm_f.eps, prenorm=False,
                residual_in_fp32=True, is_rms_norm=True,
            ),
        )  # fmt: skip

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """What `LM.logits` computes."""
        return nn.functional.linear(hidden, self.embedding.weight)

    @torch.no_grad()
    def _copy_(self, model: LM) -> None:
        own, given = dict(self.named_parameters()), dict(model.named_parameters())
        step = len(model.layers) // len(self.layers)
        for name, given_value in given.items():
            value, parts = given_value.detach(), name.split(".")
            if parts[0] == "norm":
                theirs = "norm_f.weight"
            elif parts[0] == "blocks":
                at, is_mlp = int(parts[1]) // step, int(parts[1]) % step == 1
                theirs = f"layers.{at}.{_renamed('.'.join(parts[2:]), is_mlp)}"
            else:
                theirs = name
            if theirs.endswith("fc1.weight"):
                value = torch.cat(value.chunk(2)[::-1])  # [up | gate] there
            own.pop(theirs).copy_(value.view(-1, 1, value.shape[-1]) if theirs.endswith("conv1d.weight") else value)
        assert not own, f"the peer has {sorted(own)}, and ours has not"


def name_of(kind: str) -> str:
    """The peer, and what its layers lack here."""
    return "mamba_ssm" if kind != "mamba2" or _fast_convolution() else "mamba_ssm, slow conv1d"


def unavailable(kind: str) -> str | None:
    """Why there is no such peer here, or None."""
    if kind not in KINDS:
        return f"mamba_ssm has no peer of {kind} here"
    try:
        from mamba_ssm.modules.block import Block  # noqa: F401
        from mamba_ssm.modules.mamba2 import Mamba2 as Peer2  # noqa: F401
        from mamba_ssm.modules.mamba3 import Mamba3 as Peer3  # noqa: F401
    except ImportError as error:
        return f"mamba_ssm is not installed, or not whole ({error})"
    return None


def _renamed(name: str, is_mlp: bool) -> str:
    """A parameter of our block as that of theirs."""
    for ours, theirs in (("mixer.conv_weight", "mixer.conv1d.weight"), ("mixer.conv_bias", "mixer.conv1d.bias")):
        name = name.replace(ours, theirs)
    if not is_mlp:
        return name
    return {"norm.weight": "norm2.weight", "mixer.in_proj.weight": "mlp.fc1.weight"}.get(name, "mlp.fc2.weight")


def _block(mixer: Any, mlp: MLP | None, eps: float, place: dict[str, Any]) -> Any:
    """A function of width and number that makes a block like ours."""
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mlp import GatedMLP

    hidden = None if mlp is None else mlp.out_proj.in_features
    mlp_class = nn.Identity if mlp is None else partial(GatedMLP, hidden_features=hidden, multiple_of=8, **place)

    def make(width: int, layer: int) -> nn.Module:
        return cast(
            nn.Module,
            Block(
                width, _mixer(mixer, layer, place), mlp_class, norm_cls=partial(_norm(), eps=eps, **place),
                fused_add_norm=True, residual_in_fp32=True,
            ),
        )  # fmt: skip

    return make


def _mixer(ours: Any, layer: int, place: dict[str, Any]) -> Any:
    from mamba_ssm.modules.mamba2 import Mamba2 as Peer2
    from mamba_ssm.modules.mamba3 import Mamba3 as Peer3

    config = ours.config
    sizes = {"d_state": config.d_state, "headdim": config.headdim, "ngroups": config.ngroups, "layer_idx": layer}
    if isinstance(ours, Mamba2):
        return partial(Peer2, **sizes, use_mem_eff_path=_fast_convolution(), **place)
    assert isinstance(ours, Mamba3)
    return partial(Peer3, **sizes, rope_fraction=config.rope_fraction, **place)


def _norm() -> Any:
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    return RMSNorm


def _fast_convolution() -> bool:
    try:
        import causal_conv1d  # noqa: F401
    except ImportError:
        return False
    return True
