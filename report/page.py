"""Writes the report: the page, figures and tables."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from metrics.continual import Array
from report import figures, tables
from report.groups import MEANS, Group, Stat, arrange
from report.published import of_group
from report.reading import Run
from report.tables import Line, Table
from runs.options import deciding
from utils.drawing import render
from utils.errors import UserError
from utils.files import atomic_write, atomic_write_text, cannot_write
from utils.palette import palette
from utils.tables import markdown_text

_REMEDY = "free some space or choose another --out"
_LIST = "report_files.txt"
_PLAIN = re.compile(r"[\w.-]+\.(?:png|csv|md|html)")  # no path separator
_LONGEST = 120  # characters of a figure's file name


@dataclass(frozen=True)
class PageFigure:
    """A figure on the page: name of its PNG file, alternative text, data URI, and width in pixels."""

    file: str
    alt: str
    uri: str
    width: int


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        title, text, figures: title, explanation and figures.
        folded: whether all figures but the first are initially collapsed.
        coloured: whether a legend of class colours is above the figures.
    """

    title: str
    text: str
    figures: list[PageFigure]
    folded: bool = False
    coloured: bool = False


class _Folder:
    """The output folder, and the list of files that the previous report wrote there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.before = _listed(out)
        self.written: list[str] = []

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is None:
            self._remove([name for name in self.before if name not in self.written])
        elif self.written:  # the folder has files of both reports
            self._list({*self.before, *self.written})

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            path = self.out / name
            try:
                if path.is_file():
                    path.unlink()
            except OSError as error:
                raise cannot_write(path, error, _REMEDY) from error
        self._list(self.written)

    def _list(self, names: Iterable[str]) -> None:
        atomic_write_text(self.out / _LIST, "".join(f"{name}\n" for name in sorted(names)), _REMEDY)

    def text(self, name: str, content: str) -> None:
        atomic_write_text(self.out / name, content, _REMEDY)
        self.written.append(name)

    def figure(self, name: str, alt: str, figure: Figure | None, photo: bool = False) -> list[PageFigure]:
        """Write a figure as PNG. On the page, photographs are JPEG, a tenth of the size."""
        if figure is None:
            return []
        image, width = render(figure), round(96 * figure.get_size_inches()[0])
        shown = _encoded(image, "jpeg", quality=90) if photo else None
        return self._add(name, alt, width, _encoded(image, "png"), shown)

    def image(self, name: str, alt: str, pixels: Array) -> list[PageFigure]:
        """Write an image, height×width×3 in uint8, as PNG."""
        return self._add(name, alt, pixels.shape[1], _encoded(Image.fromarray(pixels), "png"))

    def _add(
        self, name: str, alt: str, width: int, png: bytes, jpeg: bytes | None = None
    ) -> list[PageFigure]:
        with atomic_write(self.out / f"{name}.png", _REMEDY) as file:
            file.write(png)
        self.written.append(f"{name}.png")
        kind, content = ("png", png) if jpeg is None else ("jpeg", jpeg)
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
        return [PageFigure(f"{name}.png", alt, uri, width)]


def _stem(*parts: str) -> str:
    """File name without suffix from its parts; different parts give different names."""
    text = "_".join(parts)
    plain = re.sub(r"[^\w.-]+", "-", text).strip("-")
    if plain == text and len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))  # a folder's name may not be UTF-8
    return f"{plain[:_LONGEST]}-{digest.hexdigest()[:8]}"


def _listed(out: Path) -> list[str]:
    """File names in ``report_files.txt``; ignores paths and file types that a report does not write."""
    path = out / _LIST
    try:
        if out.is_file():
            raise UserError(f"{out}: is a file; give a folder with --out")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); remove it") from error
    return [name for name in lines if _PLAIN.fullmatch(name)]


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """Write ``report.html``, ``report.md``, tables as CSV and figures as PNG.

    Removes the files of the previous report (listed in ``report_files.txt``) that this one does not have.

    Returns:
        The path of the page.

    Raises:
        UserError: a file cannot be written, or a file of a run cannot be read.
    """
    with _Folder(out) as folder:
        _write(folder, arrange(runs))
    return out / "report.html"


def _write(folder: _Folder, groups: Sequence[Group]) -> None:
    written = [_group(folder, group) for group in groups]
    runs, steps = tables.all_runs(groups), tables.steps_table(groups)
    names = Counter(run.folder.name for run in runs)
    folder.text("steps.csv", steps.csv())
    folder.text("classes.csv", tables.classes_table(groups).csv())
    when = time.strftime("%Y-%m-%d %H:%M")
    content = {
        "title": "Continual segmentation: " + ", ".join(dict.fromkeys(group.title for group in groups)),
        "groups": written,
        "runs": [_run(folder, run, alone=names[run.folder.name] == 1) for run in runs],
        "when": when,
    }
    folder.text("report.md", _markdown(groups, written, steps, when))
    page = _environment().get_template("page.html.jinja").render(content)
    folder.text("report.html", page)


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


_OVER_ORDERS = (
    "Mean and standard deviation over the class orders; the seeds of an order are averaged first. First and "
    "later classes are those of each order."
)


def _group(folder: _Folder, group: Group) -> dict[str, Any]:
    """Page content of a group; writes its figures and summary table."""
    lines = tables.summary(group)
    folder.text(f"{group.slug}_summary.csv", tables.summary_table(group).csv())
    orders = tables.orders_table(group)
    if orders is not None:
        folder.text(f"{group.slug}_orders.csv", orders.csv())
    return {
        "title": group.title,
        "slug": group.slug,
        "joint_only": all(method.joint for method in group.methods),
        "lines": lines,
        "orders": orders,
        "over_orders": _OVER_ORDERS,
        "best": _best(lines),
        "last_step": group.num_steps - 1,
        "has_published": any(line.published for line in lines),
        "margin": f"{tables.REPRODUCED_WITHIN:g}",
        "published": of_group(group),
        "unfinished": [run for method in group.methods for run in method.runs if not run.finished],
        "sections": _sections(folder, group, lines),
        "colours": _class_colours(group),
    }


def _sections(folder: _Folder, group: Group, lines: Sequence[Line]) -> list[Section]:
    def one(name: str, alt: str, figure: Figure | None) -> list[PageFigure]:
        return folder.figure(f"{group.slug}_{name}", f"{alt}, {group.title}", figure)

    spread = "Mean over the seeds; bands and error bars are one standard deviation."
    if group.num_steps > 2:
        steps = Section("mIoU per step", spread, one("curves", "mIoU per step", figures.curves(group)))
    else:
        steps = Section("mIoU", spread, one("bars", "mIoU", figures.bars(group)))
    sections = [
        steps,
        Section(
            "Forgetting per class",
            "IoU after the step that introduced the class minus IoU after the last step, in points; orange: "
            "forgotten, violet: gained. Classes that were never learnt are hatched.",
            one("forgetting", "forgetting per class", figures.forgetting_map(group)),
        ),
        Section(
            "IoU per class and step",
            "Grey: not learnt yet, or no result. White lines separate the classes of different steps.",
            one("classes", "IoU per class and step", figures.class_heat_maps(group)),
        ),
        Section(
            "Confusion after the last step",
            "In percent of the pixels of the true class, summed over all seeds.",
            _confusions(folder, group),
            folded=True,
        ),
        Section(
            "Sample images",
            "Predictions of the first seed of each method after each step.",
            _samples(folder, group),
            folded=len(group.methods) > figures.BESIDE,
            coloured=True,
        ),
        Section(
            "Loss",
            "Total loss, one line per run; the loss terms are under each run below. The scale is logarithmic "
            "if some values are far larger than the others.",
            one("losses", "total loss", figures.total_losses(group)),
        ),
        Section(
            "Time and memory",
            "Training of the steps that the run did itself; peak memory of the first process.",
            one("cost", "wall time and memory", figures.cost(lines)),
        ),
    ]
    return [section for section in sections if section.figures]


def _confusions(folder: _Folder, group: Group) -> list[PageFigure]:
    found = []
    for method in group.methods:
        if (image := figures.confusion(method)) is not None:
            found += folder.image(_stem(group.slug, "confusion", method.label), method.label, image)
    return found


def _samples(folder: _Folder, group: Group) -> list[PageFigure]:
    indices = sorted({index for method in group.methods for run in method.runs[:1] for index in run.samples})
    found = []
    for index in indices:
        figure = figures.sample_images(group, index)
        found += folder.figure(f"{group.slug}_picture_{index}", f"image {index}", figure, photo=True)
    return found


def _class_colours(group: Group) -> list[tuple[str, str]]:
    """Name and colour of every foreground class, as in the sample images (by dataset class id)."""
    ids: dict[str, int] = {}
    for method in group.methods:
        for run in method.runs:
            ids.update(run.class_ids)
    colours = palette(max(ids.values(), default=0) + 1)
    ordered = sorted(ids.items(), key=lambda item: item[1])
    return [(name, "#" + bytes(colours[number]).hex()) for name, number in ordered if number]


def _best(lines: Sequence[Line]) -> dict[str, str]:
    """Label of the best method in each column, joint training excluded; only columns with several methods."""
    rivals = [line for line in lines if line.complete and not line.method.joint]
    best = {}
    for key in MEANS:
        known = [
            (found.mean, line.method.label) for line in rivals if (found := line.numbers[key]) is not None
        ]
        if len(known) > 1:
            best[key] = max(known)[1]
    return best


def _run(folder: _Folder, run: Run, alone: bool) -> dict[str, Any]:
    """Page content of a run; ``alone``: no other run's folder has the same name."""
    headers = ["step", *(f"mIoU {name}" for name in tables.NUMBERS)]
    rows: list[list[object]] = []
    for step, results in run.results.items():
        shown = f"{step} (of {run.taken_over[step]})" if step in run.taken_over else step
        numbers = [results.get(key) for key in tables.NUMBERS.values()]
        rows.append([shown, *(None if number is None else 100 * number for number in numbers)])
    validations = [(step, point) for step, history in run.histories.items() for point in history.validations]
    name = _stem("run", run.folder.name if alone else str(run.folder.resolve()), "losses")
    return {
        "name": run.folder.name,
        "folder": run.folder,
        "state": run.state(),
        "speed": run.speed,
        "results": Table(headers, rows),
        "validations": validations,
        "figures": folder.figure(name, f"loss terms of {run.folder.name}", figures.loss_terms(run)),
        "options": _options(run),
    }


