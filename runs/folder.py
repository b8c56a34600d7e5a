"""A run's folder: its checkpoints, and the one from which a step is resumed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argparser import Options
from modules import NetworkSpec
from runs.checkpoint import (
    check_fits,
    load_checkpoint,
    save_id,
    saved_options,
    with_current_names,
)
from runs.files import CHECKPOINT, RESULTS, run_folder, step_file
from runs.options import base_folder, read_run_options
from runs.results import read_step_results
from runs.resume import differences, is_trained, job_id, restarted
from utils import distributed
from utils.distributed import World
from utils.errors import UserError
from utils.files import companion
from utils.hub import local_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """A checkpoint from which a step is resumed.

    Attributes:
        path: its file.
        content: its content.
        own: whether this run wrote it; else it is the one of ``--ckpt``.
    """

    path: Path
    content: dict[str, Any]
    own: bool

    @property
    def is_exact(self) -> bool:
        """Whether it was trained with this run's options, so that optimiser and schedule are restored.

        Checkpoints of released code and of early versions have no fingerprint with the learning rate.
        """
        return self.own and "facts" in self.content


@dataclass(frozen=True)
class Start:
    """How a step starts.

    Attributes:
        step: its number.
        lr: its learning rate.
        fingerprint: values besides the options that a checkpoint to resume from must share, by their names in
            messages; digests of the images are added after loading the data.
        resumed: the checkpoint to resume from; None: start from the beginning.
    """

    step: int
    lr: float
    fingerprint: dict[str, Any]
    resumed: Resumed | None


class RunFolder:
    """Files of a run.

    Attributes:
        path: ``<logdir>/<task>-<dataset>_<name>``.
        options: the options in JSON types, as saved in checkpoints.
        spec: of the network.
    """

    def __init__(self, opts: Options, world: World) -> None:
        self.opts = opts
        self.world = world
        self.path: Path = run_folder(opts.logdir, opts.task, opts.dataset, opts.name)
        self.options = opts.as_json()
        for name in ("ckpt", "step_ckpt"):  # a later command may run in another working directory
            path = getattr(opts, name)
            if path is not None and local_file(path) == path:
                self.options[name] = str(path.absolute())
        self.spec = NetworkSpec.of(opts)

    def checkpoint(self, step: int) -> Path:
        """Checkpoint of a step."""
        opts = self.opts
        path = step_file(self.path, CHECKPOINT, step)
        return path if opts.checkpoint is None else opts.checkpoint / path.name

    def previous(self, step: int) -> Path:
        """Checkpoint of the previous step, possibly of another run (``--step_ckpt``)."""
        opts = self.opts
        own = not opts.step_ckpt or step != opts.steps[0]
        return self.checkpoint(step - 1) if own else local_file(opts.step_ckpt)

    def results(self, step: int) -> Path:
        """Results file of a step; written last, it marks the step as done."""
        return step_file(self.path, RESULTS, step)

    def tested(self, step: int) -> Path:
        """The checkpoint that ``--test`` evaluates: ``--ckpt``, else this run's.

        Raises:
            UserError: this run has a checkpoint of the step, whose results those of another would replace.
        """
        own, given = self.checkpoint(step), self.opts.ckpt
        if given is not None and own.is_file() and local_file(given).resolve() != own.resolve():
            raise UserError(
                f"{own}: this run trained step {step} itself; --ckpt {given} would replace its results: "
                "give another --name"
            )
        return given or own

    def load(self, path: Path, step: int) -> dict[str, Any]:
        """Load a checkpoint and check that it is of this run's network, task and step.

        Raises:
            UserError: it is damaged, or of another network, task or step.
        """
        return self.fitting(load_checkpoint(path), path, step)

    def fitting(self, content: dict[str, Any], path: Path, step: int) -> dict[str, Any]:
        """A loaded checkpoint, with this program's names, if it is of this run's network, task and step.

        Raises:
            UserError: it is not.
        """
        local = local_file(path)
        if (beside := companion(local)) != local and beside.is_file():
            content = {**load_checkpoint(beside), **content}
        check_fits(content, path=path, task=self.opts.task_, step=step, spec=self.spec)
        return with_current_names(content, self.spec)

    def load_previous(self, step: int) -> dict[str, Any]:
        """Load the checkpoint of the previous step.

        Raises:
            UserError: it does not exist, its training is not finished, or it does not fit.
        """
        path = self.previous(step)
        if not path.is_file():
            raise UserError(
                f"{path}: no checkpoint of step {step - 1}; train --step {step - 1} first, "
                "or name another with --step_ckpt"
            )
        content = self.load(path, step - 1)
        epochs = saved_options(content).get("epochs")
        if epochs is not None and not is_trained(content, epochs):
            raise UserError(
                f"{path}: step {step - 1} is not finished, it is in epoch "
                f"{content['epoch'] + 1} of {epochs}; finish --step {step - 1} first"
            )
        return content

    def start(self, step: int, lr: float) -> Start:
        """How a step starts. Every process must call it.

        Raises:
            UserError: the checkpoint to resume from is of a run with other options, cannot be continued, or
                is not the same file for every process.
        """
        with distributed.shared_errors():
            fingerprint = {
                "--lr": lr,
                "total batch": self.opts.batch_size * self.world.size,
                "number of processes": self.world.size,
                "previous step's checkpoint": None if step == 0 else save_id(self.previous(step)),
            }
            resumed = self._resumed(step, fingerprint)
        seen = distributed.gather_objects(None if resumed is None else resumed.content.get("save_id", ""))
        if len(set(seen)) > 1:
            raise UserError(
                f"{self.checkpoint(step)}: not the same file for every process; --logdir must be a folder "
                "that all machines share"
            )
        return Start(step, lr, fingerprint, resumed)

    def _resumed(self, step: int, fingerprint: dict[str, Any]) -> Resumed | None:
        """The checkpoint to resume a step from: this run's own, else ``--ckpt``, else None."""
        opts, path = self.opts, self.checkpoint(step)
        content = self._own(path, step)
        if content is not None:
            self.check_same_run(step, content, fingerprint)
            resumed = Resumed(path, content, own=True)
        elif opts.ckpt is not None:
            resumed = Resumed(opts.ckpt, self.load(opts.ckpt, step), own=False)
        else:
            return None
        if "epoch" not in resumed.content:
            raise UserError(
                f"--ckpt {resumed.path} does not say its epoch; give it to --step_ckpt, or --test"
            )
        epoch = int(resumed.content["epoch"])
        trained = is_trained(resumed.content, opts.epochs)
        if not resumed.own and (trained or epoch >= opts.epochs):
            raise UserError(
                f"--ckpt {resumed.path} is in epoch {epoch + 1} and --epochs is {opts.epochs}: nothing "
                "is left to train; give more --epochs, counted from the step's start, or --test"
            )
        if "optimizer_state" not in resumed.content and not trained:
            raise UserError(
                f"{resumed.path} holds no optimiser state to continue from; give it to --step_ckpt"
            )
        return resumed

    def _own(self, path: Path, step: int) -> dict[str, Any] | None:
        """This run's checkpoint of a step if the step is to be resumed from it, else None."""
        # A job that was requeued with --fresh resumes its own checkpoint.
        if not path.is_file() or not (self.opts.resume == "auto" or restarted()):
            return None
        content = self.load(path, step)
        if self.opts.resume == "fresh":
            return content if content.get("job") == job_id() != "" else None
        if self.opts.ckpt is None:
            return content
        was = saved_options(content).get("ckpt")
        if was is not None and Path(was).absolute() == Path(self.options["ckpt"]).absolute():
            return content
        if path.absolute() == Path(self.options["ckpt"]).absolute():
            return None  # the run goes on from its own checkpoint with other options
        begun = "without --ckpt" if was is None else f"from --ckpt {was}"
        raise UserError(
            f"{path}: step {step} was begun {begun}, now --ckpt {self.opts.ckpt}; give the same one, or "
            "none, to resume it, --fresh to start the step over, or another --name"
        )

    def differences(self, content: dict[str, Any], fingerprint: dict[str, Any]) -> list[str]:
        """Differences between a checkpoint's options and fingerprint and this run's; see ``differences``."""
        return differences(content, self.options, fingerprint)

    def check_same_run(self, step: int, content: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Check that a checkpoint was trained with this run's options and fingerprint.

        Raises:
            UserError: naming each difference.
        """
        if differing := self.differences(content, fingerprint):
            raise UserError(
                f"{self.checkpoint(step)} was trained differently: {'; '.join(differing)}; give the same "
                "options to resume it, --fresh to start the step over, or another --name"
            )

    def is_done(self, resumed: Resumed, step: int) -> bool:
        """Whether a step is trained and evaluated."""
        trained = resumed.own and is_trained(resumed.content, self.opts.epochs)
        return trained and self.results(step).is_file()

    def earlier_results(self, step: int) -> dict[int, dict[str, Any]]:
        """Results of the steps before a step, by step; a file that cannot be read is logged and left out.

        Results of the steps before this run's first are read from the folder of the checkpoint that it
        started from (``--step_ckpt``, of this command or of the one that trained the first step).
        """
        first, folder = self._origin()
        found: dict[int, dict[str, Any]] = {}
        for earlier in range(step):
            theirs = folder if folder is not None and earlier < first else self.path
            fault = "its results file is missing"
            try:
                content = read_step_results(theirs, earlier)
            except UserError as error:
                content, fault = None, str(error)
            if content is None:
                # This step is trained already: it is reported without what depends on that file.
                log.warning("forgetting and average lack step %d of %s: %s", earlier, theirs, fault)
            else:
                found[earlier] = content
        return found

    def _origin(self) -> tuple[int, Path | None]:
        """First step of this run, and the folder of the run from whose checkpoint it started, if any."""
        if self.opts.step_ckpt is not None:
            return self.opts.steps[0], local_file(self.opts.step_ckpt).parent
        try:
            by_step = read_run_options(self.path).by_step
        except UserError:  # a damaged run.json, which the start of the training has reported
            by_step = {}
        first = min(by_step, default=0)
        options = by_step.get(first, {})
        named = Path(options.get("step_ckpt") or "")
        try:
            file = local_file(named)
        except UserError as error:
            log.warning("%s: forgetting and average lack the steps before %d", error, first)
            return first, None
        if file != named:
            return first, file.parent
        return first, base_folder(self.path, options)
