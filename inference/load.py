"""Rebuilds a trained network from its checkpoint, whose manifest has its options, task and data set."""

from __future__ import annotations

import copy
import importlib.util
import logging
from argparse import Action
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argparser import Options, build_parser, declarations, declared, option_defaults, with_implied
from dataset import class_names
from methods.checks import preset_fault
from modules import NetworkSpec
from runs.checkpoint import (
    check_fits,
    load_checkpoint,
    model_state,
    network_shown,
    saved_options,
    with_current_names,
)
from segmentation_module import IncrementalSegmentationModule, load_state, make_model
from tasks import DATASETS, Task
from utils.errors import UserError
from utils.files import given_path
from utils.option_types import path_option

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network with its task, step and options.

    Attributes:
        model: in evaluation mode, on the CPU, float32.
        task: class order.
        step: the last step that it was trained on.
        opts: the user's options, completed by those of the checkpoint's manifest.
        class_names: by dataset class id.
    """

    model: IncrementalSegmentationModule
    task: Task
    step: int
    opts: Options
    class_names: tuple[str, ...]

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Dataset class id of each of the network's classes."""
        return self.task.seen_classes(self.step)


def model_from_checkpoint(path: Path, opts: Options) -> TrainedNetwork:
    """Rebuild the network of a checkpoint.

    Typed options override the manifest, and must fit the weights. A checkpoint without manifest needs
    ``--task`` and ``--step`` typed, and one that is not a released program's also the network's options.

    Args:
        path: file of the checkpoint.
        opts: checked options; ``opts.typed`` names those that the user typed.

    Raises:
        UserError: the file is missing or damaged, has no manifest and needed options were not typed, or does
            not fit the typed options.
    """
    content = load_checkpoint(path)
    opts = _completed(opts, saved_options(content), path)
    task, step = _task_and_step(opts, content, path)
    opts.task_, opts.task, opts.dataset = task, task.name, task.dataset
    opts.step, opts.steps = [str(step)], [step]
    known = len(opts.notes)
    opts = with_network_of(content, opts, path, task, step)
    for note in opts.notes[known:]:
        log.info(note)
    try:
        spec = NetworkSpec.of(opts)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    check_fits(content, path=path, task=task, step=step, spec=spec)
    model = load_model(spec, with_current_names(content, spec), path, task, step)
    names = _class_names(task, opts.data_root)
    return TrainedNetwork(model.eval(), task, step, opts, names)


def load_model(
    spec: NetworkSpec, content: Mapping[str, Any], path: Path, task: Task, step: int
) -> IncrementalSegmentationModule:
    """Build a network and load a checkpoint's weights; their names must match exactly.

    Args:
        spec: architecture of the network.
        content: returned by ``load_checkpoint``.
        path: of the checkpoint, for error messages.
        task: class order.
        step: the last step that the network was trained on.

    Raises:
        UserError: the weights are of another network.
    """
    model = make_model(spec, task.classes_per_step(step), task.later_classes_per_step(step))
    try:
        load_state(model, model_state(content))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return model


def with_network_of(
    content: Mapping[str, Any],
    opts: Options,
    path: Path,
    task: Task,
    step: int,
    *,
    trains: bool = False,
    norm_act: str | None = None,
) -> Options:
    """A copy of the options with what the weights of a released checkpoint show, and a note about it.

    Options that were typed, or set by a method, stay as they are, and must fit.

    Args:
        content: of ``load_checkpoint``.
        opts: checked options.
        path: of the checkpoint, for the note.
        task: class order.
        step: of the checkpoint.
        trains: the kind of classifier and ``--fidelity`` stay too: they belong to the run's methods.
        norm_act: of the run so far, which it keeps where inplace-abn was installed or removed since; None: it
            starts.
    """
    shown = network_shown(content, task, step)
    if shown.pop("released_resnet", False):
        shown["fidelity"] = "released"
    in_place = opts.opt_level != "O3" and importlib.util.find_spec("inplace_abn") is not None
    if shown.get("norm_act") == "sync":
        del shown["norm_act"]  # the weights of std
    elif shown.get("norm_act") == "iabn_sync":
        # The second computes the same without inplace-abn, which has no bfloat16; not synchronised.
        kinds = ("iabn_sync", "iabn_sync_test")
        shown["norm_act"] = norm_act if norm_act in kinds else kinds[not in_place]
    usual = option_defaults()
    taken = {
        name: value
        for name, value in shown.items()
        if name not in opts.typed and getattr(opts, name) == usual[name] != value
        if not (trains and name in ("classifier", "fidelity"))
    }
    completed = copy.copy(opts)
    vars(completed).update(taken)
    if taken:
        listed = ", ".join(f"{name}={value}" for name, value in taken.items())
        completed.notes = [*opts.notes, f"options from {path}: {listed}"]
    return completed


