"""A run: its steps are trained or tested in order.

``networks``: student, teacher and methods; ``optimizer``: optimiser and schedule; ``training``: epochs;
``state``: the checkpoint; ``monitor``: progress; ``evaluation``: results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from types import TracebackType
from typing import Any

import torch

from argparser import Options
from dataset.loaders import Tolerance, check_half
from dataset.step_data import DataSpec, evaluation_data
from inference.load import as_trained, load_model, with_network_of
from runs.checkpoint import load_checkpoint, save_id
from runs.files import LOG, run_folder
from runs.folder import RunFolder
from runs.options import read_run_options, write_run_options
from runs.resume import restarted
from session.evaluation import Evaluation
from session.run import Run
from session.tensorboard import RunLogger
from session.training import StepTraining
from session.wandb_mirror import WandbMirror, check_login
from utils import distributed
from utils.distributed import World
from utils.errors import UserError
from utils.files import FolderLock
from utils.hub import local_file
from utils.logger import setup_logging
from utils.randomness import make_deterministic
from utils.signals import StopRequest

log = logging.getLogger(__name__)


class Session:
    """The steps of one run on this process, in a ``with`` block.

    Raises:
        UserError: the run's folder cannot be written or another run uses it.
    """

    def __init__(self, opts: Options, world: World) -> None:
        tracked = opts.wandb is not None and world.is_main
        with distributed.shared_errors():
            if tracked:
                check_login()
            opts = _with_network_of_file(opts)
        if opts.memory and max(opts.steps) > 0 and opts.memory_batches != "joined" and not opts.test:
            check_half(opts.batch_size * world.size)  # else found in step 1, after the training of step 0
        folder = RunFolder(opts, world)
        self.run = Run(opts, world, folder, StopRequest().listen(), Tolerance(opts.skip_corrupt))
        if opts.deterministic:
            make_deterministic()
        elif world.device.type == "cuda":
            # All crops have one size, for which cuDNN searches its fastest kernels once.
            torch.backends.cudnn.benchmark = True
        with distributed.shared_errors():
            self._lock = FolderLock(folder.path, "choose another --logdir") if world.is_main else None
            setup_logging(world, folder.path / LOG, debug=opts.debug)
            if tracked:
                mirror = WandbMirror(opts.wandb, folder.path, anew=_starts_over(opts))
                self.run = dataclasses.replace(self.run, mirror=mirror)
        if self._lock is not None and self._lock.warning is not None:
            log.warning("%s", self._lock.warning)
        log.info("%s", opts.summary())
        log.info("%s", world.description)
        if world.is_main:
            self.run.precision().log_choice("opt_level" in opts.typed)
        for note in opts.notes:
            log.info(note)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run.mirror is not None:
            self.run.mirror.close(failed=kind is not None)

    def train(self, step: int, lr: float) -> None:
        """Train a step from its beginning or from its checkpoint, then evaluate it.

        Raises:
            Stopped: a signal was received; the step is saved, and the same command resumes it.
        """
        run, folder, tolerance = self.run, self.run.folder, self.run.tolerance
        run.stop.raise_if_set()
        start = folder.start(step, lr)
        if start.resumed is not None and folder.is_done(start.resumed, step):
            log.info(
                "step %d is done (%s); --test evaluates it again, --fresh starts it over",
                step,
                folder.checkpoint(step),
            )
            return
        with distributed.shared_errors():
            if run.world.is_main:
                write_run_options(folder.path, folder.options, run.opts.task_.steps, step=step, lr=lr)
        with contextlib.closing(StepTraining(run, start)) as training:
            training.train()
            training.evaluate()
        if tolerance.reasons:
            listed = "; ".join(sorted(tolerance.reasons))
            log.warning("%d unreadable images were skipped: %s", len(tolerance.reasons), listed)

    def test(self, step: int) -> None:
        """Evaluate a step's checkpoint on the images of the final evaluation.

        Network and data are those with which it was trained, unless other options are typed, which the log
        and the results name.

        Raises:
            UserError: the checkpoint does not fit, is another run's while this one has its own, or the data
                cannot be read.
        """
        path = self.run.folder.tested(step)
        content = load_checkpoint(path)
        opts, differing = as_trained(self.run.opts, content, path)
        folder = RunFolder(opts, self.run.world)
        run = dataclasses.replace(self.run, opts=opts, folder=folder)
        if differing and run.world.is_main:
            listed = "; ".join(differing.values())
            log.warning("not evaluated as trained, which the results name: %s", listed)
        model = load_model(folder.spec, folder.fitting(content, path, step), path, opts.task_, step)
        precision = run.precision()
        data, evaluation = evaluation_data(DataSpec.of(opts), step), Evaluation(run)
        log.info("testing %s on %d images", path, len(data.test))
        placed = precision.place(model)
        metrics = evaluation.run(placed, data.test, len(data.class_names), precision)
        evaluation.report(step, data, metrics, differing=differing)
        if "sample_num" in opts.typed:  # else those of the training stay, which show the previous network too
            nowhere = RunLogger(run.world, folder.path, enabled=False)
            evaluation.images(step, data, (placed, None), precision, nowhere)


def _with_network_of_file(opts: Options) -> Options:
    """The options, with what a released program's file, ``--ckpt`` or ``--step_ckpt``, shows."""
    first = opts.steps[0]
    path, step = (opts.step_ckpt, first - 1) if opts.ckpt is None else (opts.ckpt, first)
    if path is None or not local_file(path).is_file() or save_id(path) is not None:
        return opts
    return with_network_of(
        load_checkpoint(path),
        opts,
        path,
        opts.task_,
        step,
        trains=not opts.test,
        norm_act=None if _starts_over(opts) else _recorded(opts, first).get("norm_act"),
    )


def _starts_over(opts: Options) -> bool:
    """Whether ``--fresh`` counts: not in a test, nor when a job is requeued."""
    return opts.resume == "fresh" and not (opts.test or restarted())


def _recorded(opts: Options, step: int) -> dict[str, Any]:
    """The options with which this run's folder has trained a step before."""
    try:
        folder = run_folder(opts.logdir, opts.task, opts.dataset, opts.name)
        return read_run_options(folder).by_step.get(step, {})
    except UserError:  # a damaged run.json, which the start of the training reports
        return {}
