"""The same weights in `transformers`: the peer that whole models are compared with, where it is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from everstate.bench.report import package_version
from everstate.mixers.mamba1 import Mamba1
from everstate.mixers.mamba2 import Mamba2
from everstate.models import LM

RENAMED = (
    ("embedding.", "backbone.embeddings."),
    ("blocks.", "backbone.layers."),
    ("conv_weight", "conv1d.weight"),
    ("conv_bias", "conv1d.bias"),
)
"""What our parameters are called there."""


class Peer:
    """A model of `transformers` that has the weights of ours. `available` says whether one can be made."""

    def __init__(self, model: LM) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        mixer = model.layers[0].mixer
        table: dict[str, Any] = {
            "vocab_size": model.config.vocab_size, "hidden_size": model.config.d_model,
            "num_hidden_layers": len(model.layers), "layer_norm_epsilon": model.config.norm_eps,
            "tie_word_embeddings": True, "use_cache": False,
        }  # fmt: skip
        with model.device:
            if isinstance(mixer, Mamba1):
                table |= {"state_size": mixer.config.d_state, "time_step_rank": mixer.dt_rank}
                peer: Any = transformers.MambaForCausalLM(transformers.MambaConfig(**table))
            else:
                assert isinstance(mixer, Mamba2)
                table |= {"state_size": mixer.config.d_state, "num_heads": mixer.nheads}
                table |= {"head_dim": mixer.config.headdim, "n_groups": mixer.config.ngroups}
                peer = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**table))
        peer.load_state_dict(_weights(model))
        self._model = peer.to(model.dtype).eval()

    @torch.no_grad()
    def hidden(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """What `LM.hidden` computes, as its head reads it: the residual stream is float32."""
        return cast(Tensor, self._model.backbone(tokens).last_hidden_state.to(self._model.dtype))

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """What `LM.forward` computes."""
        return cast(Tensor, self._model(tokens).logits)


PEER_NAME = f"transformers {package_version('transformers')}"


def name_with_kernels() -> str:
    """The peer, and whose kernels its layers call: those of packages that can be imported; all else is PyTorch."""
    found = [package for package in ("mamba_ssm", "causal_conv1d") if _imports(package)]
    return f"{PEER_NAME} with {' and '.join(found)}" if found else f"{PEER_NAME}, pure PyTorch"


def _imports(package: str) -> bool:
    try:
        import_module(package)
    except Exception:  # whatever it is, the peer then does without, too
        return False
    return True


def available(mixer: str) -> bool:
    """Whether `transformers` is installed and has a model of such layers."""
    return package_version("transformers") is not None and mixer in ("mamba1", "mamba2")


def _weights(model: LM) -> dict[str, Tensor]:
    """Our parameters by their names and in their shapes there."""
    weights = {}
    for ours, value in model.state_dict().items():
        name = ours
        for old, new in RENAMED:
            name = name.replace(old, new)
        if isinstance(model.layers[0].mixer, Mamba1):
            name = name.replace("dt_bias", "dt_proj.bias")
        if name == "norm.weight":
            name = "backbone.norm_f.weight"
        weights[name] = value.unsqueeze(1) if name.endswith("conv1d.weight") else value
    return {**weights, "lm_head.weight": model.head_weight}
