"""The training state of a step: content of its checkpoint, saving and resuming."""

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
from runs.folder import Resumed, Start
from runs.resume import Progress, has_same_batches, is_trained, is_within_epoch, job_id, rng_of_rank
from segmentation_module import load_state
from session.networks import StepNetworks
from session.optimizer import advance, load_optimizer, take_momentum, weight_names
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
        start: how the step starts. Its checkpoint is restored here, except for the weights and the methods'
            states, which ``StepNetworks.restore`` has restored before.
        networks: of the step.
        trainer: with optimiser and schedule as at the step's beginning.
        sampler: of the training batches.

    Attributes:
        progress: epoch and batch reached.
        rng: random generator states for resuming within an epoch, else None.
        chosen: whether the weights are those of the epoch chosen by ``--keep``.
        ended: whether the methods' ``end_step`` was called on these weights.

    Raises:
        UserError: the checkpoint's optimiser has other weights, or the remaining learning rate is 0.
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
        self._saved_at: tuple[int, int] | None = None  # epoch and batch of the saved checkpoint
        self._best: dict[str, Any] | None = None  # with --keep best: the best epoch so far and its state
        if start.resumed is not None:
            self._resume(start.resumed)
        self._check_learning_rate()

    @property
    def model(self) -> nn.Module:
        """The student, not wrapped."""
        return self.networks.context.model

    @property
    def iteration(self) -> int:
        """Number of batches done in the step."""
        return self.progress.epoch * self.sampler.batches_per_epoch + self.progress.batch

    # ── resuming ─────────────────────────────────────────────────────────────────────────────────

    def _resume(self, resumed: Resumed) -> None:
        """Restore a checkpoint except for the weights and the methods' states."""
        opts, batches, content = self.run.opts, self.sampler.batches_per_epoch, resumed.content
        progress = self.progress = Progress.of(content, batches)
        if not resumed.own and not has_same_batches(
            content, self.run.folder.options, self.start.fingerprint, batches
        ):
            # The finished batches had other images than this run's: repeat the epoch, or start the next.
            progress.batch = 0 if is_within_epoch(content) else batches
        self.run.tolerance.reasons |= progress.unreadable
        if "optimizer_state" in content:
            if resumed.is_exact:
                self._restore_optimizer(content)
            else:
                self._advance_schedule(resumed)
            # Empty if trained without a scaler, on the CPU or in bfloat16.
            if content.get("scaler_state"):
                self.trainer.precision.scaler.load_state_dict(content["scaler_state"])
        if 0 < progress.batch < batches:
            self.rng = rng_of_rank(content, self.run.world.rank)
        self._saved_at = (progress.epoch, progress.batch) if resumed.own else None
        if resumed.own:  # another run's best epoch is that of its own methods and data
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
        """Restore optimiser and schedule of this run's checkpoint."""
        try:
            load_optimizer(self.trainer.optimizer, content["optimizer_state"])
        except ValueError as error:
            raise UserError(
                f"{self.run.folder.checkpoint(self.start.step)}: its optimiser has other weights "
                f"({error}); --fresh starts the step over"
            ) from error
        self.scheduler.load_state_dict(content["scheduler_state"])

    def _advance_schedule(self, resumed: Resumed) -> None:
        """Load the momentum of another run's checkpoint; advance this command's schedule to its progress."""
        progress, opts = self.progress, self.run.opts
        updates = self.networks.context.updates // opts.epochs
        optimizer = self.trainer.optimizer
        missing = take_momentum(optimizer, self.networks.trained, resumed.content)
        whole = progress.batch == self.sampler.batches_per_epoch
        done = progress.epoch * updates + (updates if whole else progress.batch // opts.accumulate)
        advance(self.scheduler, done)
        log.info(
            "weights and momentum%s are from %s, the schedule is this command's: %d of %d updates are done, "
            "the learning rate is %.3g",
            f" (none for {missing})" if missing else "",
            resumed.path,
            done,
            opts.epochs * updates,
            max(group["lr"] for group in optimizer.param_groups),
        )

    def _check_learning_rate(self) -> None:
        """Raise if the learning rate is 0 for the rest of the step."""
        progress = self.progress
        left = progress.epoch + 1 < self.run.opts.epochs or progress.batch < self.sampler.batches_per_epoch
        if left and not any(group["lr"] for group in self.trainer.optimizer.param_groups):
            raise UserError(
                f"step {self.start.step}: the learning rate is 0 for the rest of the step; give another "
                "--lr or --lr_old, or start the step over with --fresh"
            )

    # ── saving ───────────────────────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """Write the checkpoint on rank 0; all processes wait for it and raise its errors."""
        world = self.run.world
        _check_finite(self.networks.trained)
        if self.run.opts.skip_corrupt:
            for reasons in distributed.gather_objects(self.run.tolerance.reasons):
                self.run.tolerance.note(reasons)
            self.progress.unreadable = set(self.run.tolerance.reasons)
        methods = self.method_states()
        # On the CPU: a gathered CUDA tensor would be on its original GPU in every process.
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

    @property
    def is_saved(self) -> bool:
        """Whether the checkpoint has this progress."""
        return self._saved_at == (self.progress.epoch, self.progress.batch)

    def _write(self, content: dict[str, Any]) -> None:
        with distributed.shared_errors():
            if self.run.world.is_main:
                save_checkpoint(self.run.folder.checkpoint(self.start.step), content)

    def method_states(self) -> dict[str, dict[str, Any]]:
        """States of the methods, by name.

        Raises:
            UserError: a method's state cannot be saved, or its own modules changed.
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
        """Content of a finished step's checkpoint, without the methods' states."""
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
        """Content needed only to resume the step."""
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

    # ── end of the step ──────────────────────────────────────────────────────────────────────────

    def add_score(self, score: float) -> None:
        """Record a validation's mIoU; with ``--keep best``, copy the state if it is the best so far."""
        progress = self.progress
        if self.run.opts.keep == "last":
            progress.best = max(progress.best, score)
        elif self._best is None or not score <= progress.best:  # a NaN score (no labels) also replaces it
            progress.best = score
            state = {
                "model_state": self.model.state_dict(),
                "modules": self.networks.own_modules.state_dict(),
                "method_state": self.method_states(),
            }
            copied = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), state)
            self._best = {"epoch": progress.epoch, **copied}

    def keep_best(self) -> None:
        """Make the best epoch's state the result of the step, in the model and in the checkpoint.

        The checkpoint then has no optimiser state, which is of the last epoch.
        """
        best = self._best
        assert best is not None  # the last epoch is always validated
        load_state(self.model, best["model_state"])
        self.networks.own_modules.load_state_dict(best.get("modules", {}))
        method_state = best["method_state"]
        self.chosen = True
        if self._has_end_step:
            # The checkpoint has rank 0's alone, so that a resumed run would otherwise differ.
            method_state = distributed.broadcast_object(method_state)
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
        """Call the methods' ``end_step``, with the same random seed in a resumed run."""
        self.ended = True
        if not self._has_end_step:
            return
        torch.manual_seed(self.run.opts.random_seed + self.start.step)
        for trained in self.networks.trained:
            trained.eval()
            # Running statistics differ between processes after the last batch; rank 0's are saved.
            distributed.broadcast_buffers(trained)
        for method in self.trainer.methods.values():
            call_hook(method, "end_step", self.networks.context)
        for trained in self.networks.trained:
            distributed.broadcast_weights(trained)
        _check_finite(self.networks.trained)


def _check_finite(networks: Sequence[nn.Module]) -> None:
    """Raise instead of saving weights that are not finite."""
    finite = [p.detach().isfinite().all() for network in networks for p in network.parameters()]
    if not bool(torch.stack(finite).all()):
        raise NonFiniteLoss(
            "the weights are not finite and are not saved; a lower --lr or --opt_level O0 may help"
        )
