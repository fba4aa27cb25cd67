"""What a run measures, and the file that keeps it: one JSON object per line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from everstate.core.errors import CheckpointError


@dataclass(frozen=True)
class Metrics:
    """One line of `metrics.jsonl`: means over the steps since the line before, except where it says otherwise.

    step: optimizer steps done.
    loss: nats per token, on the training text.
    bpb: bits per byte on the held-out text after this step; None where it was not evaluated.
    lr: of this step.
    grad_norm: norm of the whole gradient before it is clipped.
    tokens: read since the beginning of the run.
    tokens_per_s: without the time of evaluations and saves.
    seconds: since the beginning of the run, all its sessions together.
    """

    step: int
    loss: float
    bpb: float | None
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    seconds: float

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps({k: round(v, 6) if k in _CLOCKED else v for k, v in asdict(self).items()})


_CLOCKED = ("tokens_per_s", "seconds")


class MetricsFile:
    """Appends lines to a file, behind the first `position` bytes of what is there: those that the checkpoint knows."""

    def __init__(self, path: Path, position: int) -> None:
        try:
            self._file = path.open("ab")
            self._file.truncate(min(position, path.stat().st_size))
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}; check its folder and permissions") from None

    def write(self, metrics: Metrics) -> None:
        """Append one line, visible to readers at once."""
        self._file.write(metrics.line().encode() + b"\n")
        self._file.flush()

    def commit(self) -> int:
        """Let all lines reach the disk; the position behind the last of them."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
