"""Arranges runs for comparison: groups of one task, methods of a group, seeds of a method."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from argparser import declared, option_defaults
from report.reading import JOINT, Run
from runs.options import deciding, same_group
from tasks import DATASETS, get_task
from utils.errors import UserError

MEANS = ("first", "later", "all")  # classes of step 0, of all later steps, and all of them
Item = TypeVar("Item")

_ORDER = {"class_order", "class_order_seed"}
_SEED = re.compile(r"[_-](?:seed|s)?\d+$")


@dataclass(frozen=True)
class Stat:
    """Mean over runs, and the sample standard deviation if there are several."""

    mean: float
    std: float | None
    count: int

    def percent(self) -> str:
        """``mean ± std`` in percent, from fractions."""
        mean = f"{100 * self.mean:.2f}"
        return mean if self.std is None else f"{mean} ± {100 * self.std:.2f}"


def stat(values: Iterable[float | None]) -> Stat | None:
    """Statistics of the values that are neither None nor NaN; None if there are no values."""
    kept = [value for value in values if value is not None and not math.isnan(value)]
    if not kept:
        return None
    return Stat(statistics.fmean(kept), statistics.stdev(kept) if len(kept) > 1 else None, len(kept))


@dataclass(frozen=True)
class Method:
    """Runs of one method that differ by their seed only."""

    label: str
    runs: list[Run]

    @property
    def joint(self) -> bool:
        """Whether it is joint training of all classes."""
        return self.runs[0].joint

    @property
    def step(self) -> int | None:
        """The last step with results in any of its runs."""
        return max((run.last_step for run in self.runs if run.last_step is not None), default=None)

    @property
    def class_names(self) -> list[str]:
        """Classes of the run with most steps done."""
        return max((run.class_names for run in self.runs), key=len)

    def introduced(self, name: str) -> int:
        """The step that introduces a class."""
        return next(run.introduced[name] for run in self.runs if name in run.introduced)

    def stat(self, number: Callable[[Run], float | None]) -> Stat | None:
        """Mean of ``number(run)`` over the runs for which it is not None."""
        return stat(number(run) for run in self.runs)

    def latest(self) -> list[Run]:
        """The runs with results of ``step``; only these are averaged."""
        return [run for run in self.runs if self.step is not None and run.last_step == self.step]

    def published_names(self) -> set[str]:
        """Names of the method in the table of published results, in upper case."""
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
    """Methods with the same task, protocol and network."""

    dataset: str
    task: str
    protocol: str | None
    backbone: str | None
    methods: list[Method]

    @property
    def title(self) -> str:
        """Data set, task, protocol and network in one line."""
        task = "all classes at once" if self.task == JOINT else task_title(self.dataset, self.task)
        return " · ".join(part for part in (self.dataset.upper(), task, self.protocol, self.backbone) if part)

    @property
    def slug(self) -> str:
        """The title as part of a file name."""
        parts = (self.dataset, self.task, self.protocol, self.backbone)
        return re.sub(r"[^\w.-]+", "-", "_".join(part for part in parts if part)) or "runs"

    @property
    def first_classes(self) -> list[str]:
        """Classes of the first step, with the background; none if the class orders differ in them."""
        found = [
            [name for name in method.class_names if method.introduced(name) == 0]
            for method in self.methods
            if not method.joint and method.class_names
        ]
        return found[0] if found and all(set(names) == set(found[0]) for names in found) else []

    @property
    def num_steps(self) -> int:
        """Number of steps of the task."""
        return max(run.num_steps for method in self.methods for run in method.runs)

    def means(
        self, run: Run, background: str = "with", *, step: int | None = None
    ) -> dict[str, float | None]:
        """mIoU of a run over first, later and all classes, as the papers count.

        Args:
            run: one of the group.
            background: convention of the means, see ``report.published``: "without" leaves the background out
                of all of them, "all only" out of "first"; every other one counts it.
            step: after which step; None: the run's last.
        """
        step = run.last_step if step is None else step
        if step is None or step not in run.results:
            return dict.fromkeys(MEANS)
        # Runs of a group may have different class orders; joint training has no first step of its own.
        names = [name for name in run.class_names if run.introduced[name] <= step]
        first = set(self.first_classes) if run.joint else {n for n in names if run.introduced[n] == 0}

        def mean(which: Iterable[str], with_background: bool) -> float | None:
            found = stat(run.iou(name, step) for name in which if with_background or name != "background")
            return None if found is None else found.mean

        return {
            "first": mean((n for n in names if n in first), background not in ("without", "all only")),
            "later": mean((n for n in names if n not in first), True) if first else None,
            "all": mean(names, background != "without"),
        }


@dataclass(frozen=True)
class Orders:
    """A method trained with several class orders, which have a ``Method`` each.

    Attributes:
        label: of the method.
        methods: one for each order, with results of the task's last step.
    """

    label: str
    methods: list[Method]

    def means(self, group: Group) -> dict[str, Stat | None]:
        """Mean and standard deviation over the orders; the seeds of an order are averaged first."""
        by_order = [[group.means(run) for run in method.latest()] for method in self.methods]
        averaged = [{key: stat(mean[key] for mean in means) for key in MEANS} for means in by_order]
        return {
            key: stat(number.mean for each in averaged if (number := each[key]) is not None) for key in MEANS
        }


def orders_of(group: Group) -> list[Orders]:
    """The methods of a group that were trained with several class orders."""
    found: list[list[Method]] = []
    for method in group.methods:
        run = method.latest()[0] if method.latest() else None
        if run is None or method.joint or not run.finished:
            continue
        _join(found, method, lambda one, other: _differs_by_order(one.latest()[0], other.latest()[0]))
    several = [methods for methods in found if len(methods) > 1]
    return [Orders(_label([run for method in one for run in method.runs]), one) for one in several]


def _join(sets: list[list[Item]], item: Item, fits: Callable[[Item, Item], bool]) -> None:
    """Add an item to the first set all of whose items it fits, or to a new one."""
    for members in sets:
        if all(fits(item, member) for member in members):
            members.append(item)
            return
    sets.append([item])


def _differs_by_order(one: Run, other: Run) -> bool:
    """Whether two runs have other class orders and the same learning options at every step."""

    def without_order(run: Run) -> dict[int, dict[str, Any]]:
        by_step = run.options_by_step or {0: run.options}
        return {
            step: {name: value for name, value in deciding(options).items() if name not in _ORDER}
            for step, options in by_step.items()
        }

    return one.steps != other.steps and without_order(one) == without_order(other)


def arrange(runs: Sequence[Run]) -> list[Group]:
    """Sort runs into groups, best methods first.

    Joint training joins all groups of its data, network and classes.
    """
    keys: dict[tuple[Any, ...], list[Run]] = {}
    joint = [run for run in runs if run.joint]
    for run in runs:
        if not run.joint:
            keys.setdefault((run.dataset, run.task, run.protocol, run.backbone), []).append(run)
    placed: set[Any] = set()
    groups = []
    for (dataset, task, protocol, backbone), members in keys.items():
        classes = {run.classes for run in members}
        beside = [
            run
            for run in joint
            if (run.dataset, run.backbone) == (dataset, backbone)
            and (not run.classes or classes & {run.classes, frozenset()})  # empty: not recorded
        ]
        placed.update(run.folder for run in beside)
        groups.append(_ranked(Group(dataset, task, protocol, backbone, _methods([*members, *beside]))))
    alone: dict[tuple[str, str, None, str | None], list[Run]] = {}
    for run in joint:
        if run.folder not in placed:
            alone.setdefault((run.dataset, run.task, None, run.backbone), []).append(run)
    groups += [_ranked(Group(*key, _methods(runs))) for key, runs in alone.items()]
    return groups


def _ranked(group: Group) -> Group:
    """The group with methods sorted by completed step, then mIoU over all classes; joint training last."""

    def place(method: Method) -> tuple[bool, int, float, str]:
        found = stat(group.means(run)["all"] for run in method.latest())
        step = -1 if method.step is None else method.step
        return method.joint, -step, -(found.mean if found else 0.0), method.label

    return dataclasses.replace(group, methods=sorted(group.methods, key=place))


def task_title(dataset: str, task: str) -> str:
    """A task's name, preceded by its name in the papers if that differs: 15-1 (15-5s)."""
    match = re.fullmatch(r"(\d+)-(\d+)s(_?[a-z])?", task)
    if match and dataset in DATASETS and dataset != "folder":
        first, rest, letter = match[1], match[2], match[3] or ""
        for usual in (f"{first}-1{letter}", f"{first}-{rest}-1{letter}"):
            try:
                if get_task(dataset, usual).name == task:
                    return f"{usual} ({task})"
            except UserError:  # there is no such task
                continue
    return task


