"""Which runs can be compared: groups of one task, methods in a group, seeds of a method, means over seeds."""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from argparser import build_parser
from utils.report.reading import Run

JOINT = "offline"  # the task that learns all classes at once, to which every task is compared

# Options that say where and how fast a run works, or which of several equal runs it is.
_NOT_THE_METHODS = {
    *("random_seed", "name", "date", "logdir", "data_root", "splits_dir", "checkpoint", "ckpt", "step_ckpt"),
    *("step", "steps", "lrs", "resume", "test", "where_to_sim", "local_rank", "num_workers", "timeout"),
    *("debug", "check_data", "skip_corrupt", "visualize", "sample_num", "print_interval", "val_interval"),
    *("ckpt_interval", "ckpt_minutes", "compile", "grad_checkpointing", "method_file"),
    *("predict", "out", "raw"),
}
_SEED = re.compile(r"[_-](?:seed|s)?\d+$")


@dataclass(frozen=True)
class Stat:
    """Mean over runs, and the sample standard deviation where there are several."""

    mean: float
    std: float | None
    count: int

    def percent(self) -> str:
        """``mean ± std`` of fractions, in percent."""
        mean = f"{100 * self.mean:.2f}"
        return mean if self.std is None else f"{mean} ± {100 * self.std:.2f}"


def stat(values: Iterable[float | None]) -> Stat | None:
    """Over the values that exist; None where there is none."""
    kept = [value for value in values if value is not None and not math.isnan(value)]
    if not kept:
        return None
    return Stat(statistics.fmean(kept), statistics.stdev(kept) if len(kept) > 1 else None, len(kept))


@dataclass(frozen=True)
class Method:
    """Runs that differ by their seed only."""

    label: str
    runs: list[Run]

    @property
    def joint(self) -> bool:
        """Whether it learns all classes at once."""
        return self.runs[0].task == JOINT

    @property
    def step(self) -> int | None:
        """The last step that any of its runs has results of."""
        return max((run.last_step for run in self.runs if run.last_step is not None), default=None)

    @property
    def class_names(self) -> list[str]:
        """Classes of the run that is farthest."""
        return max((run.class_names for run in self.runs), key=len)

    def introduced(self, name: str) -> int:
        """The step that brings a class."""
        return next(run.introduced[name] for run in self.runs if name in run.introduced)

    def stat(self, number: Callable[[Run], float | None]) -> Stat | None:
        """Mean of a number over the runs that have it."""
        return stat(number(run) for run in self.runs)

    def latest(self) -> list[Run]:
        """The runs that have results of ``step``: only these can be averaged."""
        return [run for run in self.runs if self.step is not None and run.last_step == self.step]

    def published_names(self) -> set[str]:
        """Names under which the table of published results may have it, in capitals."""
        options = self.runs[0].options
        method = options.get("method")
        names = {str(method or self.label).upper(), self.label.upper()}
        if self.joint:
            return {"JOINT"}
        if method and not method.endswith("-M") and options.get("memory"):
            names = {f"{method}-M".upper()}
        return names


