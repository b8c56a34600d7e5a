"""One run: data, networks, methods and files of each step, put together around the ``Trainer``.

``folder`` knows the run's files, ``networks`` what a step trains, ``training`` its epochs and checkpoints,
``evaluation`` its results; ``Session`` runs one step after the other.
"""

from __future__ import annotations

import logging

import torch

from argparser import Options
from dataset.loaders import Tolerance
from dataset.step_data import evaluation_data
from inference.load import load_model
from runs.options import write_run_options
from session.evaluation import Evaluation
from session.folder import RunFolder
from session.training import StepTraining
from train import Precision
from utils import distributed
from utils.distributed import World
from utils.files import FolderLock
from utils.logger import setup_logging
from utils.randomness import make_deterministic
from utils.signals import StopRequest

log = logging.getLogger(__name__)


class Session:
    """The steps of one run on this process.

    Args:
        opts: checked options.
        world: this process among the others.

    Raises:
        UserError: the run's folder cannot be written or belongs to another run.
    """

    def __init__(self, opts: Options, world: World) -> None:
        self.opts = opts
        self.world = world
        self.folder = RunFolder(opts, world)
        self.stop = StopRequest().listen()
        self.tolerance = Tolerance(opts.skip_corrupt)
        self.evaluation = Evaluation(opts, world, self.folder, self.stop, self.tolerance)
        if opts.deterministic:
            make_deterministic()
        elif world.device.type == "cuda":
            # Crops are of one size, for which cuDNN's fastest kernels are looked up once.
            torch.backends.cudnn.benchmark = True
        with distributed.shared_errors():
            self._lock = FolderLock(self.folder.path, "choose another --logdir") if world.is_main else None
            setup_logging(world, self.folder.path, debug=opts.debug)
            if world.is_main and not opts.test:
                write_run_options(self.folder.path, self.folder.options, opts.task_.steps)
        if self._lock is not None and self._lock.warning is not None:
            log.warning("%s", self._lock.warning)
        log.info("%s", opts.summary())
        log.info("%s", world.description)
        if world.is_main:
            Precision.of(opts, world.device, world.bfloat16).tell("opt_level" in opts.typed)
        for note in opts.notes:
            log.info(note)

    def test(self, step: int) -> None:
        """Evaluate a step's checkpoint on the final images.

        Raises:
            UserError: the checkpoint does not fit, or the data cannot be read.
        """
        path = self.opts.ckpt or self.folder.checkpoint(step)
        content = self.folder.load(path, step)
        model = load_model(self.opts, content, path, self.opts.task_.classes_per_step(step))
        precision = Precision.of(self.opts, self.world.device, self.world.bfloat16)
        model = precision.place(model)
        data = evaluation_data(self.opts, step)
        log.info("testing %s on %d images", path, len(data.test))
        metrics = self.evaluation.run(model, data.test, len(data.class_names), precision)
        self.evaluation.report(step, data, metrics)

    def train(self, step: int, lr: float) -> None:
        """Train a step from its start or from where its checkpoint stands, then evaluate it.

        Raises:
            Stopped: a signal came; the step is saved and goes on when the command is given again.
        """
        self.stop.end_if_told()
        facts = self.folder.facts(step, lr)
        with distributed.shared_errors():
            begun = self.folder.begun(step, facts)
        self.folder.check_same_file(begun, step)
        if begun is not None and self.folder.is_done(begun, step):
            log.info("step %d is done (%s); --fresh starts it over", step, self.folder.checkpoint(step))
            return
        with distributed.shared_errors():
            if self.world.is_main:
                steps = self.opts.task_.steps
                write_run_options(self.folder.path, self.folder.options, steps, step=step, lr=lr)
        training = StepTraining(
            self.opts,
            self.world,
            self.folder,
            self.evaluation,
            self.stop,
            self.tolerance,
            step=step,
            lr=lr,
            facts=facts,
            begun=begun,
        )
        try:
            training.run()
            self._finish(training)
        finally:
            training.close()
        if self.tolerance.reasons:
            listed = "; ".join(sorted(self.tolerance.reasons))
            log.warning("%d unreadable images were passed over: %s", len(self.tolerance.reasons), listed)

    def _finish(self, training: StepTraining) -> None:
        """Evaluate a trained step. The results come first, for they tell that it is done; then pictures."""
        step, data = training.step, training.data
        model, precision = training.model, training.precision
        metrics = self.evaluation.run(model, data.test, len(data.class_names), precision)
        with distributed.shared_errors():
            results = self.evaluation.report(step, data, metrics)
        training.board.results(results, self.opts.epochs, metrics.confusion_matrix)
        with distributed.shared_errors():
            if self.opts.sample_num and self.world.is_main:
                old_model = training.old_model()
                self.evaluation.pictures(step, data, model, old_model, precision, training.board)
