"""Truncated backpropagation: the loss of a segment, and the states that go on to the next."""

from __future__ import annotations

from torch import Tensor

from everstate.core.errors import RequestError, TrainingError
from everstate.core.state import detach
from everstate.data import Batch
from everstate.mixers import State
from everstate.models import LM
from everstate.ops import linear_cross_entropy


def segment_loss(model: LM, batch: Batch, state: State) -> tuple[Tensor, State]:
    """The losses of all targets of a batch, summed, in nats, and the states after it. Pure; never makes all logits."""
    hidden, after = model.hidden(batch.tokens, state, batch.packing)
    softcap = model.config.logit_softcap
    loss = linear_cross_entropy(hidden, model.head_weight, batch.targets, softcap=softcap, reduction="sum")
    return loss, after


class Lanes:
    """The states that a model's lanes carry from one batch to the next.

    passing: whether they are carried; otherwise every packed sequence begins with a fresh state, and attention, which
    is then never asked for what lies before, keeps nothing.
    """

    def __init__(self, model: LM, count: int, *, passing: bool) -> None:
        self._model, self._passing = model, passing
        self._context = None if passing else 0
        self.carry = model.init_state(count, context=self._context)

    def read_(self, batch: Batch) -> Tensor:
        """The summed losses of the next batch. No gradient flows back into the batches before it.

        Raises `TrainingError` when attention is asked for what it keeps no longer.
        """
        state = self._model.init_state(len(batch.packing), context=self._context)
        if self._passing:
            state = batch.first_states(self.carry, state)
        try:
            loss, after = segment_loss(self._model, batch, state)
        except RequestError as error:
            raise TrainingError(
                f"{error}. In a recipe: give the attention a window or a larger context, or set "
                "train.state_passing = false"
            ) from None
        if self._passing:
            self.carry = detach(batch.last_states(after))
        return loss
