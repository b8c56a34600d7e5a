"""The report's tables, as text, CSV, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from report.groups import MEANS, Group, Method, Stat, orders_of, stat
from report.published import Published, of_method
from report.reading import Run, read_results
from utils.tables import csv_text, format_table, markdown_table

# Of a results file; those of earlier versions have no first, later, harmonic and average.
NUMBERS = {
    "first": "miou_first",
    "later": "miou_later",
    "old": "miou_old",
    "new": "miou_new",
    "all": "miou_all",
    "harmonic": "harmonic_mean_first_later",
    "average": "average_miou_all",
}


@dataclass(frozen=True)
class Table:
    """Column headers and cells; a cell is text, a number, or None (shown as a dash)."""

    headers: list[str]
    rows: list[list[object]]

    def csv(self) -> str:
        """The table as CSV, numbers in full precision."""
        return csv_text([self.headers, *self.rows])

    def markdown(self) -> str:
        """The table as Markdown, numbers with two decimals."""
        return markdown_table(self.headers, self.rows)


def comparison(runs: Iterable[Path]) -> str:
    """Text table of mIoU and mean forgetting of the old classes in percent, one row per run and step.

    Runs without results are named below it.
    """
    rows: list[list[object]] = []
    without = []
    for run in runs:
        found = read_results(run)
        for step, results in found.items():
            numbers = [results.get(key) for key in (*NUMBERS.values(), "mean_forgetting")]
            rows.append([run.name, step, *map(_percent, numbers)])
        if not found:
            without.append(f"{run}: no results yet")
    headers = ["run", "step", *(f"mIoU {name}" for name in NUMBERS), "forgetting"]
    return "\n".join([*([format_table(headers, rows)] if rows else []), *without])


REPRODUCED_WITHIN = 1.0  # points of mIoU over all classes


@dataclass(frozen=True)
class Comparison:
    """A published row and the runs' means, counted as that row counts the background.

    Attributes:
        row: the published row.
        means: of the runs, as fractions; all None until the task's last step is done.
    """

    row: Published
    means: dict[str, Stat | None]

    @property
    def differences(self) -> dict[str, float | None]:
        """The runs' mean minus the published one, in points, by name."""
        pairs = {key: (self.means[key], theirs) for key, theirs in self.row.means.items()}
        return {
            key: None if ours is None or theirs is None else 100 * ours.mean - theirs
            for key, (ours, theirs) in pairs.items()
        }

    @property
    def verdict(self) -> str:
        """Whether "all" is within ``REPRODUCED_WITHIN`` points of the published one; empty if unknown."""
        difference = self.differences["all"]
        if difference is None or self.row.background in ("inconsistent", ""):
            return ""
        return "reproduced" if abs(difference) <= REPRODUCED_WITHIN else "not reproduced"


@dataclass(frozen=True)
class Line:
    """A method's line of the summary.

    Attributes:
        method: the method.
        step: step after which the numbers were measured; None without results.
        complete: whether ``step`` is the task's last.
        numbers: mIoU over first, later and all classes, as fractions.
        forgetting: mean over the old classes, a fraction.
        seconds, memory: wall time of training, and peak memory in MiB.
        published: the papers' rows, compared with these runs.
    """

    method: Method
    step: int | None
    complete: bool
    numbers: dict[str, Stat | None]
    forgetting: Stat | None
    seconds: Stat | None
    memory: Stat | None
    published: list[Comparison]


def summary(group: Group) -> list[Line]:
    """One line per method."""
    lines = []
    for method in group.methods:
        runs = method.latest()
        complete = any(run.finished for run in runs)
        compared = runs if complete else []
        lines.append(
            Line(
                method=method,
                step=method.step,
                complete=complete,
                numbers=_means(group, runs),
                forgetting=stat(mean_forgetting(run) for run in runs),
                seconds=stat(run.seconds for run in runs),
                memory=stat(run.memory for run in runs),
                published=[
                    Comparison(row, _means(group, compared, row.background))
                    for row in of_method(group, method)
                ],
            )
        )
    return lines


