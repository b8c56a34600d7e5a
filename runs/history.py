"""The history of a step's training, for reports while it runs and later.

``history_<step>.jsonl`` holds one JSON object per line: where training starts or resumes
(``{"begin": iteration}``), an ``Entry`` at every print interval, and a validation's mIoU. Lines are appended
as they happen, so that a run under way can be reported, and one that is killed loses one line at most.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from runs.files import HISTORY, step_file

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One point of a step's history.

    Attributes:
        iteration: batches done in this step.
        epoch: the epoch under way, from 1.
        seconds: wall time of the step so far, without the time between two runs of an interrupted step.
        images_per_second: trained images, of all processes, since the last point; None where unknown.
        lr: learning rate of the first parameter group.
        memory: peak memory of this process in MiB, see ``peak_memory``; None where unknown.
        losses: mean of every loss term since the last point, by name.
    """

    iteration: int
    epoch: int
    seconds: float
    images_per_second: float | None
    lr: float
    memory: float | None
    losses: dict[str, float]


@dataclass(frozen=True)
class Validation:
    """A validation's result; ``miou`` is a fraction, ``epoch`` counts from 1."""

    iteration: int
    epoch: int
    seconds: float
    miou: float


@dataclass
class StepHistory:
    """All that ``history_<step>.jsonl`` says, in order of the iterations."""

    entries: list[Entry] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Wall time at the last point; 0 where there is none."""
        points: list[Entry | Validation] = [*self.entries, *self.validations]
        return max((point.seconds for point in points), default=0.0)

    def discard_after(self, iteration: int) -> None:
        """Drop every point beyond an iteration: a resumed step does it again."""
        self.entries = [point for point in self.entries if point.iteration <= iteration]
        self.validations = [point for point in self.validations if point.iteration <= iteration]


class HistoryWriter:
    """Appends the history of a step to ``<run_dir>/history_<step>.jsonl``.

    A file that cannot be written is told once, and the run goes on without it.

    Args:
        run_dir: folder of the run.
        step: number of the step.
        enabled: whether to write, True on rank 0; elsewhere the same calls write nothing.
        iteration: batches that were done before, where a step goes on.
        images: per iteration, of all processes together.
        device: whose memory counts.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        enabled: bool = True,
        *,
        iteration: int = 0,
        images: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._path = step_file(run_dir, HISTORY, step)
        self._images = images
        self._device = device or torch.device("cpu")
        self._iteration = iteration
        self._file: TextIO | None = None
        before = 0.0
        if enabled:
            history = read_history(self._path)
            history.discard_after(iteration)
            before = history.seconds
            self._file = self._open()
            self._append({"begin": iteration})
        self._start = time.perf_counter() - before
        self._lap = time.perf_counter()

    def _open(self) -> TextIO | None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = self._path.read_bytes() if self._path.is_file() else b""
            torn = bool(content) and not content.endswith(b"\n")
            file = self._path.open("a", encoding="utf-8", buffering=1)
            if torn:
                file.write("\n")
            return file
        except OSError as error:
            self._give_up(error)
            return None

    def lap(self) -> None:
        """Training goes on now: what came before (an evaluation) does not count for the images per second."""
        self._lap = time.perf_counter()

    def progress(self, iteration: int, epoch: int, losses: Mapping[str, float], lr: float) -> Entry:
        """Write a point of the history and return it.

        Args:
            iteration: batches done in this step.
            epoch: the epoch under way, from 1.
            losses: mean of every term since the last point.
            lr: learning rate.
        """
        now = time.perf_counter()
        images = (iteration - self._iteration) * self._images
        speed = images / (now - self._lap) if images > 0 and now > self._lap else None
        entry = Entry(iteration, epoch, now - self._start, speed, lr, peak_memory(self._device), dict(losses))
        self._iteration, self._lap = iteration, now
        self._append(asdict(entry))
        return entry

    def validation(self, epoch: int, miou: float) -> None:
        """Write a validation's mIoU, a fraction; NaN is left out."""
        if not math.isnan(miou):
            seconds = time.perf_counter() - self._start
            self._append(asdict(Validation(self._iteration, epoch, seconds, miou)))

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _append(self, content: Mapping[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(content) + "\n")
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # what is left in its buffer fails as the write did
                file.close()
        _log.warning("%s cannot be written (%s); the run goes on without it", self._path, error.strerror)


def read_history(path: Path) -> StepHistory:
    """The history of a step; empty where there is no file.

    Lines that are torn or of another kind are passed over. Where a step went on from an earlier
    iteration, only the later run's points count.
    """
    history = StepHistory()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not there, or not readable: a report shows what there is
        return history
    for line in lines:
        try:
            _add(history, json.loads(line))
        except (ValueError, TypeError, KeyError):  # torn by a kill or a full disk
            continue
    return history


def _add(history: StepHistory, content: dict[str, Any]) -> None:
    if "begin" in content:
        history.discard_after(int(content["begin"]))
    elif "miou" in content:
        history.validations.append(Validation(**content))
    else:
        entry = Entry(**content)
        history.entries = [point for point in history.entries if point.iteration < entry.iteration]
        history.entries.append(entry)


def peak_memory(device: torch.device) -> float | None:
    """Most memory that this process has held, in MiB: tensors on CUDA, the whole process on the processor.

    None on Windows without CUDA, which has no such count.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10  # bytes there, KiB on Linux
