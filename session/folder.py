"""What lies in a run's folder: its checkpoints, and which of them a step goes on from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argparser import Options
from modules import is_sdr_network
from runs.checkpoint import (
    check_fits,
    load_checkpoint,
    save_id,
    saved_options,
)
from runs.files import checkpoint_path
from session.resume import differences, is_trained, job_id, restarted
from utils import distributed
from utils.distributed import World
from utils.errors import UserError


@dataclass(frozen=True)
class Begun:
    """A checkpoint that a step goes on from.

    Attributes:
        path: its file.
        content: what it holds.
        own: this run wrote it; else it is that of ``--ckpt``.
    """

    path: Path
    content: dict[str, Any]
    own: bool

    @property
    def is_exact(self) -> bool:
        """Whether it is known to be trained with this run's options, so that its optimiser and schedule go on
        as they are. One of a release or of an early version does not say at which rate it was trained."""
        return self.own and "facts" in self.content


class RunFolder:
    """Files of a run under their published names.

    Args:
        opts: checked options.
        world: this process among the others.

    Attributes:
        path: ``<logdir>/<task>-<dataset>_<name>``.
        options: the options in JSON types, as checkpoints hold them.
    """

    def __init__(self, opts: Options, world: World) -> None:
        self.opts = opts
        self.world = world
        self.path: Path = opts.logdir / f"{opts.task}-{opts.dataset}_{opts.name}"
        self.options = opts.as_json()

    def checkpoint(self, step: int) -> Path:
        """Checkpoint of a step."""
        opts = self.opts
        path = checkpoint_path(opts.logdir, opts.task, opts.dataset, opts.name, step)
        return path if opts.checkpoint is None else opts.checkpoint / path.name

    def previous(self, step: int) -> Path:
        """Checkpoint of the step before, which may be another run's (``--step_ckpt``)."""
        opts = self.opts
        return opts.step_ckpt if opts.step_ckpt and step == opts.steps[0] else self.checkpoint(step - 1)

    def results(self, step: int) -> Path:
        """Results of a step; written last, they tell that it is done."""
        return self.path / f"results_{step}.json"

    def load(self, path: Path, step: int) -> dict[str, Any]:
        """A checkpoint that fits this run's network and task at a step.

        Raises:
            UserError: it is damaged, or of another network, task or step.
        """
        content = load_checkpoint(path)
        opts = self.opts
        check_fits(
            content,
            path=path,
            task=opts.task,
            dataset=opts.dataset,
            class_order=[list(ids) for ids in opts.task_.steps],
            step=step,
            model=opts.model,
            backbone=opts.backbone,
            norm_act=opts.norm_act,
            decoder=opts.decoder,
            sdr=is_sdr_network(vars(opts)),
            head=opts.head,
        )
        return content

    def load_previous(self, step: int) -> dict[str, Any]:
        """The checkpoint of the step before.

        Raises:
            UserError: there is none, it is not trained to its end, or it does not fit.
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
                f"{path}: step {step - 1} is not finished, it stands in epoch "
                f"{content['epoch'] + 1} of {epochs}; go on with --step {step - 1} first"
            )
        return content

    def facts(self, step: int, lr: float) -> dict[str, Any]:
        """What beside the options must be the same for a step to go on, by the words for a message."""
        return {
            "--lr": lr,
            "total batch": self.opts.batch_size * self.world.size,
            "number of processes": self.world.size,
            "previous step's checkpoint": None if step == 0 else save_id(self.previous(step)),
        }

    def begun(self, step: int, facts: dict[str, Any]) -> Begun | None:
        """The checkpoint that a step goes on from: this run's own, or ``--ckpt``, or none.

        Raises:
            UserError: it is of a run with other options, or cannot be continued.
        """
        opts, path = self.opts, self.checkpoint(step)
        content = self._own(path, step)
        if content is not None:
            self.check_same_run(step, content, facts)
            begun = Begun(path, content, own=True)
        elif opts.ckpt is not None:
            begun = Begun(opts.ckpt, self.load(opts.ckpt, step), own=False)
        else:
            return None
        epoch = int(begun.content["epoch"])
        trained = is_trained(begun.content, opts.epochs)
        if not begun.own and (trained or epoch >= opts.epochs):
            raise UserError(
                f"--ckpt {begun.path} stands in epoch {epoch + 1} and --epochs is {opts.epochs}: nothing is "
                "left to train; give more --epochs, counted from the step's start, or --test to evaluate it"
            )
        if "optimizer_state" not in begun.content and not trained:
            raise UserError(f"{begun.path} holds no optimiser state to continue from; give it to --step_ckpt")
        return begun

    def _own(self, path: Path, step: int) -> dict[str, Any] | None:
        """This run's checkpoint of a step if it goes on with it."""
        # A job that was requeued with --fresh goes on with what it has done itself.
        if not path.is_file() or not (self.opts.resume == "auto" or restarted()):
            return None
        content = self.load(path, step)
        if self.opts.resume == "fresh":
            return content if content.get("job") == job_id() != "" else None
        return content if self._is_own(content) else None

    def _is_own(self, content: dict[str, Any]) -> bool:
        """Whether this run wrote it, rather than one that began from another ``--ckpt``."""
        return bool(saved_options(content).get("ckpt") == self.options["ckpt"])

    def differences(self, content: dict[str, Any], facts: dict[str, Any]) -> list[str]:
        """What a checkpoint was trained with that this run has otherwise."""
        return differences(content, self.options, facts)

    def check_same_run(self, step: int, content: dict[str, Any], facts: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint that was trained with other options or facts.

        Raises:
            UserError: naming each difference.
        """
        if differing := self.differences(content, facts):
            raise UserError(
                f"{self.checkpoint(step)} was trained otherwise: {'; '.join(differing)}; give the same "
                "options to go on, --fresh to start the step over, or another --name"
            )

    def check_same_file(self, begun: Begun | None, step: int) -> None:
        """Refuse to go on where processes see different files. Every process must call it.

        Raises:
            UserError: on every process.
        """
        seen = distributed.gather_objects(None if begun is None else begun.content.get("save_id", ""))
        if len(set(seen)) > 1:
            raise UserError(
                f"{self.checkpoint(step)}: not the same file for every process; --logdir must be a folder "
                "that all machines share"
            )

    def is_done(self, begun: Begun, step: int) -> bool:
        """Whether a step is trained and evaluated."""
        trained = begun.own and is_trained(begun.content, self.opts.epochs)
        return trained and self.results(step).is_file()

    def learnt_iou(self, step: int) -> dict[str, float]:
        """IoU of each class after the step that learnt it, from the results of the earlier steps.

        Where the previous step is another run's (``--step_ckpt``), its results are in that run's folder.
        """
        learnt: dict[str, float] = {}
        for earlier in range(step):
            path = self.results(earlier)
            if self.opts.step_ckpt is not None and earlier < self.opts.steps[0]:
                path = self.opts.step_ckpt.parent / path.name
            if path.is_file():
                for name, iou in json.loads(path.read_text(encoding="utf-8"))["class_iou"].items():
                    if iou is not None:
                        learnt.setdefault(name, iou)
        return learnt