def _means(group: Group, runs: Sequence[Run], background: str = "with") -> dict[str, Stat | None]:
    means = [group.means(run, background) for run in runs]
    return {key: stat(mean[key] for mean in means) for key in MEANS}


def mean_forgetting(run: Run) -> float | None:
    """Mean forgetting over the classes of earlier steps with a known IoU, background included."""
    found = stat(run.forgetting(name) for name in run.class_names)
    return None if found is None else found.mean


def summary_table(group: Group) -> Table:
    """The summary in percent; a method with several published rows has one row for each."""
    headers = ["method", "runs", "after step"]
    headers += [f"mIoU {key} {part}" for key in MEANS for part in ("mean", "std")]
    headers += ["forgetting mean", "forgetting std", "training s", "memory MiB"]
    theirs = [f"published {key}" for key in MEANS] + ["published background", "remark", "source"]
    theirs += [f"mIoU {key} counted as published" for key in MEANS] + ["difference all", "verdict"]
    rows: list[list[object]] = []
    for line in summary(group):
        own: list[object] = [line.method.label, len(line.method.latest()), line.step]
        for number in (*line.numbers.values(), line.forgetting):
            own += [_percent(_mean(number)), _percent(None if number is None else number.std)]
        own += [_mean(line.seconds), _mean(line.memory)]
        for compared in line.published:
            row = compared.row
            counted = [_percent(_mean(compared.means[key])) for key in MEANS]
            about = [row.background or "not said", row.remark, row.source]
            judged = [compared.differences["all"], compared.verdict]
            rows.append([*own, *row.means.values(), *about, *counted, *judged])
        if not line.published:
            rows.append([*own, *[None] * len(theirs)])
    return Table(headers + theirs, rows)


def orders_table(group: Group) -> Table | None:
    """Means over class orders, see ``Orders``, in percent; None without a method with several orders."""
    headers = ["method", "orders", *(f"mIoU {key} {part}" for key in MEANS for part in ("mean", "std"))]
    rows: list[list[object]] = []
    for orders in orders_of(group):
        cells: list[object] = [orders.label, len(orders.methods)]
        for number in orders.means(group).values():
            cells += [_percent(_mean(number)), _percent(None if number is None else number.std)]
        rows.append(cells)
    return Table(headers, rows) if rows else None


def steps_table(groups: Sequence[Group]) -> Table:
    """mIoU in percent after every step of every run, see ``metrics.continual.Results``."""
    rows: list[list[object]] = []
    for run in all_runs(groups):
        for step, results in run.results.items():
            numbers = [_percent(results.get(key)) for key in NUMBERS.values()]
            rows.append([run.folder.name, run.options.get("random_seed"), step, *numbers])
    return Table(["run", "seed", "step", *(f"mIoU {name}" for name in NUMBERS)], rows)


def classes_table(groups: Sequence[Group]) -> Table:
    """IoU and forgetting in percent of every class after every step."""
    rows: list[list[object]] = []
    for run in all_runs(groups):
        for name in run.class_names:
            forgotten = _percent(run.forgetting(name))
            for step in run.results:
                if step >= run.introduced[name]:
                    iou = _percent(run.iou(name, step))
                    last = forgotten if step == run.last_step else None
                    rows.append([run.folder.name, name, run.introduced[name], step, iou, last])
    return Table(["run", "class", "introduced in step", "step", "IoU", "forgotten"], rows)


def all_runs(groups: Sequence[Group]) -> list[Run]:
    """Every run once, in the order of the groups (joint runs are in several groups)."""
    found = {run.folder: run for group in groups for method in group.methods for run in method.runs}
    return list(found.values())


def _mean(number: Stat | None) -> float | None:
    return None if number is None else number.mean


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
