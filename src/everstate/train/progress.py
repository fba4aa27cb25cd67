"""How a run shows itself while it goes on: a live bar in a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from everstate.train.metrics import Metrics


class Watch(ABC):
    """What `train` tells while it runs."""

    @abstractmethod
    def say(self, sentence: str) -> None:
        """What happens now: reading, resuming, saving."""

    @abstractmethod
    def show(self, metrics: Metrics, done: float, seconds_left: float) -> None:
        """A new line of metrics, the part of the run that is done, and how long the rest will take."""


class Silent(Watch):
    """Shows nothing."""

    def say(self, sentence: str) -> None:
        """Nothing."""

    def show(self, metrics: Metrics, done: float, seconds_left: float) -> None:
        """Nothing."""


class JsonLines(Watch):
    """Prints each line of metrics as it stands in the file."""

    def say(self, sentence: str) -> None:
        """Nothing: the output is for programs."""

    def show(self, metrics: Metrics, done: float, seconds_left: float) -> None:
        """One JSON object."""
        print(metrics.line(), flush=True)


class Lines(Watch):
    """One line of text every `seconds`, and at each evaluation."""

    def __init__(self, console: Console, *, seconds: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._seconds, self._clock = console, seconds, clock
        self._next = clock()

    def say(self, sentence: str) -> None:
        """The sentence."""
        self._console.print(sentence, highlight=False, markup=False)

    def show(self, metrics: Metrics, done: float, seconds_left: float) -> None:
        """The figures, if it is time again."""
        if metrics.bpb is None and done < 1 and self._clock() < self._next:
            return
        self._next = self._clock() + self._seconds
        bpb = "" if metrics.bpb is None else f"  held-out {metrics.bpb:.3f} bits/byte"
        self._console.print(
            f"{done:4.0%}  step {metrics.step}  loss {metrics.loss:.3f}{bpb}  "
            f"{metrics.tokens_per_s:,.0f} tokens/s  {duration(seconds_left)} left",
            highlight=False,
            markup=False,
        )


class Bar(Watch):
    """A live bar; use it as a context manager around `train`."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=1.0, figures="")
        self._bpb: float | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, sentence: str) -> None:
        """The sentence, above the bar."""
        self._progress.console.print(sentence, highlight=False, markup=False)

    def show(self, metrics: Metrics, done: float, seconds_left: float) -> None:
        """The figures, behind the bar."""
        self._bpb = self._bpb if metrics.bpb is None else metrics.bpb
        bpb = "" if self._bpb is None else f"held-out {self._bpb:.2f} bits/byte · "
        figures = f"loss {metrics.loss:.2f} · {bpb}{metrics.tokens_per_s:,.0f} tokens/s · {duration(seconds_left)} left"
        self._progress.update(self._task, completed=done, figures=figures)


def duration(seconds: float) -> str:
    """As a clock shows it: `0:45`, `12:05`, `3:20:00`."""
    whole = max(round(seconds), 0)
    clock = f"{whole // 60 % 60}:{whole % 60:02}"
    return clock if whole < 3600 else f"{whole // 3600}:{clock.rjust(5, '0')}"
