"""TensorBoard output of a run, and its copy on wandb."""

from __future__ import annotations

import errno
import logging
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from metrics.continual import Results
from runs.history import Entry
from session.wandb_mirror import Table, WandbBoard, WandbMirror
from utils.distributed import World
from utils.files import cannot_write
from utils.memory import SHARED_MEMORY_REMEDY, is_shared_memory_full
from utils.tables import markdown_table
from utils.visualize import Array

_log = logging.getLogger(__name__)


class _TensorBoard:
    """Event files of TensorBoard in a folder; see ``RunLogger``."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        try:
            # File names have a resolution of seconds: a second file would overwrite the first.
            suffix = f".{time.time_ns()}"
            self._writer: SummaryWriter | None = SummaryWriter(
                str(folder), purge_step=purge_step, filename_suffix=suffix
            )
        except OSError as error:
            # The writer's queue needs shared memory.
            full = error.errno == errno.ENOSPC and is_shared_memory_full()
            remedy = SHARED_MEMORY_REMEDY if full else "choose another --logdir"
            raise cannot_write(folder, error, f"{remedy}, or give --no_tensorboard") from error

    def _open(self) -> SummaryWriter | None:
        """The writer, or None if its thread has ended: this process would wait forever for its queue."""
        if self._writer is not None and not self._writer.file_writer.event_writer._worker.is_alive():
            _log.warning("TensorBoard's file can no longer be written; continuing without it")
            self._writer = None
        return self._writer

    def _add(self, kind: str, tag: str, value: Any, step: int, **words: Any) -> None:
        if (writer := self._open()) is not None:
            getattr(writer, f"add_{kind}")(tag, value, step, **words)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._add("scalar", tag, value, step)

    def image(self, tag: str, image: Any, step: int) -> None:
        self._add("image", tag, image, step, dataformats="HWC")

    def tables(self, tag: str, tables: Sequence[Table], step: int) -> None:
        self._add("text", tag, "\n\n".join(markdown_table(*table) for table in tables), step)

    def options(self, options: Mapping[str, Any]) -> None:
        rows = [[name, str(value)] for name, value in sorted(options.items())]
        self.tables("options", [(["option", "value"], rows)], 0)

    def close(self) -> None:
        if (writer := self._open()) is not None:
            try:
                writer.close()
            except OSError as error:
                _log.warning("TensorBoard's file is incomplete (%s)", error.strerror or error)
                events = writer.file_writer.event_writer
                events._worker.stop()
                events._closed = True  # else its exit hook tries again, with a traceback
            self._writer = None


class RunLogger:
    """Writes to TensorBoard and wandb on rank 0; elsewhere, or with neither, its methods do nothing.

    Args:
        world: this process.
        run_dir: folder of TensorBoard's event files, made if missing; its name is also wandb's for this part.
        enabled: False with ``--no_tensorboard``.
        purge_step: step at which the curves start or are resumed; TensorBoard hides points of earlier files
            from this step on. None: it shows all.
        mirror: the run of wandb, if any.
    """

    def __init__(
        self,
        world: World,
        run_dir: Path,
        enabled: bool = True,
        purge_step: int | None = None,
        mirror: WandbMirror | None = None,
    ) -> None:
        self._boards: list[_TensorBoard | WandbBoard] = []
        if enabled and world.is_main:
            self._boards.append(_TensorBoard(run_dir, purge_step))
        if mirror is not None:
            self._boards.append(mirror.board(run_dir.name))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of several curves, by tag; NaN is skipped."""
        known = {tag: value for tag, value in values.items() if not math.isnan(value)}
        for board in self._boards:
            board.scalars(known, step)

    def image(self, tag: str, image: Any, step: int) -> None:
        """An image, H×W×3, uint8."""
        for board in self._boards:
            board.image(tag, image, step)

    def progress(self, entry: Entry) -> None:
        """A point of a step's curves: every loss term by name, learning rate, speed, memory."""
        values: dict[str, float | None] = {f"loss/{name}": value for name, value in entry.losses.items()}
        values |= {"lr": entry.lr, "images_per_second": entry.images_per_second, "memory_MiB": entry.memory}
        known = {tag: value for tag, value in values.items() if value is not None}
        self.scalars(known, entry.iteration)

    def options(self, options: Mapping[str, Any]) -> None:
        """The options of a run."""
        for board in self._boards:
            board.options(options)

    def results(self, results: Results, step: int, confusion: Array | None = None) -> None:
        """Results of an evaluation: curves of means and of every class, the tables, the confusion matrix.

        Args:
            results: of the evaluation.
            step: of the curves: the number of the step, or of the epoch.
            confusion: picture of the matrix, H×W×3, uint8; None: none.
        """
        means = {
            "miou/old": results.miou_old,
            "miou/new": results.miou_new,
            "miou/all": results.miou_all,
            "miou/harmonic": results.harmonic_mean,
            "miou/first": results.miou_first,
            "miou/later": results.miou_later,
            "miou/harmonic_first_later": results.harmonic_mean_first_later,
            "miou/average": results.average_miou_all,
            "mean_forgetting": results.mean_forgetting,
        }
        tags = _tags(results.class_iou)
        self.scalars(means | {f"iou/{tags[name]}": iou for name, iou in results.class_iou.items()}, step)
        for board in self._boards:
            board.tables("results", results.tables(), step)
        if confusion is not None:
            self.image("confusion", confusion, step)

    def close(self) -> None:
        """Flush and close the files."""
        for board in self._boards:
            board.close()
        self._boards = []


def _tags(names: Iterable[str]) -> dict[str, str]:
    """A TensorBoard tag for each class name, with "_" for characters not allowed in tags.

    A slash would start a new group. Of two names with the same tag the later gets its index appended; later
    steps only append classes, so every curve keeps its tag.
    """
    tags: dict[str, str] = {}
    for place, name in enumerate(names):
        tag = re.sub(r"[^-.\w]", "_", name)
        while tag in tags.values():
            tag += f"_{place}"
        tags[name] = tag
    return tags
