"""The state of a step in training: what its checkpoint holds, how it is saved and resumed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dataset.loaders import EpochSampler
from methods import Method
from methods.checks import call_hook, fault
from methods.own_modules import check_unchanged
from runs.checkpoint import check_loadable, make_manifest, save_checkpoint
from segmentation_module import load_state
from session.folder import Resumed, Start
from session.networks import StepNetworks
from session.optimizer import advance, load_optimizer, take_momentum, weight_names
from session.resume import Progress, has_same_batches, is_trained, is_within_epoch, job_id, rng_of_rank
from session.run import Run
from train import NonFiniteLoss, Trainer, map_tensors
from utils import distributed
from utils.errors import UserError
from utils.randomness import rng_state

log = logging.getLogger(__name__)


class StepState:
    """Weights, optimiser, methods and progress of a step.

    Args:
        run: the run.
        start: how the step starts. A checkpoint to resume from is restored, but for the weights and the
            methods' states, which ``StepNetworks.restore`` has restored already.
        networks: of the step.
        trainer: with the optimiser and its schedule, as at the step's beginning.
        sampler: of the training batches.

    Attributes:
        progress: how far the step is.
        rng: states of the random generators to resume with in the middle of an epoch, else None.
        chosen: whether the weights are those of the epoch that ``--keep`` asks for.
        ended: whether the methods' ``end_step`` was called on them.

    Raises:
        UserError: the checkpoint's optimiser trained other weights, or nothing is left to learn with.
    """

    def __init__(
        self, run: Run, start: Start, networks: StepNetworks, trainer: Trainer, sampler: EpochSampler
    ) -> None:
        self.run, self.start, self.networks = run, start, networks
        self.trainer, self.sampler = trainer, sampler
        assert trainer.scheduler is not None
        self.scheduler = trainer.scheduler
        self.progress = Progress()
        self.rng: dict[str, Tensor] | None = None
        self.chosen = run.opts.keep == "last"
        self.ended = False
        self._saved_at: tuple[int, int] | None = None  # epoch and batch of the checkpoint on the disk
        self._best: dict[str, Any] | None = None  # with --keep best: the best epoch so far and its states
        if start.resumed is not None:
            self._resume(start.resumed)
        self._check_learning_rate()

    @property
    def model(self) -> nn.Module:
        """The student, not wrapped."""
        return self.networks.context.model

    @property
    def iteration(self) -> int:
        """Batches of the step that are done."""
        return self.progress.epoch * self.sampler.batches_per_epoch + self.progress.batch

    # ── resuming ─────────────────────────────────────────────────────────────────────────────────

    def _resume(self, resumed: Resumed) -> None:
        """Restore what a checkpoint holds beside the weights and the methods' states."""
        opts, batches, content = self.run.opts, self.sampler.batches_per_epoch, resumed.content
        progress = self.progress = Progress.of(content, batches)
        if not resumed.own and not has_same_batches(
            content, self.run.folder.options, self.start.fingerprint, batches
        ):
            # The batches that are done had other images than this run's.
            progress.batch = 0 if is_within_epoch(content) else batches
        self.run.tolerance.reasons |= progress.unreadable
        if "optimizer_state" in content:
            if resumed.is_exact:
                self._restore_optimizer(content)
            else:
                self._advance_schedule(resumed)
            # Empty where the checkpoint was trained without a scaler, on the CPU or in bfloat16.
            if content.get("scaler_state"):
                self.trainer.precision.scaler.load_state_dict(content["scaler_state"])
        if 0 < progress.batch < batches:
            self.rng = rng_of_rank(content, self.run.world.rank)
        self._saved_at = (progress.epoch, progress.batch) if resumed.own else None
        self._best = content.get("best")
        self.chosen = self.chosen or "kept_epoch" in content
        self.ended = is_trained(content, opts.epochs)
        log.info(
            "step %d resumes at epoch %d of %d, after batch %d of %d",
            self.start.step,
            progress.epoch + 1,
            opts.epochs,
            progress.batch,
            batches,
        )

    def _restore_optimizer(self, content: dict[str, Any]) -> None:
        """Rates, momentum and schedule as this run saved them."""
        try:
            load_optimizer(self.trainer.optimizer, content["optimizer_state"])
        except ValueError as error:
            raise UserError(
                f"{self.run.folder.checkpoint(self.start.step)}: its optimiser trained other weights "
                f"({error}); --fresh starts the step over"
            ) from error
        self.scheduler.load_state_dict(content["scheduler_state"])

    def _advance_schedule(self, resumed: Resumed) -> None:
        """Another run's momentum, and this command's schedule as if it had held from the step's beginning."""
        progress, opts = self.progress, self.run.opts
        updates = self.networks.context.updates // opts.epochs
        optimizer = self.trainer.optimizer
        missing = take_momentum(optimizer, self.networks.trained, resumed.content)
        whole = progress.batch == self.sampler.batches_per_epoch
        done = progress.epoch * updates + (updates if whole else progress.batch // opts.accumulate)
        advance(self.scheduler, done)
        log.info(
            "%s gives the weights and their momentum%s; the schedule is this command's: %d of %d updates are "
            "done, the learning rate is %.3g",
            resumed.path,
            f" (none for {missing})" if missing else "",
            done,
            opts.epochs * updates,
            max(group["lr"] for group in optimizer.param_groups),
        )

    def _check_learning_rate(self) -> None:
        """Refuse to train what is left of the step at a learning rate of 0."""
        progress = self.progress
        left = progress.epoch + 1 < self.run.opts.epochs or progress.batch < self.sampler.batches_per_epoch
        if left and not any(group["lr"] for group in self.trainer.optimizer.param_groups):
            raise UserError(
                f"step {self.start.step}: the learning rate is 0 in all that is left to train; give another "
                "--lr or --lr_old, or start the step over with --fresh"
            )

    # ── saving ───────────────────────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """Write the checkpoint from rank 0; every process waits until it is whole, or fails with it."""
        world = self.run.world
        _check_finite(self.networks.trained)
        if self.run.opts.skip_corrupt:
            for reasons in distributed.gather_objects(self.run.tolerance.reasons):
                self.run.tolerance.note(reasons)
            self.progress.unreadable = set(self.run.tolerance.reasons)
        methods = self.method_states()
        # On the CPU: a pickled CUDA tensor comes back on the GPU that it left, in every process.
        local = {
            name: map_tensors(Tensor.cpu, methods[name])
            for name, m in self.trainer.methods.items()
            if m.differs_between_processes
        }
        gathered = {
            "method_state_of_rank": distributed.gather_objects(local) if local else [],
            "rng_state": distributed.gather_objects(rng_state(world.device)),
        }
        self._write({**self._result(), **self._for_resuming(), **gathered, "method_state": methods})
        self._saved_at = self.progress.epoch, self.progress.batch

    def save_if_unsaved(self) -> None:
        """Write the checkpoint unless the one on the disk is as far."""
        if self._saved_at != (self.progress.epoch, self.progress.batch):
            self.save()

    def _write(self, content: dict[str, Any]) -> None:
        with distributed.shared_errors():
            if self.run.world.is_main:
                save_checkpoint(self.run.folder.checkpoint(self.start.step), content)

    def method_states(self) -> dict[str, dict[str, Any]]:
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

    def _result(self) -> dict[str, Any]:
        """What also a finished step's checkpoint holds, beside the methods' states."""
        return {
            **self.progress.state(),
            "batches_per_epoch": self.sampler.batches_per_epoch,
            "ended": self.ended or not self._has_end_step,
            "model_state": self.model.state_dict(),
            "modules": self.networks.own_modules.state_dict(),
            "facts": self.start.fingerprint,
            "job": job_id(),
            "manifest": self._manifest(),
        }

    def _for_resuming(self) -> dict[str, Any]:
        """What only a resumed run needs."""
        optimizer = self.trainer.optimizer
        return {
            "optimizer_state": optimizer.state_dict(),
            "optimizer_weights": weight_names(optimizer, self.networks.trained),
            "scheduler_state": self.scheduler.state_dict(),
            "scaler_state": self.trainer.precision.scaler.state_dict(),
            **({} if self.chosen else {"best": self._best}),
        }

    def _manifest(self) -> dict[str, Any]:
        return make_manifest(
            task=self.run.opts.task_,
            step=self.start.step,
            spec=self.run.folder.spec,
            options=self.run.folder.options,
            precision=self.trainer.precision.description,
        )

    # ── the step's end ───────────────────────────────────────────────────────────────────────────

    def add_score(self, score: float) -> None:
        """Take in a validation's score; with ``--keep best``, copy the state that reached the best one."""
        progress = self.progress
        if self.run.opts.keep == "last":
            progress.best = max(progress.best, score)
        elif self._best is None or not score <= progress.best:  # NaN, where nothing is labelled: the latest
            progress.best = score
            state = {
                "model_state": self.model.state_dict(),
                "modules": self.networks.own_modules.state_dict(),
                "method_state": self.method_states(),
            }
            self._best = {"epoch": progress.epoch, **map_tensors(_copied, state)}

    def keep_best(self) -> None:
        """Make the best epoch's state the step's result, in the model and in the checkpoint.

        The checkpoint then has no optimiser state, since that belongs to the last epoch.
        """
        best = self._best
        assert best is not None  # the last epoch is always validated
        load_state(self.model, best["model_state"])
        self.networks.own_modules.load_state_dict(best.get("modules", {}))
        method_state = best["method_state"]
        self.chosen = True
        if self._has_end_step:
            for name, method in self.trainer.methods.items():
                call_hook(method, "load_state_dict", method_state[name])
            self.end_step()
            method_state = self.method_states()
        self.ended = True
        self._write({**self._result(), "method_state": method_state, "kept_epoch": best["epoch"]})
        shown = best["epoch"] + 1, 100 * self.progress.best
        log.info("step %d keeps the weights of epoch %d: validation mIoU %.2f %%", self.start.step, *shown)

    @property
    def _has_end_step(self) -> bool:
        """Whether a method has an ``end_step``."""
        return any(type(m).end_step is not Method.end_step for m in self.trainer.methods.values())

    def end_step(self) -> None:
        """Let the methods finish the step; what they draw is the same in a resumed run."""
        self.ended = True
        if not self._has_end_step:
            return
        torch.manual_seed(self.run.opts.random_seed + self.start.step)
        for trained in self.networks.trained:
            trained.eval()
        for method in self.trainer.methods.values():
            call_hook(method, "end_step", self.networks.context)
        for trained in self.networks.trained:
            distributed.broadcast_weights(trained)
        _check_finite(self.networks.trained)


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def _check_finite(networks: Sequence[nn.Module]) -> None:
    """Raise rather than save weights that no run can be resumed from."""
    finite = [p.detach().isfinite().all() for network in networks for p in network.parameters()]
    if not bool(torch.stack(finite).all()):
        raise NonFiniteLoss(
            "the weights are not finite any more and are not saved; a lower --lr or --opt_level O0 may help"
        )
