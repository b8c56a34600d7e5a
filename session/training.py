"""Training of a step, from its start or from where its checkpoint stands, and saving it on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from argparser import Options
from dataset.loaders import EpochSampler, Loader, Tolerance, make_train_loader
from dataset.splits import list_digest
from dataset.step_data import StepData, step_data
from methods import Context, Method
from methods.checks import call_hook, fault
from methods.own_modules import check_unchanged
from runs.checkpoint import check_loadable, make_manifest, save_checkpoint
from runs.history import History
from segmentation_module import load_state
from session.evaluation import Evaluation
from session.folder import Begun, RunFolder
from session.networks import StepNetworks
from session.optimizer import advance, load_optimizer, schedule, take_momentum, weight_names
from session.recall import Recall, weights_digest
from session.resume import (
    Progress,
    deciding_options,
    has_same_batches,
    is_trained,
    is_within_epoch,
    job_id,
    rng_of_rank,
)
from session.tensorboard import RunLogger
from train import NonFiniteLoss, Precision, Trainer, map_tensors, to_device
from utils import distributed
from utils.distributed import World
from utils.errors import UserError
from utils.logger import progress
from utils.randomness import rng_state, set_rng_state
from utils.signals import Stopped, StopRequest

log = logging.getLogger(__name__)

_GO_ON, _SAVE, _END = 0, 1, 2  # ballots after a batch; the highest wins


class StepTraining:
    """A step in training.

    Args:
        opts: checked options.
        world: this process among the others.
        folder: of the run.
        evaluation: for validation.
        stop: whether this process was told to stop.
        tolerance: for unreadable images.
        step: the step.
        lr: its learning rate.
        facts: what its checkpoint must agree with beside the options (``RunFolder.facts``).
        begun: the checkpoint that it goes on from, None at its start.

    Raises:
        UserError: data, previous step or checkpoint do not fit.
    """

    def __init__(
        self,
        opts: Options,
        world: World,
        folder: RunFolder,
        evaluation: Evaluation,
        stop: StopRequest,
        tolerance: Tolerance,
        *,
        step: int,
        lr: float,
        facts: dict[str, Any],
        begun: Begun | None,
    ) -> None:
        self.opts = opts
        self.world = world
        self.folder = folder
        self.evaluation = evaluation
        self.stop = stop
        self.tolerance = tolerance
        self.step = step
        self.facts = facts
        self.vote = distributed.Vote(opts.timeout)
        self.precision = Precision.of(opts, world.device, world.bfloat16)
        torch.manual_seed(opts.random_seed + step)
        with distributed.shared_errors():
            self.data = self._step_data(begun)
        with contextlib.ExitStack() as opened:
            self._prepare(opened, lr, begun)
            self._opened = opened.pop_all()  # from here on ``close`` closes them

    def _prepare(self, opened: contextlib.ExitStack, lr: float, begun: Begun | None) -> None:
        """Loader, networks, trainer and the files of the course."""
        opts, world, folder, step = self.opts, self.world, self.folder, self.step
        self.loader = opened.enter_context(self._train_loader())
        assert isinstance(self.loader.sampler, EpochSampler)
        self.sampler = self.loader.sampler
        networks = self.networks = StepNetworks(opts, world, folder, step, self.precision)
        self.context: Context = networks.context
        self.context.batches = self._training_pass
        self.context.cached = Recall(folder, world, step, self._origin)
        self.updates_per_epoch = math.ceil(self.sampler.batches_per_epoch / opts.accumulate)
        updates = opts.epochs * self.updates_per_epoch
        self.context.epochs, self.context.updates, self.context.lr = opts.epochs, updates, lr
        networks.begin()
        if begun is not None:
            networks.restore(begun.content)
        forward, optimizer = networks.wrapped(), networks.optimizer(lr)
        self.scheduler = schedule(opts, optimizer, updates)
        self.trainer = Trainer(
            self.context,
            networks.methods,
            optimizer,
            self.scheduler,
            forward=forward,
            precision=self.precision,
            accumulate=opts.accumulate,
            compile=opts.compile,
            own_modules=networks.own_modules,
        )
        self.progress = Progress()
        self._rng: dict[str, Tensor] | None = None
        self._saved: tuple[int, int] | None = None  # epoch and batch of the checkpoint on the disk
        self._best: dict[str, Any] | None = None  # with --keep best: the best epoch so far and its states
        self._chosen = opts.keep == "last"  # whether the weights in the model are those of the kept epoch
        self._ended = False  # whether the methods' ``end_step`` was called on them
        if begun is not None:
            self._go_on(begun)
        self._check_rate()
        iteration = self._iteration(self.progress.batch)
        self.board = RunLogger(
            world,
            folder.path / f"step_{step}",
            enabled=opts.visualize,
            begins_at=0 if begun is None else iteration + 1,
        )
        opened.callback(self.board.close)
        self.board.options(folder.options)
        self.history = History(
            folder.path,
            step,
            enabled=world.is_main,
            iteration=iteration,
            images=opts.batch_size * world.size,
            device=world.device,
        )
        opened.callback(self.history.close)
        self._last_save = time.monotonic()
        self._states_checked = False  # whether the methods' states were found savable after a batch

    @property
    def model(self) -> nn.Module:
        """The student, not wrapped."""
        return self.context.model

    def old_model(self) -> nn.Module | None:
        """The network of the step before, for pictures; fine-tuning has it only now."""
        if self.step == 0 or self.context.model_old is not None:
            return self.context.model_old
        return self.networks.place(self.networks.teacher())

    def close(self) -> None:
        """End the loader processes and close the files of the course."""
        self._opened.close()

    # ── start ────────────────────────────────────────────────────────────────────────────────────

    def _step_data(self, begun: Begun | None) -> StepData:
        """The step's images, once the checkpoint to go on from is known to fit them."""
        opts, step = self.opts, self.step
        exemplar_list = self.folder.path / f"exemplars_{step}.json"
        data = step_data(opts, step, exemplar_list=exemplar_list, is_main=self.world.is_main)
        self.facts["list of training images"] = list_digest([entry.index for entry in data.train.entries])
        names = [data.train.dataset.images[entry.index].name for entry in data.train.entries]
        self.facts["names of the training images"] = _digest(names)
        if begun is not None and begun.own:
            self.folder.check_same_run(step, begun.content, self.facts)
        elif begun is not None and (differing := self.folder.differences(begun.content, self.facts)):
            tell = log.warning if self.world.is_main else log.debug
            tell("%s was trained otherwise: %s", begun.path, "; ".join(differing))
        log.info(
            "step %d of task %s: %d training images, %d for the final evaluation, %d classes, total batch %d",
            step,
            opts.task,
            len(data.train) - data.num_memory,
            len(data.test),
            len(data.class_names),
            opts.batch_size * self.world.size,
        )
        return data

    def _train_loader(self) -> Loader:
        opts, world = self.opts, self.world
        return make_train_loader(
            self.data.train,
            opts.batch_size,
            num_memory=self.data.num_memory,
            memory_overwrites=opts.released_ssul,
            seed=opts.random_seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=opts.num_workers,
            device=world.device,
            tolerance=self.tolerance,
        )

    def _training_pass(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This step's training batches once, as epoch 0 draws them."""
        self.sampler.set_epoch(0)
        rng = rng_state(self.world.device)
        for position, (images, targets, *_) in enumerate(self.loader):
            if position == 0:
                # A loader that starts draws a number, one that runs already does not.
                set_rng_state(rng, self.world.device)
            yield to_device(images, self.world.device), targets.to(self.world.device).long()

    def _origin(self) -> dict[str, Any]:
        """All that what a method computes in ``begin_step`` can depend on."""
        self.sampler.set_epoch(0)
        order = [(key.index, key.epoch, key.position) for key in self.sampler]
        context = self.context
        return {
            "student": weights_digest(context.model),
            "teacher": None if context.model_old is None else weights_digest(context.model_old),
            "samples": self.data.train.digest(),
            "order": _digest(order),
            "processes": self.world.size,
            "device": self.world.device.type,
            "options": deciding_options(self.folder.options),
        }

    def _go_on(self, begun: Begun) -> None:
        """Stand where a checkpoint stands."""
        batches, content = self.sampler.batches_per_epoch, begun.content
        progress = self.progress = Progress.of(content, batches)
        if not begun.own and not has_same_batches(content, self.folder.options, self.facts, batches):
            # The batches that are done had other images than this run's.
            progress.batch = 0 if is_within_epoch(content) else batches
        self.tolerance.reasons |= progress.unreadable
        if "optimizer_state" in content:
            if begun.is_exact:
                self._restore_optimizer(content)
            else:
                self._lay_schedule(begun)
            # Empty where the checkpoint was trained without a scaler, on the CPU or in bfloat16.
            if content.get("scaler_state"):
                self.precision.scaler.load_state_dict(content["scaler_state"])
        if 0 < progress.batch < batches:
            self._rng = rng_of_rank(content, self.world.rank)
        self._saved = (progress.epoch, progress.batch) if begun.own else None
        self._best = content.get("best")
        self._chosen = self._chosen or "kept_epoch" in content
        self._ended = is_trained(content, self.opts.epochs)
        log.info(
            "step %d goes on at epoch %d of %d, after batch %d of %d",
            self.step,
            progress.epoch + 1,
            self.opts.epochs,
            progress.batch,
            batches,
        )

    def _restore_optimizer(self, content: dict[str, Any]) -> None:
        """Rates, momentum and schedule as this run left them."""
        try:
            load_optimizer(self.trainer.optimizer, content["optimizer_state"])
        except ValueError as error:
            raise UserError(
                f"{self.folder.checkpoint(self.step)}: its optimiser trained other weights ({error}); "
                "--fresh starts the step over"
            ) from error
        self.scheduler.load_state_dict(content["scheduler_state"])

    def _lay_schedule(self, begun: Begun) -> None:
        """Another run's momentum, and this command's schedule as if it had held from the step's start."""
        progress, updates = self.progress, self.updates_per_epoch
        optimizer = self.trainer.optimizer
        missing = take_momentum(optimizer, self.networks.trained, begun.content)
        whole = progress.batch == self.sampler.batches_per_epoch
        done = progress.epoch * updates + (updates if whole else progress.batch // self.opts.accumulate)
        advance(self.scheduler, done)
        log.info(
            "%s gives the weights and their momentum%s; the schedule is this command's: %d of %d updates are "
            "done, the learning rate is %.3g",
            begun.path,
            f" (none for {missing})" if missing else "",
            done,
            self.opts.epochs * updates,
            max(group["lr"] for group in optimizer.param_groups),
        )

    def _check_rate(self) -> None:
        """Refuse to train what is left of the step at a learning rate of 0."""
        progress = self.progress
        left = progress.epoch + 1 < self.opts.epochs or progress.batch < self.sampler.batches_per_epoch
        if left and not any(group["lr"] for group in self.trainer.optimizer.param_groups):
            raise UserError(
                f"step {self.step}: the learning rate is 0 in all that is left to train; give another --lr "
                "or --lr_old, or start the step over with --fresh"
            )

    # ── epochs ───────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Train what is left of the epochs; validate and save between them, and choose what is kept.

        Raises:
            Stopped: a signal came; the step is saved.
            NonFiniteLoss: a loss or a weight is not finite.
        """
        opts, progress, batches = self.opts, self.progress, self.sampler.batches_per_epoch
        if self.world.is_main:
            # They tell that the step is done.
            self.folder.results(self.step).unlink(missing_ok=True)
        for epoch in range(progress.epoch, opts.epochs):
            if epoch > progress.epoch:
                progress.epoch, progress.batch = epoch, 0
            last = epoch + 1 == opts.epochs
            trains = progress.batch < batches
            if trains:
                self._train_epoch()
            if last and self._chosen and not self._ended:
                self._end_step()
                self._save()
            elif trains and (last or (epoch + 1) % opts.ckpt_interval == 0):
                self._save()
            validates = not self._chosen if last else (epoch + 1) % opts.val_interval == 0
            if validates:
                try:
                    self._rate(self._validate())
                except Stopped:
                    if self._saved != (epoch, progress.batch):
                        self._save()
                    raise
        if not self._chosen:
            self._choose()

    def _rate(self, score: float) -> None:
        """Take in a validation's score; with ``--keep best`` remember the state that reached the best one."""
        progress = self.progress
        if self.opts.keep == "last":
            progress.best = max(progress.best, score)
        elif self._best is None or not score <= progress.best:  # NaN, where nothing is labelled: the latest
            progress.best = score
            state = {
                "model_state": self.model.state_dict(),
                "modules": self.networks.own_modules.state_dict(),
                "method_state": self._method_states(),
            }
            self._best = {"epoch": progress.epoch, **map_tensors(_copied, state)}

    def _choose(self) -> None:
        """Make the best epoch's state the step's result, in the model and in the checkpoint.

        The checkpoint has no optimiser's state any more, since that belongs to the last epoch.
        """
        best = self._best
        assert best is not None  # the last epoch is always validated
        load_state(self.model, best["model_state"])
        self.networks.own_modules.load_state_dict(best.get("modules", {}))
        method_state = best["method_state"]
        self._chosen = True
        if self._ends_step:
            for name, method in self.trainer.methods.items():
                call_hook(method, "load_state_dict", method_state[name])
            self._end_step()
            method_state = self._method_states()
        self._ended = True
        with distributed.shared_errors():
            if self.world.is_main:
                kept = {"method_state": method_state, "kept_epoch": best["epoch"]}
                save_checkpoint(self.folder.checkpoint(self.step), {**self._content(), **kept})
        shown = best["epoch"] + 1, 100 * self.progress.best
        log.info("step %d keeps the weights of epoch %d: validation mIoU %.2f %%", self.step, *shown)

    @property
    def _ends_step(self) -> bool:
        """Whether a method has an ``end_step``."""
        return any(type(m).end_step is not Method.end_step for m in self.trainer.methods.values())

    def _end_step(self) -> None:
        """Let the methods finish the step; what they draw is the same in a resumed run."""
        self._ended = True
        if not self._ends_step:
            return
        torch.manual_seed(self.opts.random_seed + self.step)
        for trained in self.networks.trained:
            trained.eval()
        for method in self.trainer.methods.values():
            call_hook(method, "end_step", self.context)
        for trained in self.networks.trained:
            distributed.broadcast_weights(trained)
        _check_finite(self.networks.trained)

    def _train_epoch(self) -> None:
        """Train the rest of the epoch under way."""
        opts, sampler, progress_ = self.opts, self.sampler, self.progress
        epoch, first = progress_.epoch, progress_.batch
        began = time.perf_counter()
        self.history.lap()
        sampler.set_epoch(epoch, first)
        title = f"step {self.step} epoch {epoch + 1}/{opts.epochs}"
        batches = progress(
            self._seeded(epoch),
            total=sampler.batches_per_epoch - first,
            desc=title,
            world=self.world,
            interval=opts.print_interval,
        )
        means = self.trainer.train_epoch(
            batches,
            epoch,
            interval=opts.print_interval,
            report=self._report,
            first_batch=first,
            after_batch=self._after_batch,
        )
        seconds = time.perf_counter() - began
        speed = (sampler.batches_per_epoch - first) * opts.batch_size * self.world.size / seconds
        if sampler.batches_per_epoch < opts.print_interval:
            self._report(sampler.batches_per_epoch, means)
        log.info("%s: %s (%.1f images/s)", title, _listed(means), speed)

    def _iteration(self, position: int) -> int:
        """Batches of the step that are done after ``position`` of the epoch under way."""
        return self.progress.epoch * self.sampler.batches_per_epoch + position

    def _report(self, position: int, terms: dict[str, float]) -> None:
        """A point of the curves."""
        epoch, lr = self.progress.epoch + 1, self.trainer.optimizer.param_groups[0]["lr"]
        self.board.progress(self.history.progress(self._iteration(position), epoch, terms, lr))
        log.debug("step %d epoch %d batch %d: %s", self.step, epoch, position, _listed(terms))

    def _seeded(self, epoch: int) -> Iterator[Any]:
        """The loader's batches; dropout and drop path draw what they draw in an unbroken run."""
        for position, batch in enumerate(self.loader):
            # Not earlier: a loader that starts draws a number too.
            if position == 0 and self._rng is not None:
                set_rng_state(self._rng, self.world.device)
                self._rng = None
            elif position == 0:
                torch.manual_seed(self.opts.random_seed + 1000 * (epoch + 1) + self.world.rank)
            yield batch

    def _validate(self) -> float:
        data, epoch = self.data, self.progress.epoch
        metrics = self.evaluation.run(self.model, data.val, len(data.class_names), self.precision)
        results = self.evaluation.summarise(self.step, data, metrics)
        self.history.validation(epoch + 1, results.miou_all)
        self.board.results(results, epoch + 1)
        log.info("step %d epoch %d: validation mIoU %.2f %%", self.step, epoch + 1, 100 * results.miou_all)
        return results.miou_all

    # ── saving ───────────────────────────────────────────────────────────────────────────────────

    def _after_batch(self, position: int) -> None:
        """Save where ``--ckpt_minutes`` are over, save and end where a signal came; all processes alike."""
        self.progress.batch = position
        if not self._states_checked:
            self._method_states()  # what cannot be saved is told now rather than after an epoch
            self._states_checked = True
        ballot = _END if self.stop else _SAVE if self._save_is_due() else _GO_ON
        decision = self.vote.cast(ballot)
        if decision == _GO_ON:
            return
        self._save()
        if decision == _END:
            raise Stopped(
                f"{self.stop.reason}: saved step {self.step} after batch {position} of epoch "
                f"{self.progress.epoch + 1}; the same command goes on from there"
            )

    def _save_is_due(self) -> bool:
        """Whether the first process's clock says so; once per interval."""
        interval = 60 * self.opts.ckpt_minutes
        if not (self.world.is_main and interval) or time.monotonic() - self._last_save < interval:
            return False
        self._last_save = time.monotonic()
        return True

    def _save(self) -> None:
        """Write the checkpoint from rank 0; every process waits until it is whole, or fails with it."""
        _check_finite(self.networks.trained)
        if self.opts.skip_corrupt:
            for reasons in distributed.gather_objects(self.tolerance.reasons):
                self.tolerance.note(reasons)
            self.progress.unreadable = set(self.tolerance.reasons)
        methods = self._method_states()
        # On the CPU: a pickled CUDA tensor comes back on the GPU that it left, in every process.
        local = {
            name: map_tensors(Tensor.cpu, methods[name])
            for name, m in self.trainer.methods.items()
            if m.differs_between_processes
        }
        gathered = {
            "method_state_of_rank": distributed.gather_objects(local) if local else [],
            "rng_state": distributed.gather_objects(rng_state(self.world.device)),
        }
        with distributed.shared_errors():
            if self.world.is_main:
                save_checkpoint(
                    self.folder.checkpoint(self.step),
                    {**self._content(), **self._course(), **gathered, "method_state": methods},
                )
        self._saved = self.progress.epoch, self.progress.batch
        self._last_save = time.monotonic()

    def _method_states(self) -> dict[str, dict[str, Any]]:
        """States of the methods, by name.

        Raises:
            UserError: a checkpoint cannot hold a method's state, or the method has other modules now.
        """
        check_unchanged(self.networks.own_modules, self.trainer.methods)
        states = {name: method.state_dict() for name, method in self.trainer.methods.items()}
        for name, state in states.items():
            method = self.trainer.methods[name]
            if not isinstance(state, dict):
                raise fault(
                    method, "state_dict", f"returned a {type(state).__name__}; return a dict, {{}} for none"
                )
            try:
                check_loadable(state, "state")
            except TypeError as error:
                remedy = "use tensors, numbers, strings, lists and dicts"
                raise fault(method, "state_dict", f"{error}; {remedy}") from error
        return states

    def _content(self) -> dict[str, Any]:
        """What the first process puts into the checkpoint on its own."""
        return {
            **self.progress.state(),
            "batches_per_epoch": self.sampler.batches_per_epoch,
            "ended": self._ended or not self._ends_step,
            "model_state": self.model.state_dict(),
            "modules": self.networks.own_modules.state_dict(),
            "facts": self.facts,
            "job": job_id(),
            "manifest": self._manifest(),
        }

    def _course(self) -> dict[str, Any]:
        """What only a run that goes on needs."""
        return {
            "optimizer_state": self.trainer.optimizer.state_dict(),
            "optimizer_weights": weight_names(self.trainer.optimizer, self.networks.trained),
            "scheduler_state": self.scheduler.state_dict(),
            "scaler_state": self.precision.scaler.state_dict(),
            **({} if self._chosen else {"best": self._best}),
        }

    def _manifest(self) -> dict[str, Any]:
        opts = self.opts
        return make_manifest(
            task=opts.task,
            dataset=opts.dataset,
            steps=[list(ids) for ids in opts.task_.steps],
            step=self.step,
            model=opts.model,
            backbone=opts.backbone,
            decoder=opts.decoder,
            head=opts.head,
            norm_act=opts.norm_act,
            options=self.folder.options,
            precision=self.precision.description,
        )


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def _digest(value: Any) -> str:
    """sha256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _listed(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in terms.items())


def _check_finite(networks: Sequence[nn.Module]) -> None:
    """Raise rather than put weights on the disk that no run can go on with."""
    finite = [p.detach().isfinite().all() for network in networks for p in network.parameters()]
    if not bool(torch.stack(finite).all()):
        raise NonFiniteLoss(
            "the weights are not finite any more and are not saved; a lower --lr or --opt_level O0 may help"
        )
