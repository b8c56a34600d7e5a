"""The hooks of a method against forgetting, called by the training loop.

``train.py`` calls ``observe``, ``relabel`` and ``losses`` for every batch, ``after_backward`` and ``penalty``
for every optimiser step. It contains no method's name; a method handles no files, processes or options other
than its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from tasks import Task
from utils.lazy import torch
from utils.option_roles import OptionGroup


def identity(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself: the sum over one process."""
    return tensor


@dataclass
class Batch:
    """One batch and the outputs of both networks for it.

    Attributes:
        images: B×3×H×W, float32, normalised.
        targets: B×H×W, int64, class indices of the network, 255 void. ``relabel`` may replace it.
        original_targets: the targets before ``relabel``.
        incremental_step: 0 for the first step of the task.
        classes_old: number of classes before this step, background included.
        classes_new: number of classes that this step adds.
        outputs: the student's logits, B×C×H×W.
        features: the student's intermediates by name.
        outputs_old: the teacher's logits, B×C_old×H×W; None at step 0.
        features_old: the teacher's intermediates by name.
        image_weights: B; factor on each image's classification loss (PLOP's adaptive factor); optional.
        pixel_weights: B×H×W; factor on each pixel's classification loss (pseudo-label confidence); optional.
        extras: additional tensors of the samples, by name (``Method.extras``).
        epoch: number of the epoch, from 0.
    """

    images: torch.Tensor
    targets: torch.Tensor
    original_targets: torch.Tensor
    incremental_step: int
    classes_old: int
    classes_new: int
    outputs: torch.Tensor
    features: dict[str, Any] = field(default_factory=dict)
    outputs_old: torch.Tensor | None = None
    features_old: dict[str, Any] = field(default_factory=dict)
    image_weights: torch.Tensor | None = None
    pixel_weights: torch.Tensor | None = None
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    epoch: int = 0


@dataclass
class Context:
    """The step that is trained.

    Attributes:
        task: class order, with ``task.new_classes(step)`` etc.
        step: number of the step, from 0.
        protocol: "sequential", "disjoint", "overlapped" or "partitioned".
        model: the student, not wrapped by DistributedDataParallel.
        model_old: the teacher in evaluation mode, None at step 0.
        device: of the networks and batches of this process.
        fidelity: "paper" or "released" (docs/fidelity.md).
        batches: iterates once over this step's training images, as (images, targets) of a ``Batch``, in the
            order and with the crops of the first epoch; ``batches(epoch)``: of another epoch.
        reduce: sums a tensor over all processes, in place.
        cached: ``cached(name, inputs, compute)`` returns the dict of tensors that ``compute`` returned in an
            earlier start of this step, from a file, if its inputs were equal; else it computes and stores it.
            The networks, the ordered training images and all options always count as inputs; ``inputs`` is a
            JSON-like dict of additional ones.
        autocast: returns the context in which the loop runs the networks (``Precision.network``).
        epochs: number of epochs of the step.
        updates: number of optimiser steps of the step.
        lr: initial learning rate of the step, before any factor or warm-up.
    """

    task: Task
    step: int
    model: torch.nn.Module
    model_old: torch.nn.Module | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    protocol: str = "disjoint"
    fidelity: str = "paper"
    batches: Callable[..., Iterable[tuple[torch.Tensor, torch.Tensor]]] = lambda epoch=0: ()
    reduce: Callable[[torch.Tensor], torch.Tensor] = identity
    cached: Callable[
        [str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]], dict[str, torch.Tensor]
    ] = lambda name, inputs, compute: compute()
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    epochs: int = 1
    updates: int = 1
    lr: float = 0.0

    @property
    def classes_per_step(self) -> list[int]:
        """Number of classes of each step up to this one."""
        return self.task.classes_per_step(self.step)

    @property
    def classes_new(self) -> int:
        """Number of classes that this step adds (at step 0 with the background)."""
        return self.classes_per_step[-1]

    @property
    def classes_old(self) -> int:
        """Number of classes before this step, background included."""
        return sum(self.classes_per_step[:-1])


def needs_of_teacher(method: Method) -> frozenset[str]:
    """The teacher's intermediates that a method reads."""
    if method.teacher_needs is not None:
        return frozenset(method.teacher_needs)
    return frozenset(method.needs) if method.needs_teacher else frozenset()


