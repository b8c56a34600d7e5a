"""The report's page and the files beside it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from utils.files import atomic_write, atomic_write_text
from utils.report import figures, tables
from utils.report.groups import JOINT, Group, Stat, arrange
from utils.report.published import of_group
from utils.report.reading import Run
from utils.report.tables import Line, Table
from utils.visualize import palette

_REMEDY = "free some space or choose another --out"


@dataclass(frozen=True)
class Picture:
    """A figure on the page: name of its PNG file, what it shows, and the picture itself as a URI."""

    file: str
    alt: str
    uri: str
    width: int


@dataclass(frozen=True)
class Section:
    """A title, what to see there, and figures.

    Attributes:
        title, text, pictures: those.
        folded: all figures but the first are closed at first.
        coloured: the colours of the classes stand above the figures.
    """

    title: str
    text: str
    pictures: list[Picture]
    folded: bool = False
    coloured: bool = False


class _Folder:
    """The folder that the report is written to."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def text(self, name: str, content: str) -> None:
        atomic_write_text(self.out / name, content, _REMEDY)

    def picture(self, name: str, alt: str, figure: Figure | None, photo: bool = False) -> list[Picture]:
        """Write a figure as PNG; photographs go into the page as JPEG, a tenth of the size."""
        if figure is None:
            return []
        png = _encoded(figure, "png")
        with atomic_write(self.out / f"{name}.png", _REMEDY) as file:
            file.write(png)
        kind, content = ("jpeg", _encoded(figure, "jpeg")) if photo else ("png", png)
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
        return [Picture(f"{name}.png", alt, uri, round(96 * figure.get_size_inches()[0]))]


def _encoded(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format=kind, dpi=figure.dpi, pil_kwargs={"quality": 90} if kind == "jpeg" else None
    )
    return buffer.getvalue()


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """Write ``report.html``, ``report.md``, tables as CSV and figures as PNG.

    Args:
        runs: at least one.
        out: folder, made if missing.

    Returns:
        The path of the page.

    Raises:
        UserError: a file cannot be written, or one of a run cannot be read.
    """
    folder, groups = _Folder(out), arrange(runs)
    written = [_group(folder, group) for group in groups]
    steps = tables.steps_table(groups)
    folder.text("steps.csv", steps.csv())
    folder.text("classes.csv", tables.classes_table(groups).csv())
    when = time.strftime("%Y-%m-%d %H:%M")
    content = {
        "title": "Continual segmentation: " + ", ".join(dict.fromkeys(group.title for group in groups)),
        "groups": written,
        "runs": [_run(folder, run) for run in tables.all_runs(groups)],
        "when": when,
    }
    folder.text("report.md", _markdown(groups, written, steps, when))
    page = _environment().get_template("page.html.jinja").render(content)
    folder.text("report.html", page)
    return out / "report.html"


def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = _percent
    environment.filters["cell"] = lambda value: f"{value:.2f}" if isinstance(value, float) else value
    return environment


def _percent(number: Stat | None) -> str:
    return "–" if number is None else number.percent()


def _group(folder: _Folder, group: Group) -> dict[str, Any]:
    """A group's part of the page; its figures and its summary are written."""
    lines = tables.summary(group)
    folder.text(f"{group.slug}_summary.csv", tables.summary_table(group).csv())
    return {
        "title": group.title,
        "slug": group.slug,
        "joint_only": group.task == JOINT,
        "lines": lines,
        "best": _best(lines),
        "last_step": group.num_steps - 1,
        "has_published": any(line.published for line in lines),
        "published": of_group(group),
        "unfinished": [run for method in group.methods for run in method.runs if not run.finished],
        "sections": _sections(folder, group, lines),
        "colours": _class_colours(group),
    }


