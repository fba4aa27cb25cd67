"""Training from a recipe: steps, metrics, evaluations and checkpoints, until the end or an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from everstate.checkpoints import save
from everstate.core.env import cpu_threads
from everstate.core.errors import TrainingError
from everstate.data import Documents
from everstate.models import LM
from everstate.tokenizers import Tokenizer
from everstate.train.checkpoint import Checkpoint, refuse_another, refuse_foreign, sweep
from everstate.train.config import TrainRecipe
from everstate.train.corpus import open_corpus, open_tokenizer, tokens_per_epoch
from everstate.train.evaluate import HeldOut
from everstate.train.interrupt import interruptible
from everstate.train.metrics import Metrics, MetricsFile
from everstate.train.progress import Silent, Watch
from everstate.train.run import Run
from everstate.train.schedule import learning_rate

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What came of a call of `train`.

    finished: whether a limit of the recipe was reached; otherwise the run was interrupted and saved.
    metrics: the last line, None if this call wrote none.
    """

    model: LM
    tokenizer: Tokenizer
    step: int
    finished: bool
    metrics: Metrics | None


def train(
    recipe: TrainRecipe,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Train the model of a recipe, or with `resume` go on with the run in its folder `train.out`.

    The folder gets `metrics.jsonl`, the training file, and the model as `everstate.save` writes it. The first Ctrl-C or
    SIGTERM ends the call after the step that it meets, with everything saved. On one CPU a resumed run computes what it
    would have computed uninterrupted, to the bit, unless it is limited by `minutes`.

    Raises `ConfigError` for a recipe that cannot be run or is not that of the run to resume, `CheckpointError` for a
    folder with something else in it, `DataError` for text that cannot be read, `TrainingError` when the loss is no
    number; the checkpoint before that is then unchanged.
    """
    watch = watch or Silent()
    saved = admit(recipe, resume)
    with threads(recipe.train.threads or cpu_threads()):
        watch.say("reading the corpus")
        tokenizer = open_tokenizer(recipe.data)
        documents, held_out = open_corpus(recipe.data)
        run = Run(recipe, tokenizer, documents)
        written = begin_(run, saved, watch)
        loop = Loop(run, step_limit(recipe, documents, tokenizer), held_out, watch, clock)
        with interruptible() as interrupted, closing(MetricsFile(run.out / METRICS, written)) as file:
            finished = loop.run_(file, interrupted)
    return Outcome(run.model, tokenizer, run.step, finished, loop.metrics)


def admit(recipe: TrainRecipe, resume: bool) -> Checkpoint | None:
    """The checkpoint to resume, or None in a folder where a new run may begin; an error in any other."""
    out = Path(recipe.train.out)
    if not resume:
        refuse_foreign(out)
        return None
    saved = Checkpoint.read(out)
    refuse_another(recipe, saved.recipe, out)
    return saved


def begin_(run: Run, saved: Checkpoint | None, watch: Watch) -> int:
    """Commit a new run, or bring it where it was saved; the bytes of metrics that the checkpoint knows.

    The first commit is before the first step: a disk that refuses shows now, and whatever kills the process later
    leaves a folder that is known to be ours.
    """
    if saved is None:
        run.checkpoint(metrics_position=0).write(run.out)
    else:
        sweep(run.out)
        run.restore_(saved)
        changes = run.recipe.differences(saved.recipe).items()
        watch.say(f"resumed at step {run.step}" + "".join(f", {key} = {change}" for key, change in changes))
    save(run.model, run.tokenizer, run.out)
    return 0 if saved is None else int(saved.values["metrics"])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_limit(recipe: TrainRecipe, documents: Documents, tokenizer: Tokenizer) -> float:
    """The first of the limits that can be counted in steps; infinity if there is none."""
    train, data = recipe.train, recipe.data
    per_step = train.accumulate * data.lanes * data.seq_len
    limits = [math.inf if train.steps is None else train.steps]
    if train.tokens is not None:
        limits.append(math.ceil(train.tokens / per_step))
    if train.epochs is not None:
        limits.append(math.ceil(train.epochs * tokens_per_epoch(documents, tokenizer) / per_step))
    return float(min(limits))


class Loop:
    """The loop around `Run.step_`: the clock, the learning rate, and what is due after a step.

    steps: where the run ends, if it does not end by the clock.
    """

    def __init__(
        self, run: Run, steps: float, held_out: Documents | None, watch: Watch, clock: Callable[[], float]
    ) -> None:
        self._run, self._settings, self._steps = run, run.recipe.train, steps
        self._watch, self._clock = watch, clock
        self._held_out = None
        if held_out is not None:
            self._held_out = HeldOut(
                held_out, run.tokenizer, run.recipe.data,
                passing=self._settings.state_passing, limit=self._settings.eval_bytes,
            )  # fmt: skip
        self._time_limit = math.inf if self._settings.minutes is None else 60 * self._settings.minutes
        self._done_before, self._seconds_before = self._done(), run.seconds
        self._started = self._mark = clock()
        self._marked_tokens, self._saved_step = run.tokens, run.step
        self.metrics: Metrics | None = None

    def run_(self, file: MetricsFile, interrupted: Callable[[], bool]) -> bool:
        """Steps until the end (True) or an interruption (False); saved in both cases."""
        run, settings = self._run, self._settings
        finished, begun = self._done() >= 1, run.step
        if finished and run.summed:  # it died in its last evaluation
            self._log(file, self._rate(run.step - 1), evaluate=True)
            self._save(file)
        while not finished and not interrupted():
            rate = self._rate(run.step)
            run.step_(rate)
            run.seconds = self._seconds_before + self._clock() - self._started
            finished = self._done() >= 1
            evaluate = finished or due(run.step, settings.eval_every)
            if finished:  # so that an evaluation that fails costs nothing
                self._save(file)
            if evaluate or due(run.step, settings.log_every):
                self._log(file, rate, evaluate)
            if due(run.step, settings.save_every):
                self._save(file)
        if run.step > begun:
            self._save(file)
        return finished

    def _done(self) -> float:
        """The part of the run that is done: 1 or more at its end."""
        return max(self._run.step / self._steps, self._run.seconds / self._time_limit)

    def _rate(self, step: int) -> float:
        """The learning rate of a step; how many steps the time limit allows is judged by those done."""
        run, settings = self._run, self._settings
        by_clock = run.step * self._time_limit / run.seconds if run.seconds else math.inf
        return learning_rate(
            step, min(self._steps, by_clock), lr=settings.lr, min_lr=settings.min_lr, warmup=settings.warmup,
            decay=settings.decay, cooldown=settings.cooldown,
        )  # fmt: skip

    def _log(self, file: MetricsFile, rate: float, evaluate: bool) -> None:
        """Write and show the means since the last line."""
        run = self._run
        loss, norm = self._means()
        speed = (run.tokens - self._marked_tokens) / max(self._clock() - self._mark, 1e-9)
        bpb = None
        if evaluate and self._held_out is not None:
            bpb = self._held_out.bits_per_byte(run.model)
        self.metrics = Metrics(run.step, loss, bpb, rate, norm, run.tokens, speed, run.seconds)
        file.write(self.metrics)
        run.sums.zero_()
        run.summed = 0
        self._mark, self._marked_tokens = self._clock(), run.tokens
        done = min(self._done(), 1.0)
        per_part = (run.seconds - self._seconds_before) / max(done - self._done_before, 1e-9)
        self._watch.show(self.metrics, done, per_part * (1 - done))

    def _save(self, file: MetricsFile) -> None:
        """Commit the run, then copy the model for readers."""
        begun, run = self._clock(), self._run
        if run.summed:
            self._means()
        run.checkpoint(file.commit()).write(run.out)
        save(run.model, run.tokenizer, run.out)
        self._saved_step = run.step
        self._mark += self._clock() - begun

    def _means(self) -> tuple[float, float]:
        """Loss and norm of the gradient. Raises `TrainingError` if they are no numbers: the weights are none either."""
        run = self._run
        loss, norm = (run.sums / run.summed).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"at step {run.step} the loss is {loss} and the norm of the gradient {norm}; lower train.lr "
                f"(now {self._settings.lr}) or train.clip, or raise train.warmup. The checkpoint of step "
                f"{self._saved_step} in {self._settings.out} is unchanged and can be resumed"
            )
        return loss, norm


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0