# ── runs of one method ───────────────────────────────────────────────────────────────────────────────


def _methods(runs: Sequence[Run]) -> list[Method]:
    members = [part for seeds in _alike(runs) for part in _without_repeated_seeds(seeds)]
    labels = [_with_evaluation(_label(runs), runs, members) for runs in members]
    methods: list[Method] = []
    for label, runs in zip(labels, members, strict=True):
        twins = [other for other, text in zip(members, labels, strict=True) if text == label]
        unique = _unique_label(label, runs, twins)
        known = {method.label for method in methods}
        methods.append(Method(f"{unique} ({runs[0].folder})" if unique in known else unique, runs))
    return methods


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Sets of runs that differ by their seed only, in the order given."""
    found: list[list[Run]] = []
    # Most steps first: a run still in its first step may fit several sets, and joins the first of them.
    for run in sorted(runs, key=lambda run: -len(run.options_by_step)):
        _join(found, run, _same_method)
    place = {run.folder: number for number, run in enumerate(runs)}
    ordered = [sorted(others, key=lambda run: place[run.folder]) for others in found]
    return sorted(ordered, key=lambda others: place[others[0].folder])


def _same_method(one: Run, other: Run) -> bool:
    """Whether two runs have the same learning options at every step that both have.

    If one has steps that the other lacks, or the last step is missing, the options that differ may not be
    recorded yet; then their names without seed must be equal too.
    """
    if one.task != other.task or bool(one.options) != bool(other.options):
        return False
    if one.steps and other.steps and one.steps != other.steps:  # a class order or task file that was changed
        return False
    if None not in (one.evaluation, other.evaluation) and _unusual(one) != _unusual(other):
        return False
    same_name = _bare_name(one) == _bare_name(other)
    if not one.options:
        return same_name
    ones, others = one.options_by_step, other.options_by_step
    if not ones or not others:  # written by an earlier version
        return same_group(one.group, one.options, other.group, other.options)
    whole = ones.keys() == others.keys() and one.num_steps - 1 in ones
    return (whole or same_name) and all(
        same_group(one.group_by_step.get(step), ones[step], other.group_by_step.get(step), others[step])
        for step in ones.keys() & others.keys()
    )


def _unusual(run: Run) -> dict[str, Any]:
    """Options of its last evaluation that differ from the default, or, in a test, from the training."""
    defaults = option_defaults()
    return {
        name: value
        for name, value in sorted((run.evaluation or {}).items())
        if name not in defaults or value != defaults[name] or not declared(name).is_named_with_results
    }


def _without_repeated_seeds(runs: list[Run]) -> list[list[Run]]:
    """Split runs so that no part has a seed twice: by name, else by name and folder, else one run each."""
    ways: tuple[Callable[[Run], Hashable], ...] = (
        lambda run: "",
        _bare_name,
        lambda run: (run.folder.parent, _bare_name(run)),
    )
    for way in ways:
        parts: dict[Hashable, list[Run]] = {}
        for run in runs:
            parts.setdefault(way(run), []).append(run)
        if all(
            len({run.folder.name if run.seed is None else run.seed for run in part}) == len(part)
            for part in parts.values()
        ):
            return list(parts.values())
    return [[run] for run in runs]


def _bare_name(run: Run) -> str:
    """A run's name without the seed."""
    return _SEED.sub("", run.name)