def _options(run: Run) -> list[tuple[str, str]]:
    """Name and value of every option; if steps differ, the value of each step."""
    by_step = {step: deciding(options) for step, options in run.options_by_step.items()}
    shown = {name: str(value) for name, value in run.options.items()}
    for name in {name for options in by_step.values() for name in options}:
        values: dict[str, list[int]] = {}
        for step, options in by_step.items():
            if name in options:
                values.setdefault(str(options[name]), []).append(step)
        if len(values) > 1:
            shown[name] = ", ".join(f"{value} (step {_spans(steps)})" for value, steps in values.items())
    return sorted(shown.items())


def _spans(steps: Sequence[int]) -> str:
    """Step numbers as text: ``0, 2–4``."""
    found: list[list[int]] = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in found)


def _markdown(groups: Sequence[Group], written: Sequence[dict[str, Any]], steps: Table, when: str) -> str:
    parts = ["# Report", f"Made on {when} by `python -m report`; mIoU in percent."]
    for group, content in zip(groups, written, strict=True):
        parts += [f"## {markdown_text(group.title)}", tables.summary_table(group).markdown()]
        if content["orders"] is not None:
            parts += ["### Over class orders", _OVER_ORDERS, content["orders"].markdown()]
        for section in content["sections"]:
            parts += [f"### {section.title}", section.text]
            parts += [f"![{markdown_text(figure.alt)}]({figure.file})" for figure in section.figures]
    parts += ["## Every step of every run", steps.markdown()]
    return "\n\n".join(parts) + "\n"
