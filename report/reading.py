"""Reads the folders of runs: options, results, histories, confusion matrices and sample images."""

from __future__ import annotations

import bisect
import filecmp
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from metrics.continual import Array
from runs.files import CONFUSION, HISTORY, OPTIONS, RESULTS, SAMPLES, step_file, step_files
from runs.history import StepHistory, read_history
from runs.options import base_folder, read_run_options
from runs.results import read_confusion, read_step_results
from tasks import DATASETS, Task, get_task
from utils.errors import UserError

JOINT = "offline"  # task of joint training, shown beside every task of the same classes
_FOLDER = re.compile(rf"(?P<task>.+)-(?P<dataset>{'|'.join(DATASETS)})_(?P<name>.+)")
_SAMPLE = re.compile(r"(\d+)_(?:input|truth|step(\d+))\.png")
_TRACES = (RESULTS.format(step="*"), HISTORY.format(step="*"), OPTIONS)


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Folders of all runs in the given folders, sorted by path, with or without results.

    A run that is reached by several paths is listed once, under the first path.

    Raises:
        UserError: a folder does not exist or contains no run.
    """
    runs: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            what = "is a file; give its folder" if folder.exists() else "no such folder; check the path"
            raise UserError(f"{folder}: {what}")
        found = sorted({path.parent for trace in _TRACES for path in folder.rglob(trace)})
        if not found:
            raise UserError(
                f"{folder}: contains no results_<step>.json; give the folder of a run, or one above it"
            )
        for run in found:
            runs.setdefault(run.resolve(), run)
    return list(runs.values())


def read_results(run: Path) -> dict[int, dict[str, Any]]:
    """Results of a run by step, as ``runs.results.write_results`` wrote them.

    Raises:
        UserError: a file cannot be read as results.
    """
    found = {step: read_step_results(run, step) for step in step_files(run, RESULTS)}
    return {step: content for step, content in found.items() if content is not None}


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder.

    Attributes:
        folder: its path.
        options: options of its last start; empty if not recorded.
        options_by_step: options of every step, with the step's ``lr``; for a first step trained by another
            run (``--step_ckpt``), that run's. Empty if the folder was written by a version without them.
        group: key of ``options``, equal for the seeds of one method; None if a version did not write it.
        group_by_step: keys of ``options_by_step`` that were written.
        steps: dataset class ids of every step of the task; empty if not recorded.
        task, dataset, name: from the options, else from the folder's name.
        results: by step, including a first step trained by another run.
        taken_over: name of the run that trained the step, for each step trained by another run.
        base: folder of that run, if it exists.
        histories: training history by step.
    """

    folder: Path
    options: dict[str, Any]
    options_by_step: dict[int, dict[str, Any]]
    group: str | None
    group_by_step: dict[int, str]
    steps: list[list[int]]
    task: str
    dataset: str
    name: str
    results: dict[int, dict[str, Any]]
    taken_over: dict[int, str]
    base: Path | None
    histories: dict[int, StepHistory]

    @property
    def protocol(self) -> str | None:
        """Protocol: disjoint, overlapped or sequential; None if unknown."""
        return self.options.get("protocol")

    @property
    def backbone(self) -> str | None:
        """Network, named as in the table of published results; None if unknown."""
        model = self.options.get("model")
        return f"deeplab-{self.options.get('backbone')}" if model == "deeplab" else model

    @property
    def classes(self) -> frozenset[int]:
        """Dataset class ids of the whole task; empty if not recorded."""
        return frozenset(chain(*self.steps))

    @property
    def joint(self) -> bool:
        """Whether it is joint training: of all classes in one step."""
        return len(self.steps) == 1 or (not self.steps and self.task == JOINT)

    @property
    def last_step(self) -> int | None:
        """The last step that this run trained and that has results."""
        return max((step for step in self.results if step not in self.taken_over), default=None)

    @property
    def finished(self) -> bool:
        """Whether the task's last step has results."""
        return self.last_step is not None and self.last_step + 1 == self.num_steps

    @property
    def num_steps(self) -> int:
        """Number of steps of the task; if not recorded, the number of steps found."""
        return len(self.steps) or max([*self.results, *self.histories], default=0) + 1

    @cached_property
    def introduced(self) -> dict[str, int]:
        """Step that introduces each class with results; class names in network order."""
        ends = list(accumulate(map(len, self.steps)))
        found: dict[str, int] = {}
        for step, results in self.results.items():
            for name, index in sorted(results["indices"].items(), key=lambda item: item[1]):
                guess = step if index >= results.get("old_classes", 0) else 0
                found.setdefault(name, bisect.bisect_right(ends, index) if ends else guess)
        return found

    @cached_property
    def class_ids(self) -> dict[str, int]:
        """Dataset class id of each class with results; the network's index if the steps are unknown."""
        order = [number for ids in self.steps for number in ids]
        found: dict[str, int] = {}
        for results in self.results.values():
            for name, index in results["indices"].items():
                found[name] = order[index] if index < len(order) else index
        return found

    @property
    def seed(self) -> int | None:
        """Random seed; None if not recorded."""
        return self.options.get("random_seed")

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """Evaluation options of its last results; None without results of this run."""
        step = self.last_step
        return None if step is None else dict(self.results[step].get("evaluation") or {})

    @property
    def class_names(self) -> list[str]:
        """Evaluated classes in network order."""
        return list(self.introduced)

    def iou(self, name: str, step: int) -> float | None:
        """IoU of a class after a step, a fraction; None if there is none."""
        value = self.results.get(step, {}).get("class_iou", {}).get(name)
        return None if value is None else float(value)

    def forgetting(self, name: str) -> float | None:
        """IoU of a class after the step that introduced it minus its IoU after the last step."""
        last = self.last_step
        if last is None or self.introduced[name] >= last:
            return None
        then, now = self.iou(name, self.introduced[name]), self.iou(name, last)
        return None if then is None or now is None else then - now

    def confusion(self, step: int) -> tuple[Array, list[str]] | None:
        """Confusion matrix (pixel counts) and class names after a step; None if not written."""
        path = step_file(self.folder, CONFUSION, step)
        return read_confusion(path) if path.is_file() else None

    @cached_property
    def samples(self) -> dict[int, dict[str, Path]]:
        """Paths of sample images by number, then by ``input``, ``truth`` and ``step<k>``.

        Steps trained by another run use that run's images, if both runs drew the same input image.
        """
        found = _samples(self.folder)
        theirs = {} if self.base is None else _samples(self.base)
        for number in found.keys() & theirs.keys():
            mine, others = found[number], theirs[number]
            if "input" not in mine or "input" not in others:
                continue
            if filecmp.cmp(mine["input"], others["input"], shallow=False):
                keys = {f"step{step}" for step in self.taken_over} & others.keys() - mine.keys()
                mine |= {key: others[key] for key in keys}
        return found

    @property
    def seconds(self) -> float | None:
        """Wall time in seconds of the training of all steps; None if not recorded."""
        return sum(history.seconds for history in self.histories.values()) or None

    @property
    def memory(self) -> float | None:
        """Peak memory in MiB over all steps; None if not recorded."""
        entries = [entry for history in self.histories.values() for entry in history.entries]
        return max((entry.memory for entry in entries if entry.memory is not None), default=None)

    @property
    def speed(self) -> float | None:
        """Median training speed in images per second; None if not recorded."""
        entries = [entry for history in self.histories.values() for entry in history.entries]
        speeds = sorted(r.images_per_second for r in entries if r.images_per_second is not None)
        return speeds[len(speeds) // 2] if speeds else None

    def state(self) -> str:
        """Progress of the run, for the page: "finished", or step, epoch and iteration."""
        if self.finished:
            return "finished"
        step = max([*self.histories, *self.results], default=0)
        if step in self.results and step not in self.taken_over:
            return f"step {step} of 0–{self.num_steps - 1} done"
        history = self.histories.get(step)
        if history is None or not history.entries:
            return f"step {step} started"
        point = history.entries[-1]
        age = time.time() - step_file(self.folder, HISTORY, step).stat().st_mtime
        of = f" of {self.options['epochs']}" if "epochs" in self.options else ""
        return f"step {step}, epoch {point.epoch}{of}, iteration {point.iteration}, {_ago(age)}"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: a file in it is damaged or unreadable.
    """
    known = read_run_options(folder)
    options, by_step, groups = known.options, known.by_step, known.group_by_step
    match = _FOLDER.fullmatch(folder.name)
    named = match.groupdict() if match else {"task": "", "dataset": "", "name": folder.name}
    task, dataset, name = (str(options.get(key, text)) for key, text in named.items())
    published = published_steps(dataset, task)
    steps = known.steps or published
    # A task of the user's own may have a published one's name; class orders change the order only.
    if sorted(chain(*steps)) == sorted(chain(*published)) and [*map(len, steps)] == [*map(len, published)]:
        task = canonical_task(dataset, task)
    results = read_results(folder)
    histories = {step: read_history(path) for step, path in step_files(folder, HISTORY).items()}
    taken_over: dict[int, str] = {}
    # As for the results themselves: a later command may have gone on without --step_ckpt.
    base = base_folder(folder, by_step[min(by_step)] if by_step else options)
    if base is not None:
        first = min([*results, *histories], default=0)
        for step, content in read_results(base).items():
            if step < first:
                results[step], taken_over[step] = content, base.name
        theirs = read_run_options(base)
        by_step |= {step: each for step, each in theirs.by_step.items() if step < first}
        groups |= {step: key for step, key in theirs.group_by_step.items() if step < first}
    return Run(
        folder=folder,
        options=options,
        options_by_step=dict(sorted(by_step.items())),
        group=known.group,
        group_by_step=groups,
        steps=steps,
        task=task,
        dataset=dataset,
        name=name,
        results=dict(sorted(results.items())),
        taken_over=taken_over,
        base=base,
        histories=histories,
    )


def _samples(folder: Path) -> dict[int, dict[str, Path]]:
    """Sample images of a run's folder by number, then by ``input``, ``truth`` and ``step<k>``."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted((folder / SAMPLES).glob("*.png")):
        if match := _SAMPLE.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[path.stem.split("_", 1)[1]] = path
    return dict(sorted(found.items()))


def canonical_task(dataset: str, task: str) -> str:
    """Canonical name of a published task; other names as they are."""
    return task if (known := _published_task(dataset, task)) is None else known.name


def published_steps(dataset: str, task: str) -> list[list[int]]:
    """Dataset class ids of every step of a published task; empty for other tasks."""
    known = _published_task(dataset, task)
    return [] if known is None else [list(ids) for ids in known.steps]


def _published_task(dataset: str, task: str) -> Task | None:
    if dataset in DATASETS and dataset != "folder":
        try:
            return get_task(dataset, task)
        except UserError:  # a task from the user's --task_file
            pass
    return None
