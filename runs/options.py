"""The options of a run in ``run.json``, and the key that groups the seeds of one method in a report."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from argparser import declared, with_implied
from runs.files import MANIFEST, OPTIONS, step_files
from utils.errors import UserError
from utils.files import atomic_write_text

_log = logging.getLogger(__name__)


@dataclass
class RunOptions:
    """The options of a run.

    Attributes:
        options: of the latest start, as JSON types; empty if unknown.
        steps: dataset class ids of every step of the task.
        group: ``group_key`` of ``options`` as it was written; None in files of earlier versions.
        by_step: options with which each step was trained, with the step's ``lr`` (one number); empty in files
            of versions that did not save them.
        group_by_step: ``group_key`` of each of ``by_step`` as it was written; empty in such files.
    """

    options: dict[str, Any] = field(default_factory=dict)
    steps: list[list[int]] = field(default_factory=list)
    group: str | None = None
    by_step: dict[int, dict[str, Any]] = field(default_factory=dict)
    group_by_step: dict[int, str] = field(default_factory=dict)


def write_run_options(
    run_dir: Path,
    options: Mapping[str, Any],
    steps: Sequence[Sequence[int]] = (),
    *,
    step: int | None = None,
    lr: float | None = None,
) -> None:
    """Write ``run.json``. Options of other steps, trained earlier, are kept.

    Args:
        run_dir: folder of the run, made if missing.
        options: of this start, as JSON types.
        steps: dataset class ids of every step of the task.
        step: the step to train with these options; replaces its earlier options.
        lr: learning rate of that step.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        known = read_run_options(run_dir)
    except UserError as error:
        _log.warning("%s; it is rewritten without the options of earlier steps", error)
        known = RunOptions()
    if step is not None:
        known.by_step[step] = {**options, "lr": lr}
        known.group_by_step[step] = group_key(known.by_step[step])
    content: dict[str, Any] = {
        "options": dict(options),
        "steps": [list(ids) for ids in steps],
        "group": group_key(options),
    }
    if known.by_step:
        content["options_by_step"] = {str(number): each for number, each in sorted(known.by_step.items())}
        content["group_by_step"] = {str(number): key for number, key in sorted(known.group_by_step.items())}
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    atomic_write_text(run_dir / OPTIONS, f"{text}\n")


def read_run_options(run_dir: Path) -> RunOptions:
    """Read ``run.json``, or without it the manifest of the last checkpoint; empty if there is neither.

    Raises:
        UserError: ``run.json`` is damaged.
    """
    path = run_dir / OPTIONS
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it") from error
        try:
            return _from_json(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: lacks the options and steps of a run; remove it") from error
    for manifest in reversed(step_files(run_dir, MANIFEST).values()) if run_dir.is_dir() else ():
        try:
            return _from_json(json.loads(manifest.read_text(encoding="utf-8"))["manifest"])
        except (OSError, ValueError, KeyError, TypeError):  # not a manifest
            continue
    return RunOptions()


def base_folder(run_dir: Path, options: Mapping[str, Any]) -> Path | None:
    """Folder of the run from whose checkpoint a run started (``--step_ckpt``), if it exists.

    Args:
        run_dir: folder of the run.
        options: of the run, or of its first step, as JSON types.
    """
    if not options.get("step_ckpt"):
        return None
    named = Path(options["step_ckpt"]).parent
    # Folders may have been moved, and earlier versions wrote the path as typed, relative to the run's working
    # directory; runs of one experiment share a parent folder.
    for candidate in (named, run_dir.parent / named.name):
        if candidate.is_dir() and candidate.resolve() != run_dir.resolve():
            return candidate
    return None


def _from_json(content: dict[str, Any]) -> RunOptions:
    options = dict(content["options"])
    by_step = {int(step): dict(each) for step, each in content.get("options_by_step", {}).items()}
    keys = {int(step): str(key) for step, key in content.get("group_by_step", {}).items()}
    steps = [[index(class_id) for class_id in step] for step in content["steps"]]
    return RunOptions(
        options=options,
        steps=steps,
        group=content.get("group"),
        by_step=dict(sorted(by_step.items())),
        group_by_step={step: key for step, key in keys.items() if step in by_step},
    )


def deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change the weights or the results, by name.

    Options missing in a run of an earlier version get the value that its other options imply, else their
    default. Options about folders, speed and the seed are excluded. The data folder counts, by its path as
    given: runs on two folders are different methods, as the folders may hold different images.
    """
    kept = {
        name: value for name, value in with_implied(options).items() if declared(name).tells_methods_apart
    }
    return {
        name: os.path.normpath(value) if declared(name).is_path and isinstance(value, str) else value
        for name, value in kept.items()
    }


def group_key(options: Mapping[str, Any]) -> str:
    """Hash of the deciding options that differ from their default: equal for the seeds of one method.

    An option added by a later version does not change the key while it has its default.
    """
    usual = deciding({})
    unusual = {name: value for name, value in deciding(options).items() if value != usual.get(name)}
    return hashlib.sha256(json.dumps(unusual, sort_keys=True).encode()).hexdigest()[:16]


def same_group(
    key: str | None, options: Mapping[str, Any], other_key: str | None, other_options: Mapping[str, Any]
) -> bool:
    """Whether two runs, or steps of runs, are seeds of one method.

    Their written keys are compared. Where a version wrote none, both are computed here, so that options of a
    ``--method_file`` that is not loaded count alike on both sides.
    """
    if key is None or other_key is None:
        return group_key(options) == group_key(other_options)
    return key == other_key