def _label(runs: Sequence[Run]) -> str:
    """The common name without seed, else the name of the method."""
    names = {_bare_name(run) for run in runs}
    return names.pop() if len(names) == 1 else str(runs[0].options.get("method") or runs[0].name)


def _unique_label(label: str, runs: Sequence[Run], twins: Sequence[Sequence[Run]]) -> str:
    """Make a label unique: add options that differ from the other methods, else the folder or name."""
    if len(twins) == 1:
        return label
    others = [other for other in twins if other is not runs]
    shown = sorted({text for other in others for text in _differences(runs, other)})
    if not shown and all(other[0].folder.parent != runs[0].folder.parent for other in others):
        above = [twin[0].folder.resolve().parent for twin in twins]
        mine = runs[0].folder.resolve().parent
        common = Path(os.path.commonpath(above))
        shown = [mine.name if mine == common else mine.relative_to(common).as_posix()]
    return f"{label} ({', '.join(shown[:3]) or runs[0].folder.name})"


def _differences(runs: Sequence[Run], others: Sequence[Run]) -> list[str]:
    """Options in which a method differs from another, with the step if they differ between steps."""
    mine, theirs = _by_step(runs), _by_step(others)
    if not mine or not theirs:  # written by an earlier version
        mine, theirs = ({0: deciding(some[0].options)} if some[0].options else {} for some in (runs, others))
    found: dict[str, str] = {}
    for step in sorted(mine.keys() & theirs.keys()):
        for name, value in sorted(mine[step].items()):
            if value != theirs[step].get(name) and name not in found:
                everywhere = all(options.get(name) == value for options in mine.values())
                said = f"no {name}" if value is None else f"{name}={value}"
                found[name] = said + ("" if everywhere else f" in step {step}")
    return [found[name] for name in sorted(found)]


def _by_step(runs: Sequence[Run]) -> dict[int, dict[str, Any]]:
    """Options that tell methods apart, for each step, from the first run that has the step."""
    found: dict[int, dict[str, Any]] = {}
    for run in runs:
        for step, options in run.options_by_step.items():
            found.setdefault(step, deciding(options))
    return found


def _with_evaluation(label: str, runs: Sequence[Run], members: Sequence[Sequence[Run]]) -> str:
    """The label with the evaluation options, if they are not the same for all methods."""

    def evaluated(runs: Sequence[Run]) -> dict[str, Any]:
        return next((_unusual(run) for run in runs if run.evaluation is not None), {})

    mine = evaluated(runs)
    if not mine or all(evaluated(others) == mine for others in members):
        return label
    return f"{label} [{', '.join(f'{name}={value}' for name, value in mine.items())}]"