def as_trained(opts: Options, content: Mapping[str, Any], path: Path) -> tuple[Options, dict[str, str]]:
    """The options of a test, completed by those of the checkpoint's manifest; the log names these.

    Args:
        opts: checked options.
        content: of ``load_checkpoint``.
        path: of the checkpoint.

    Returns:
        A copy in which network and data are as in training unless they were typed; and, by name, what was
        typed otherwise, e.g. ``--crop_size 512, trained with 32``; not the seed, nor where the data are.

    Raises:
        UserError: the manifest has an invalid value.
    """
    saved, typed = saved_options(content), opts.as_json()
    completed = _completed(opts, saved, path)
    taken = [f"{name}={value}" for name, value in completed.as_json().items() if value != typed[name]]
    if taken:
        log.info("options from %s: %s", path, ", ".join(taken))
    differing = {}
    for option in declarations():
        name = option.name
        decides = option.comes_with_checkpoint and option.tells_methods_apart
        if decides and not option.says_where_data_are and name in opts.typed & saved.keys():
            was, now = (option.as_typed(values[name]) for values in (saved, typed))
            if was != now:
                differing[name] = f"{option.flag} {now}, trained with {was}"
    return completed, differing


def _completed(opts: Options, saved: Mapping[str, Any], path: Path) -> Options:
    """A copy of the options in which the manifest's values replace those that were not typed."""
    completed = copy.copy(opts)
    if saved:
        saved = with_implied(saved)
    actions = {action.dest: action for action in build_parser()._actions}
    brought = (option.name for option in declarations() if option.comes_with_checkpoint)
    for name in brought:
        if name in saved and name not in opts.typed:
            setattr(completed, name, _value(actions[name], saved[name], path))
    return completed


def _value(action: Action, value: Any, path: Path) -> Any:
    """A manifest's value of an option, converted as the parser does."""
    if action.type is path_option and isinstance(value, str):
        return given_path(value)  # an earlier version may have saved it with ~
    if reason := preset_fault(action, value):
        raise _bad_manifest(path, f"{value!r} for --{action.dest}: {reason}")
    return value


def _task_and_step(opts: Options, content: Mapping[str, Any], path: Path) -> tuple[Task, int]:
    typed_task = opts.task_ if any(declared(name).chooses_task for name in opts.typed) else None
    typed_step = opts.steps[0] if "step" in opts.typed else None
    manifest = content.get("manifest")
    if manifest is None:
        if typed_task is None or typed_step is None:
            raise UserError(
                f"{path}: has no manifest; type --dataset, --task and --step, and, unless it is a released "
                "program's, --model, --backbone, --norm_act, --head, --two_branches, --decoder, --classifier "
                "and --fidelity where they differ from the defaults"
            )
        return typed_task, typed_step
    if not isinstance(manifest, Mapping):
        raise _bad_manifest(path, "no dictionary")
    task = typed_task or _manifest_task(manifest, opts, path)
    step = manifest.get("step") if typed_step is None else typed_step
    if type(step) is not int or not 0 <= step < task.num_steps:
        raise _bad_manifest(path, f"{step!r} for --step")
    return task, step


def _manifest_task(manifest: Mapping[str, Any], opts: Options, path: Path) -> Task:
    name, steps = manifest.get("task"), manifest.get("steps")
    dataset = opts.dataset if "dataset" in opts.typed else manifest.get("dataset")
    if dataset not in DATASETS or not isinstance(name, str):
        raise _bad_manifest(path, f"{dataset!r} for --dataset, {name!r} for --task")
    if not (isinstance(steps, list) and steps and all(_is_step(step) for step in steps)):
        raise _bad_manifest(path, "no steps with class ids")
    return Task(name, dataset, tuple(tuple(classes) for classes in steps))


def _is_step(classes: object) -> bool:
    ids = classes if isinstance(classes, list) else []
    return bool(ids) and all(type(class_id) is int and 0 <= class_id < 255 for class_id in ids)


def _bad_manifest(path: Path, what: str) -> UserError:
    return UserError(f"{path}: its manifest has {what}; give another checkpoint")


def _class_names(task: Task, data_root: Path) -> tuple[str, ...]:
    try:
        names = class_names(task.dataset, data_root)
    except UserError as error:  # a user's data set that is not on this machine
        log.warning("%s; classes are shown by their ids. Give the data set's folder by --data_root", error)
        names = ()
    return names + tuple(f"class {c}" for c in range(len(names), max(task.order) + 1))