def _sections(folder: _Folder, group: Group, lines: Sequence[Line]) -> list[Section]:
    def one(name: str, alt: str, figure: Figure | None) -> list[Picture]:
        return folder.picture(f"{group.slug}_{name}", f"{alt}, {group.title}", figure)

    spread = "Mean over the seeds; the band is one standard deviation."
    sections = [
        Section("mIoU per step", spread, one("curves", "mIoU per step", figures.curves(group))),
        Section(
            "Forgetting per class",
            "IoU after the step that brought the class minus IoU after the last step, in points; "
            "orange is forgotten, violet is gained.",
            one("forgetting", "forgetting per class", figures.forgetting_map(group)),
        ),
        Section(
            "IoU per class and step",
            "Grey: not learnt yet, or no result. White lines part the classes of different steps.",
            one("classes", "IoU per class and step", figures.class_heat_maps(group)),
        ),
        Section(
            "Confusion after the last step",
            "In percent of the true class's pixels, all seeds together.",
            _confusions(folder, group),
            folded=True,
        ),
        Section(
            "The same pictures",
            "What the first seed of each method predicts after each step.",
            _samples(folder, group),
            coloured=True,
        ),
        Section(
            "Loss",
            "The total loss, a line per run; its terms stand with each run below.",
            one("losses", "total loss", figures.total_losses(group)),
        ),
        Section(
            "Time and memory",
            "Of the training of the steps that the run did itself; the peak is of the first process.",
            one("cost", "wall time and memory", figures.cost(lines)),
        ),
    ]
    return [section for section in sections if section.pictures]


def _confusions(folder: _Folder, group: Group) -> list[Picture]:
    found = []
    for place, method in enumerate(group.methods):
        name = f"{group.slug}_confusion_{place}"
        found += folder.picture(name, method.label, figures.confusion(method))
    return found


def _samples(folder: _Folder, group: Group) -> list[Picture]:
    indices = sorted({index for method in group.methods for run in method.runs[:1] for index in run.samples})
    found = []
    for index in indices:
        figure = figures.sample_pictures(group, index)
        found += folder.picture(f"{group.slug}_picture_{index}", f"picture {index}", figure, photo=True)
    return found


def _class_colours(group: Group) -> list[tuple[str, str]]:
    """Name and colour of every foreground class, as in the sample pictures."""
    indices: dict[str, int] = {}
    for method in group.methods:
        for run in method.runs:
            for results in run.results.values():
                indices.update(results.get("indices", {}))
    colours = palette(max(indices.values(), default=0) + 1)
    ordered = sorted(indices.items(), key=lambda item: item[1])
    return [(name, "#" + bytes(colours[index]).hex()) for name, index in ordered if index]


def _best(lines: Sequence[Line]) -> dict[str, str]:
    """Label of the best method of each column, joint training apart; none where there is no choice."""
    numbers: dict[str, Callable[[Line], Stat | None]] = {
        "old": lambda line: line.numbers["old"],
        "new": lambda line: line.numbers["new"],
        "all": lambda line: line.numbers["all"],
    }
    rivals = [line for line in lines if line.complete and not line.method.joint]
    best = {}
    for key, number in numbers.items():
        known = [(found.mean, line.method.label) for line in rivals if (found := number(line)) is not None]
        if len(known) > 1:
            best[key] = max(known)[1]
    return best


def _run(folder: _Folder, run: Run) -> dict[str, Any]:
    headers = ["step", *(f"mIoU {name}" for name in tables.NUMBERS)]
    rows: list[list[object]] = []
    for step, results in run.results.items():
        shown = f"{step} (of {run.taken_over[step]})" if step in run.taken_over else step
        numbers = [results.get(key) for key in tables.NUMBERS.values()]
        rows.append([shown, *(None if number is None else 100 * number for number in numbers)])
    validations = [(step, point) for step, course in run.courses.items() for point in course.validations]
    name = f"run_{run.folder.name}_losses"
    return {
        "name": run.folder.name,
        "folder": run.folder,
        "state": run.state(),
        "speed": run.speed,
        "results": Table(headers, rows),
        "validations": validations,
        "pictures": folder.picture(name, f"loss terms of {run.folder.name}", figures.loss_terms(run)),
        "options": sorted(run.options.items()),
    }


def _markdown(groups: Sequence[Group], written: Sequence[dict[str, Any]], steps: Table, when: str) -> str:
    parts = ["# Report", f"Made on {when} by `python -m utils.report`; mIoU in percent."]
    for group, content in zip(groups, written, strict=True):
        parts += [f"## {group.title}", tables.summary_table(group).markdown()]
        for section in content["sections"]:
            parts += [f"### {section.title}", section.text]
            parts += [f"![{picture.alt}]({picture.file})" for picture in section.pictures]
    parts += ["## Every step of every run", steps.markdown()]
    return "\n\n".join(parts) + "\n"