@dataclass(frozen=True)
class Group:
    """Methods that learnt the same task under the same protocol with the same network."""

    dataset: str
    task: str
    protocol: str | None
    backbone: str | None
    methods: list[Method]

    @property
    def title(self) -> str:
        """All of them in one line."""
        task = "all classes at once" if self.task == JOINT else self.task
        return " · ".join(part for part in (self.dataset.upper(), task, self.protocol, self.backbone) if part)

    @property
    def slug(self) -> str:
        """The title as part of a file's name."""
        parts = (self.dataset, self.task, self.protocol, self.backbone)
        return re.sub(r"[^\w.-]+", "-", "_".join(part for part in parts if part)) or "runs"

    @property
    def first_classes(self) -> list[str]:
        """Classes of the first step, background included: the old ones of the papers' tables."""
        for method in self.methods:
            if not method.joint and method.class_names:
                return [name for name in method.class_names if method.introduced(name) == 0]
        return []

    @property
    def num_steps(self) -> int:
        """Steps of the task."""
        return max(run.num_steps for method in self.methods for run in method.runs)

    def means(self, run: Run, background: bool = True) -> dict[str, float | None]:
        """mIoU of a run after its last step as the papers count: old, new and all.

        Old are the classes of the first step, new those of all later steps; a results file of step k
        counts as new the classes of step k only.

        Args:
            run: one of the group.
            background: whether it counts among the old classes and in the mean of all.
        """
        step = run.last_step
        if step is None:
            return dict.fromkeys(("old", "new", "all"))
        if "class_iou" not in run.results[step]:
            return {key: run.results[step].get(f"miou_{key}") for key in ("old", "new", "all")}
        left_out = set() if background else {name for name in run.class_names[:1] if name == "background"}
        seen = [name for name in run.class_names if name not in left_out]
        old = [name for name in seen if name in set(self.first_classes)] if step or run.task == JOINT else []
        new = [name for name in seen if name not in set(old)]

        def mean(names: Sequence[str]) -> float | None:
            found = stat(run.iou(name, step) for name in names)
            return None if found is None else found.mean

        if not old:  # a first step, or joint training alone: there is nothing to set apart
            return {"old": None, "new": None, "all": mean(seen)}
        return {"old": mean(old), "new": mean(new), "all": mean(seen)}


def arrange(runs: Sequence[Run]) -> list[Group]:
    """Sort runs into groups; joint training joins every group of its data set and network."""
    keys: dict[tuple[Any, ...], list[Run]] = {}
    joint = [run for run in runs if run.task == JOINT]
    for run in runs:
        if run.task != JOINT:
            keys.setdefault((run.dataset, run.task, run.protocol, run.backbone), []).append(run)
    placed: set[Any] = set()
    groups = []
    for (dataset, task, protocol, backbone), members in keys.items():
        beside = [run for run in joint if (run.dataset, run.backbone) == (dataset, backbone)]
        placed.update(run.folder for run in beside)
        methods = [*_methods(members), *_methods(beside)]
        groups.append(Group(dataset, task, protocol, backbone, methods))
    alone: dict[tuple[Any, ...], list[Run]] = {}
    for run in joint:
        if run.folder not in placed:
            alone.setdefault((run.dataset, run.backbone), []).append(run)
    groups += [Group(key[0], JOINT, None, key[1], _methods(members)) for key, members in alone.items()]
    return groups


def _methods(runs: Sequence[Run]) -> list[Method]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run), []).append(run)
    members = list(found.values())
    labels = [_label(runs) for runs in members]
    methods = []
    for label, runs in zip(labels, members, strict=True):
        twins = [other for other, text in zip(members, labels, strict=True) if text == label]
        methods.append(Method(_told_apart(label, runs, twins), runs))
    return methods


def _key(run: Run) -> str:
    if not run.options:
        return f"name {_SEED.sub('', run.name)}"
    # A run of an earlier version lacks the options that came later, and did what is now their default.
    complete = {**_defaults(), **run.options}
    kept = {name: value for name, value in complete.items() if name not in _NOT_THE_METHODS}
    return json.dumps(kept, sort_keys=True)


@functools.cache
def _defaults() -> dict[str, Any]:
    """Every option's default, in JSON types as runs keep them."""
    defaults = vars(build_parser().parse_args([], namespace=argparse.Namespace()))
    return dict(json.loads(json.dumps(defaults, default=str)))


def _label(runs: Sequence[Run]) -> str:
    """The common name without seed, else the method's."""
    names = {_SEED.sub("", run.name) for run in runs}
    return names.pop() if len(names) == 1 else str(runs[0].options.get("method") or runs[0].name)


def _told_apart(label: str, runs: Sequence[Run], twins: Sequence[Sequence[Run]]) -> str:
    """A label that several methods would have gets the options in which they differ."""
    if len(twins) == 1:
        return label
    options = runs[0].options
    names = {name for twin in twins for name in twin[0].options} - _NOT_THE_METHODS
    shown = [
        f"{name}={options[name]}"
        for name in sorted(names)
        if name in options and len({str(twin[0].options.get(name)) for twin in twins}) > 1
    ]
    return f"{label} ({', '.join(shown[:3]) or runs[0].name})"
