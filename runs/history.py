"""The training history of a step, for reports during and after training.

``history_<step>.jsonl`` has one JSON object per line: the iteration at which training starts or resumes
(``{"begin": iteration}``), an ``Entry`` per print interval, a ``Validation``. Lines are appended at once, so
that an unfinished run can be reported and a killed run loses at most one line.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runs.files import HISTORY, step_file
from utils.lazy import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """Training metrics of a print interval.

    Attributes:
        iteration: batches done in this step.
        epoch: current epoch, from 1.
        seconds: wall time of the step so far, without the time between the starts of an interrupted step.
        images_per_second: images trained on all processes since the previous entry; None if unknown.
        lr: learning rate of the first parameter group.
        memory: peak memory of this process in MiB, see ``peak_memory``; None if unknown.
        losses: mean of every loss term since the previous entry, by name.
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
    """The content of ``history_<step>.jsonl``, in order of iterations."""

    entries: list[Entry] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Wall time of the latest entry or validation; 0 if there is none."""
        lines: list[Entry | Validation] = [*self.entries, *self.validations]
        return max((line.seconds for line in lines), default=0.0)

    def discard_after(self, iteration: int) -> None:
        """Discard everything after an iteration, which a resumed step repeats."""
        self.entries = [entry for entry in self.entries if entry.iteration <= iteration]
        self.validations = [each for each in self.validations if each.iteration <= iteration]


class HistoryWriter:
    """Appends to ``<run_dir>/history_<step>.jsonl``.

    If the file cannot be written, one warning is logged and nothing more is written.

    Args:
        run_dir: folder of the run.
        step: number of the step.
        enabled: whether to write; True on rank 0 only.
        iteration: batches done before, if the step is resumed.
        images: images per iteration, of all processes together.
        device: whose memory is measured.
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
        self._enabled = enabled
        before = 0.0
        if enabled:
            history = read_history(self._path)
            history.discard_after(iteration)
            before = history.seconds
            self._append({"begin": iteration})
        self._start = time.perf_counter() - before
        self._lap = time.perf_counter()

    def lap(self) -> None:
        """Restart the clock of the images per second, e.g. after a validation."""
        self._lap = time.perf_counter()

    def progress(self, iteration: int, epoch: int, losses: Mapping[str, float], lr: float) -> Entry:
        """Write an entry and return it."""
        now = time.perf_counter()
        images = (iteration - self._iteration) * self._images
        speed = images / (now - self._lap) if images > 0 and now > self._lap else None
        entry = Entry(iteration, epoch, now - self._start, speed, lr, peak_memory(self._device), dict(losses))
        self._iteration, self._lap = iteration, now
        self._append(asdict(entry))
        return entry

    def validation(self, epoch: int, miou: float) -> None:
        """Write a validation's mIoU, a fraction; NaN is skipped."""
        if not math.isnan(miou):
            seconds = time.perf_counter() - self._start
            self._append(asdict(Validation(self._iteration, epoch, seconds, miou)))

    def _append(self, content: Mapping[str, Any]) -> None:
        """Append a line, on a line of its own even if a kill cut the last one."""
        if not self._enabled:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                file.seek(max(file.tell() - 1, 0))
                cut = file.read() not in (b"", b"\n")
                file.write(("\n" * cut + json.dumps(content) + "\n").encode())
        except OSError as error:
            self._enabled = False
            _log.warning("%s cannot be written (%s); continuing without it", self._path, error.strerror)


def read_history(path: Path) -> StepHistory:
    """Read the history of a step; empty if there is no readable file.

    Truncated and unknown lines are left out, with a warning. If a step was resumed, lines that the resumed
    run repeats are discarded.
    """
    history, left_out = StepHistory(), list[int]()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return history
    for number, line in enumerate(lines, 1):
        try:
            _add(history, json.loads(line))
        except (ValueError, TypeError, KeyError):  # truncated by a kill or a full disk
            left_out.append(number)
    if left_out:
        _log.warning(
            "%s: %d lines cannot be read (the first: %d) and are left out", path, len(left_out), left_out[0]
        )
    return history


def _add(history: StepHistory, content: dict[str, Any]) -> None:
    if "begin" in content:
        history.discard_after(int(content["begin"]))
    elif "miou" in content:
        history.validations.append(Validation(**content))
    else:
        entry = Entry(**content)
        history.entries = [earlier for earlier in history.entries if earlier.iteration < entry.iteration]
        history.entries.append(entry)


def peak_memory(device: torch.device) -> float | None:
    """Peak memory of this process in MiB: of tensors on CUDA, of the whole process on the CPU.

    None on Windows without CUDA.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10  # bytes on macOS, KiB on Linux
