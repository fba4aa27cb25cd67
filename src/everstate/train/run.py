"""A training run between two steps: everything that a step changes, and the step."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from everstate.core.device import device_named
from everstate.core.dtypes import dtype_named
from everstate.core.errors import ConfigError
from everstate.core.state import map_state, named_tensors
from everstate.data import Batch, Documents, Loader
from everstate.models import LM
from everstate.tokenizers import Tokenizer, fingerprint
from everstate.train.checkpoint import Checkpoint
from everstate.train.config import TrainRecipe
from everstate.train.lanes import Lanes
from everstate.train.optim import adamw, optimizer_tensors, restore_optimizer_


class Run:
    """A model, its optimizer, and their place in the data.

    step: optimizer steps done.
    tokens: read since the beginning.
    seconds: of all sessions.
    sums: loss and norm of the gradient, summed over the `summed` steps since the last line of metrics.
    """

    def __init__(self, recipe: TrainRecipe, tokenizer: Tokenizer, documents: Documents) -> None:
        settings, data = recipe.train, recipe.data
        self.recipe, self.tokenizer, self.out = recipe, tokenizer, Path(settings.out)
        self.model = LM(
            recipe.model_config_for(tokenizer.vocab_size), seed=settings.seed, dtype=dtype_named(settings.dtype),
            device=device_named(settings.device, "train.device"),
        )  # fmt: skip
        if not self.model.causal:
            raise ConfigError(
                f"model.layout = {self.model.config.layout!r} has a block that sees the whole text, and so "
                "what it must predict; take the bidirectional blocks out"
            )
        self.optimizer = adamw(
            self.model, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        parts = data.parts or max(math.ceil(data.lanes / len(documents)), 1)
        self.loader = Loader(
            documents, tokenizer, lanes=data.lanes, seq_len=data.seq_len, seed=settings.seed, parts=parts
        )
        self.lanes = Lanes(self.model, data.lanes, passing=settings.state_passing)
        self.step = self.tokens = self.summed = 0
        self.seconds = 0.0
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.model.device)

    def step_(self, lr: float) -> None:
        """One step of the optimizer over `accumulate` batches, each beginning where the one before ended."""
        settings = self.recipe.train
        batches = [next(self.loader).to(self.model.device) for _ in range(settings.accumulate)]
        count = sum(batch.targets.numel() for batch in batches)
        losses = [self._backward(batch, count) for batch in batches]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if settings.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), settings.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.tokens, self.summed = self.step + 1, self.tokens + count, self.summed + 1
        self.sums += torch.stack([torch.stack(losses).sum(), norm.to(losses[0].dtype)])

    def _backward(self, batch: Batch, count: int) -> Tensor:
        """Add the gradient of one batch's share of the mean loss; return that share."""
        share = self.lanes.read_(batch) / count
        share.backward()
        return share.detach()

    def checkpoint(self, metrics_position: int) -> Checkpoint:
        """All of it, to be written; shares memory with the run."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(self.model, self.optimizer).items()}
        tensors |= {f"carry.{name}": t for name, t in named_tensors(self.lanes.carry)}
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "summed": self.summed,
            "loader": self.loader.state_dict(),
            "tokenizer": fingerprint(self.tokenizer),
            "metrics": metrics_position,
        }
        return Checkpoint(self.recipe, {**tensors, "sums": self.sums}, values)

    def restore_(self, checkpoint: Checkpoint) -> None:
        """Become the run of `checkpoint`. Raises `ConfigError` or `DataError` for another tokenizer or corpus."""
        values = checkpoint.values
        if values["tokenizer"] != fingerprint(self.tokenizer):
            raise ConfigError(
                f"data.tokenizer = {self.recipe.data.tokenizer!r} is not the tokenizer that the run began with; "
                "give that one, or begin a new run in another train.out"
            )
        self.loader.load_state_dict(values["loader"])
        self.model.load_state_dict(checkpoint.part("model"))
        restore_optimizer_(self.model, self.optimizer, checkpoint.part("optimizer"))
        saved = iter([checkpoint.part("carry")[name] for name, _ in named_tensors(self.lanes.carry)])
        self.lanes.carry = map_state(lambda t: next(saved).to(t.device), self.lanes.carry)
        self.step, self.tokens, self.summed = values["step"], values["tokens"], values["summed"]
        self.seconds, self.sums = values["seconds"], checkpoint.tensors["sums"].to(self.sums.device)
