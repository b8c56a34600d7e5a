"""Progress of a step's training: log lines, ``history_<step>.jsonl``, TensorBoard and wandb."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from metrics.continual import Results
from runs.files import TENSORBOARD, step_file
from runs.history import HistoryWriter
from session.run import Run
from session.tensorboard import RunLogger
from train import Means
from utils.logger import progress

log = logging.getLogger(__name__)


class Monitor:
    """Logs a step's losses every ``--print_interval`` batches and after each epoch, and its validations.

    The GPU is synchronised at these points only.

    Args:
        run: the run.
        step: number of the step.
        batches_per_epoch: batches of a whole epoch.
        iteration: batches of the step done before; None: the step starts from its beginning.

    Attributes:
        writer: of TensorBoard and wandb.
    """

    def __init__(self, run: Run, step: int, *, batches_per_epoch: int, iteration: int | None) -> None:
        opts, world, path = run.opts, run.world, run.folder.path
        self.interval, self.epochs, self.world, self.step = opts.print_interval, opts.epochs, world, step
        self.batches_per_epoch = batches_per_epoch
        self.total_batch = opts.batch_size * world.size
        self._lr = 0.0
        purge_step = 0 if iteration is None else iteration + 1
        self.writer = RunLogger(
            world,
            step_file(path, TENSORBOARD, step),
            enabled=opts.visualize,
            purge_step=purge_step,
            mirror=run.mirror,
        )
        self.writer.options(run.folder.options)
        self.history = HistoryWriter(
            path,
            step,
            enabled=world.is_main,
            iteration=iteration or 0,
            images=self.total_batch,
            device=world.device,
        )

    def begin_epoch(self, epoch: int, first_batch: int) -> None:
        """Start an epoch, counted from 0, of which ``first_batch`` batches are done."""
        self._epoch, self._first, self._batch = epoch, first_batch, first_batch
        self._epoch_means, self._interval_means = Means(), Means()
        self._started = time.perf_counter()
        self.history.lap()

    def shown(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the remaining batches of the epoch and show the progress."""
        left = self.batches_per_epoch - self._first
        return progress(batches, total=left, desc=self._title, world=self.world, interval=self.interval)

    @property
    def _title(self) -> str:
        return f"step {self.step} epoch {self._epoch + 1}/{self.epochs}"

    def add(self, terms: Mapping[str, Tensor], batches: int, lr: float) -> None:
        """Add the loss terms of an optimiser step.

        Args:
            terms: means over its batches, on the device.
            batches: number of its batches.
            lr: learning rate after it.

        Raises:
            NonFiniteLoss: the print interval ends here and one of its terms was NaN or infinite.
        """
        reported = self._batch // self.interval
        self._batch, self._lr = self._batch + batches, lr
        self._epoch_means.add(terms, batches)
        self._interval_means.add(terms, batches)
        if self._batch // self.interval > reported:
            self._report(self._interval_means.read())
            self._interval_means = Means()

    def end_epoch(self) -> None:
        """Log the means of the epoch.

        Raises:
            NonFiniteLoss: a term was NaN or infinite.
        """
        images = (self._batch - self._first) * self.total_batch
        speed = images / (time.perf_counter() - self._started)
        means = self._epoch_means.read()
        if self.batches_per_epoch < self.interval:
            self._report(means)
        log.info("%s: %s (%.1f images/s)", self._title, _listed(means), speed)

    def _report(self, terms: Mapping[str, float]) -> None:
        """Write a history entry, a point of the curves and a debug line."""
        epoch, iteration = self._epoch, self._epoch * self.batches_per_epoch + self._batch
        self.writer.progress(self.history.progress(iteration, epoch + 1, terms, self._lr))
        log.debug("step %d epoch %d batch %d: %s", self.step, epoch + 1, self._batch, _listed(terms))

    def validation(self, results: Results, epoch: int) -> None:
        """Log a validation after an epoch (counted from 0)."""
        self.history.validation(epoch + 1, results.miou_all)
        self.writer.results(results, epoch + 1)
        log.info("step %d epoch %d: validation mIoU %.2f %%", self.step, epoch + 1, 100 * results.miou_all)


def _listed(terms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
