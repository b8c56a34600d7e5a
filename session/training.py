"""Training of a step: set-up of data, networks, methods and optimiser, then the epochs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dataset.exemplars import Exemplar
from dataset.loaders import EpochSampler, Loader, Workers, make_train_loader
from dataset.protocols import list_digest
from dataset.step_data import EXTRAS, DataSpec, StepData, step_data
from methods import Method, build_methods
from methods.checks import fault
from runs.files import EXEMPLARS, step_file
from runs.folder import Start
from runs.resume import deciding_options
from session.cached import Cache, weights_digest
from session.evaluation import Evaluation
from session.exemplars import predicted_exemplars
from session.monitor import Monitor
from session.networks import StepNetworks
from session.optimizer import Schedule, make_optimizer
from session.run import Run
from session.state import StepState
from train import Trainer, groups, to_device
from utils import distributed
from utils.randomness import set_rng_state
from utils.signals import Stopped

log = logging.getLogger(__name__)

_CONTINUE, _SAVE, _STOP = 0, 1, 2  # flags after an optimiser step; the maximum over all processes counts


class StepTraining:
    """Training of a step. ``close`` ends its loader processes and closes its files.

    Attributes:
        data: images of the step.
        networks: student, teacher and methods.
        trainer: with optimiser and schedule.
        state: content of the checkpoint.
        monitor: logs the progress.

    Raises:
        UserError: data, the previous step's checkpoint or the checkpoint to resume from do not fit.
    """

    def __init__(self, run: Run, start: Start) -> None:
        self.run, self.start, self.step = run, start, start.step
        self.evaluation = Evaluation(run)
        torch.manual_seed(run.opts.random_seed + self.step)
        # First, so that methods check their options before the data are read.
        self.methods = build_methods(run.opts, self.step)
        chosen = predicted_exemplars(run, self.step)
        with distributed.shared_errors():
            self.data = load_data(run, start, self.methods, chosen)
        with contextlib.ExitStack() as opened:
            # All read with the same worker processes, which start here, while this process is still small.
            everything = (self.data.train, self.data.val, self.data.test)
            self.workers = opened.enter_context(Workers(everything, run.world, **run.reading))
            self.loader = self._loader()
            self.networks = self._networks()
            self.networks.begin()
            if start.resumed is not None:
                self.networks.restore(start.resumed)
            self.trainer = self._trainer()
            self.state = StepState(run, start, self.networks, self.trainer, self.sampler)
            iteration = None if start.resumed is None else self.state.iteration
            batches = self.sampler.batches_per_epoch
            self.monitor = Monitor(run, self.step, batches_per_epoch=batches, iteration=iteration)
            opened.callback(self.monitor.writer.close)
            self._opened = opened.pop_all()  # closed by ``close``
        self._flag = distributed.AllReducedFlag(run.opts.timeout)
        self._last_save = time.monotonic()
        self._states_checked = False  # whether ``method_states`` was checked after a batch

    def close(self) -> None:
        """End the loader processes and close the files."""
        self._opened.close()

    # ── what a step is made of ───────────────────────────────────────────────────────────────────

    def _loader(self) -> Loader:
        opts, world = self.run.opts, self.run.world
        return make_train_loader(
            self.data.train,
            opts.batch_size,
            self.workers,
            num_memory=0 if opts.memory_batches == "joined" else self.data.num_memory,
            memory_overwrites=opts.memory_batches == "overwrite",
            seed=opts.random_seed,
            world=world,
        )

    @property
    def sampler(self) -> EpochSampler:
        """The sampler of the training batches."""
        return self.loader.sampler

    def _networks(self) -> StepNetworks:
        """Student, teacher and methods, and the ``Context`` of the methods."""
        run, opts = self.run, self.run.opts
        networks = StepNetworks(run, self.step, run.precision(), self.methods)
        context = networks.context
        context.batches = self._training_pass
        context.cached = Cache(run.folder, run.world, self.step, self._origin)
        context.epochs, context.updates, context.lr = opts.epochs, self._updates, self.start.lr
        return networks

    def _trainer(self) -> Trainer:
        networks, opts, model = self.networks, self.run.opts, self.networks.context.model
        forward = networks.wrapped()
        optimizer = make_optimizer(opts, model, self.methods, self.start.lr, networks.own_modules)
        trainer = Trainer(
            networks.context,
            self.methods,
            optimizer,
            Schedule.of(opts).make(optimizer, self._updates),
            forward=forward,
            precision=networks.precision,
            own_modules=networks.own_modules,
        )
        if opts.compile:
            trainer.compile()
        return trainer

    @property
    def _updates(self) -> int:
        """Number of optimiser steps of the step."""
        return self.run.opts.epochs * math.ceil(self.sampler.batches_per_epoch / self.run.opts.accumulate)

    def _training_pass(self, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training batches of an epoch."""
        device = self.run.world.device
        self.sampler.set_epoch(epoch)
        for images, targets, *_ in self.loader:
            yield to_device(images, device), targets.to(device).long()

    def _origin(self) -> dict[str, Any]:
        """Everything on which a method's computations in ``begin_step`` may depend, for ``Cache``."""
        self.sampler.set_epoch(0)
        order = [(key.index, key.epoch, key.position) for key in self.sampler]
        context, world = self.networks.context, self.run.world
        return {
            "student": weights_digest(context.model),
            "teacher": None if context.model_old is None else weights_digest(context.model_old),
            "samples": self.data.train.digest(),
            "order": _digest(order),
            "processes": world.size,
            "device": world.device.type,
            "options": deciding_options(self.run.folder.options),
        }

    # ── epochs ───────────────────────────────────────────────────────────────────────────────────

    def train(self) -> None:
        """Train the remaining epochs, with validations and checkpoints, and finish the step.

        Raises:
            Stopped: a signal was received; the step is saved.
            NonFiniteLoss: a loss or a weight is not finite.
        """
        opts, state, progress = self.run.opts, self.state, self.state.progress
        if self.run.world.is_main:
            # A results file marks the step as done.
            self.run.folder.results(self.step).unlink(missing_ok=True)
        for epoch in range(progress.epoch, opts.epochs):
            if epoch > progress.epoch:
                progress.epoch, progress.batch = epoch, 0
            trains = progress.batch < self.sampler.batches_per_epoch
            if trains:
                self.trainer.set_training()
                self.monitor.begin_epoch(epoch, progress.batch)
                for samples in groups(self._batches(epoch), opts.accumulate):
                    terms = self.trainer.train_group(samples, epoch=epoch)
                    progress.batch += len(samples)
                    self.monitor.add(terms, len(samples), self.trainer.lr)
                    self._save_or_stop()
                self.monitor.end_epoch()
            last = epoch + 1 == opts.epochs
            finishes = last and state.chosen and not state.ended
            if finishes:
                state.end_step()
            if finishes or (trains and (last or (epoch + 1) % opts.ckpt_interval == 0)):
                self._save()
            if not state.chosen if last else (epoch + 1) % opts.val_interval == 0:
                self._validate()
        if not state.chosen:
            state.keep_best()

    def evaluate(self) -> None:
        """Evaluate the trained step: write the results, which mark it as done, then images."""
        opts, step, data, model = self.run.opts, self.step, self.data, self.state.model
        precision, writer = self.trainer.precision, self.monitor.writer
        metrics = self.evaluation.run(model, data.test, len(data.class_names), precision, self.workers)
        with distributed.shared_errors():
            self.evaluation.report(step, data, metrics, writer)
        with distributed.shared_errors():
            if opts.sample_num and self.run.world.is_main:
                networks = model, self.networks.previous_network()
                self.evaluation.images(step, data, networks, precision, writer)

    def _batches(self, epoch: int) -> Iterator[Any]:
        """The remaining batches of an epoch, with the random numbers of an uninterrupted run."""
        state, world = self.state, self.run.world
        self.sampler.set_epoch(epoch, state.progress.batch)
        if state.rng is not None:
            set_rng_state(state.rng, world.device)
            state.rng = None
        else:
            torch.manual_seed(self.run.opts.random_seed + 1000 * (epoch + 1) + world.rank)
        yield from self.monitor.shown(self.loader)

    def _validate(self) -> None:
        """Evaluate on the validation images; if a signal is received, save the epoch and stop."""
        data = self.data
        try:
            metrics = self.evaluation.run(
                self.state.model, data.val, len(data.class_names), self.trainer.precision, self.workers
            )
        except Stopped:
            if not self.state.is_saved:
                self.state.save()
            raise self._stopped() from None
        results = self.evaluation.summarise(self.step, data, metrics)
        self.monitor.validation(results, self.state.progress.epoch)
        self.state.add_score(results.miou_all)

    def _save_or_stop(self) -> None:
        """Save every ``--ckpt_minutes``; save and stop after a signal. The same on all processes."""
        if not self._states_checked:
            self.state.method_states()  # reports a state that cannot be saved now, not after an epoch
            self._states_checked = True
        flag = self._flag.reduce(_STOP if self.run.stop else _SAVE if self._save_is_due() else _CONTINUE)
        if flag == _CONTINUE:
            return
        self._save()
        if flag == _STOP:
            raise self._stopped()

    def _stopped(self) -> Stopped:
        """The end of a run by a signal, after saving."""
        progress = self.state.progress
        return Stopped(
            f"{self.run.stop.reason}: saved step {self.step} after batch {progress.batch} of epoch "
            f"{progress.epoch + 1}; the same command resumes there"
        )

    def _save_is_due(self) -> bool:
        """Whether ``--ckpt_minutes`` have passed since the last save; on rank 0 only, once per interval."""
        interval = 60 * self.run.opts.ckpt_minutes
        if not (self.run.world.is_main and interval) or time.monotonic() - self._last_save < interval:
            return False
        self._last_save = time.monotonic()
        return True

    def _save(self) -> None:
        self.state.save()
        self._last_save = time.monotonic()