class Method:
    """A method against forgetting, or one term of it. Subclasses override the hooks that they use.

    Attributes:
        needs: names of the student's intermediates that it reads; others are not computed.
        needs_teacher: it needs the network of the previous step, so it is disabled at step 0.
        teacher_needs: names of the teacher's intermediates that it reads; if not empty, the teacher's forward
            pass is run from step 1 on. None: ``needs`` if ``needs_teacher``, else none.
        replaces_classification: it computes the classification loss; ``Classification`` is disabled at every
            step at which this method is enabled.
        extras: additional tensors of the samples that it reads from ``batch.extras``: "saliency" (B×H×W bool;
            absent if the data set has no maps), "exemplar" (B bool; absent at a step without exemplars).
        classification: form of the classification loss that belongs to its own loss ("ce", "bce", "unce",
            "focal"), whatever the options say; None: theirs.
        classifier: kind of classifier that it needs, for ``--classifier``; None: any.
        differs_between_processes: its state differs between processes, so that of each process is saved.
        released_state: entries of its released program's checkpoints that are its ``state_dict()``.
    """

    needs: frozenset[str] = frozenset()
    needs_teacher: bool = False
    teacher_needs: frozenset[str] | None = None
    replaces_classification: bool = False
    extras: frozenset[str] = frozenset()
    classification: str | None = None
    classifier: str | None = None
    differs_between_processes: bool = False
    released_state: frozenset[str] = frozenset()

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher is run on every batch; False also where only its weights are read."""
        return self.needs_teacher or bool(self.teacher_needs)

    @classmethod
    def add_options(cls, group: OptionGroup) -> None:
        """Add the method's options to its group of the command line."""

    @classmethod
    def from_options(cls, opts: Any) -> Method | None:
        """The method with the values of its options; None if they disable it."""
        raise NotImplementedError

    @classmethod
    def implied_options(cls, opts: Any) -> dict[str, Any]:
        """Values of other options that enabling the method implies, unless typed or set by the preset.

        Called after the preset was applied; ``opts.typed`` has the names of the typed options.
        """
        return {}

    def from_previous_step(self, state: dict[str, Any]) -> None:
        """Receive the previous step's ``state_dict()``, before ``begin_step``."""

    def begin_step(self, context: Context) -> None:
        """Prepare a step: called once, after the new classes were added, before the optimiser is built."""

    def modules(self) -> dict[str, torch.nn.Module]:
        """Modules that the method trains beside the student (a projection head), by name.

        Build them in ``begin_step`` and return the same ones at every call. They are moved to the device and
        precision of the student, trained by the same optimiser with gradients averaged over all processes,
        and saved in the checkpoint. Their weights are named ``<Class>.<name>.<weight>``.

        A module starts from the weights that the previous step had under its name, if their names and shapes
        are equal, else as built. Modules are in training mode, in ``end_step`` in evaluation mode. A weight
        without gradient has gradient 0, with momentum and weight decay.
        """
        return {}

    def lr_factor(self, parameter: str) -> float:
        """Factor on the learning rate of a weight of the student or of a method's ``modules()``, by name."""
        return 1.0

    def weight_decay_factor(self, parameter: str) -> float:
        """Factor on the weight decay of a weight, by name as in ``lr_factor``."""
        return 1.0

    def observe(self, batch: Batch) -> None:
        """Read a batch before ``relabel`` (running statistics)."""

    def relabel(self, batch: Batch) -> None:
        """Replace ``batch.targets`` (pseudo-labels)."""

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Weighted loss terms, scalar tensors, by the name under which they are logged."""
        return {}

    def after_backward(self) -> None:
        """Read the gradients of the summed losses, averaged over all processes (importance estimates)."""

    def penalty(self) -> dict[str, torch.Tensor]:
        """Loss terms that are differentiated after ``after_backward``, by name: penalties on weights.

        A method that adds the term's gradient to the weights' itself returns the term detached.
        """
        return {}

    def end_step(self, context: Context) -> None:
        """Finish a step: called once, after the last batch, before the last checkpoint and the evaluation.

        It may change the weights of ``context.model``, which is in evaluation mode, and iterate over
        ``context.batches()``. Every process calls it; then the weights of process 0 are broadcast. A run that
        was killed before the last checkpoint was written calls it again when resumed, on the same weights.
        With ``--keep best`` the weights are those of the best epoch.
        """

    def state_dict(self) -> dict[str, Any]:
        """State for resuming and for the next step: tensors, numbers, strings, lists and dicts.

        The weights of ``modules()`` are saved separately.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of an interrupted run of this step, after ``begin_step``."""