def load_data(
    run: Run, start: Start, methods: Mapping[str, Method], chosen: list[Exemplar] | None = None
) -> StepData:
    """Load a step's images and check that the checkpoint to resume from was trained on them.

    Raises:
        UserError: the data set is missing or faulty, or the checkpoint was trained on other images.
    """
    opts, step, fingerprint, resumed = run.opts, start.step, start.fingerprint, start.resumed
    exemplar_list = step_file(run.folder.path, EXEMPLARS, step)
    for method in methods.values():
        if strange := method.extras - EXTRAS:
            what = f"names {', '.join(sorted(strange))}; samples have {', '.join(sorted(EXTRAS))}"
            raise fault(method, "extras", what)
    extras = frozenset[str]().union(*(method.extras for method in methods.values()))
    data = step_data(
        DataSpec.of(opts),
        step,
        extras=extras,
        exemplar_list=exemplar_list,
        chosen=chosen,
        is_main=run.world.is_main,
    )
    fingerprint["list of training images"] = list_digest([entry.index for entry in data.train.entries])
    names = [data.train.dataset.images[entry.index].name for entry in data.train.entries]
    fingerprint["names of the training images"] = _digest(names)
    if resumed is not None and resumed.own:
        run.folder.check_same_run(step, resumed.content, fingerprint)
    elif resumed is not None and (differing := run.folder.differences(resumed.content, fingerprint)):
        level = logging.WARNING if run.world.is_main else logging.DEBUG
        log.log(level, "%s was trained differently: %s", resumed.path, "; ".join(differing))
    log.info(
        "step %d of task %s: %d training images, %d for the final evaluation, %d classes, total batch %d",
        step,
        opts.task,
        len(data.train) - data.num_memory,
        len(data.test),
        len(data.class_names),
        opts.batch_size * run.world.size,
    )
    return data


def _digest(value: Any) -> str:
    """sha256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
