"""The report's figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator
from PIL import Image

from metrics.continual import Array
from report.groups import MEANS, Group, Method, Stat, stat
from report.reading import Run
from report.tables import Line
from utils.drawing import drawable, new_figure
from utils.errors import UserError
from utils.visualize import confusion_image

# Colour-blind safe palette of Okabe and Ito; dashed lines after seven methods. Black is for joint training.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NUMBERED = 40  # most rows of a heat map with numbers in its cells
_STEPS_SHOWN = 7  # rows of predictions of one image
BESIDE = 8  # methods side by side in the sample images
_SMOOTHED = 60  # points of a loss curve
_FAR = 100  # a scale is logarithmic if the largest loss exceeds this multiple of the median
_WIDTH = 11.8  # inches; width of the page
_LEARNT = 0.01  # IoU from which a class counts as learnt
_NO_RESULT = "#dddddd"
_TITLES = {
    "first": "first: classes of step 0",
    "later": "later: classes of all later steps",
    "all": "all classes",
}
_HATCHED: dict[str, Any] = {"facecolor": "#f2f2f2", "edgecolor": "#9a9a9a", "hatch": "////", "linewidth": 0}

Style = dict[str, Any]
_figure = partial(new_figure, dpi=130)


def styles(group: Group) -> dict[str, Style]:
    """Colour, marker and dashes of every method, by label; the same in all figures of the group.

    Assigned in order of the labels, not of the results, so that they stay the same while runs progress.
    """
    found: dict[str, Style] = {}
    own = sorted((method for method in group.methods if not method.joint), key=lambda method: method.label)
    for place, method in enumerate(own):
        colour = _COLOURS[place % len(_COLOURS)]
        marker = _MARKERS[(place + place // len(_COLOURS)) % len(_MARKERS)]
        dashes = "-" if place < len(_COLOURS) else "--"
        found[method.label] = {"color": colour, "marker": marker, "linestyle": dashes}
    for method in group.methods:
        if method.joint:
            found[method.label] = {"color": "black", "marker": "", "linestyle": "-"}
    return found


def curves(group: Group) -> Figure | None:
    """mIoU over first, later and all classes after every step: mean and standard deviation over seeds."""
    methods = [method for method in group.methods if method.step is not None and not method.joint]
    if not methods:
        return None
    figure = _figure(_WIDTH, 3.6)
    look = styles(group)
    panels = figure.subplots(1, len(MEANS), sharey=True)
    for axes, key in zip(panels, MEANS, strict=True):
        for method in methods:
            _curve(axes, group, method, key, look[method.label])
        if key == "all":
            _joint_lines(axes, group)
        axes.set_title(_TITLES[key])
        axes.set_xlabel("step")
        axes.set_xlim(-0.2, group.num_steps - 0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(axes)
    panels[0].set_ylabel("mIoU (%)")
    panels[0].set_ylim(bottom=0)
    _legend(figure, [panels[0], panels[2]], list(look))
    return figure


def _curve(axes: Axes, group: Group, method: Method, key: str, look: Style) -> None:
    """Draw a mean after every step as a line, with a band of one standard deviation."""
    steps = sorted({step for run in method.runs for step in run.results})
    points = {step: stat(group.means(run, step=step)[key] for run in method.runs) for step in steps}
    known = {step: point for step, point in points.items() if point is not None}
    if not known:
        return
    x = np.array(list(known))
    mean = 100 * np.array([point.mean for point in known.values()])
    std = 100 * np.array([point.std or 0.0 for point in known.values()])
    low, high = np.maximum(mean - std, 0), np.minimum(mean + std, 100)  # the range of an mIoU
    axes.plot(x, mean, label=drawable(method.label), linewidth=1.8, markersize=5, **look)
    axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)


def bars(group: Group) -> Figure | None:
    """mIoU over first, later and all classes after the last step of any method: means and error bars."""
    own = [method for method in group.methods if method.step is not None and not method.joint]
    step = max((method.step for method in own if method.step is not None), default=None)
    shown = [
        method
        for method in group.methods
        if method.step is not None and (method.joint or method.step == step)
    ]
    if step is None:
        return None
    keys = MEANS if step else MEANS[-1:]
    figure = _figure(_WIDTH, 1.0 + 0.3 * len(shown))
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    look = styles(group)
    means = {method.label: [group.means(run) for run in method.latest()] for method in shown}
    for axes, key in zip(panels, keys, strict=True):
        for place, method in enumerate(shown):
            number = stat(mean[key] for mean in means[method.label])
            if number is not None:
                _bar(axes, place, number, look[method.label]["color"])
        axes.set_title(f"{_TITLES[key]}, after step {step}")
        axes.set_xlabel("mIoU (%)")
        _tidy(axes)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(shown)), [drawable(method.label) for method in shown])
    panels[0].invert_yaxis()
    return figure


def _bar(axes: Axes, place: int, number: Stat, colour: str) -> None:
    """Draw a bar in percent with its value, and an error bar clipped to 0 to 100."""
    mean, std = 100 * number.mean, 100 * (number.std or 0.0)
    low, high = max(mean - std, 0), min(mean + std, 100)
    error = None if number.std is None else [[mean - low], [high - mean]]
    lines = {"elinewidth": 1, "capsize": 2, "ecolor": "0.55" if colour == "black" else "black"}
    axes.barh(place, mean, xerr=error, color=colour, height=0.62, error_kw=lines)
    axes.annotate(
        f"{mean:.1f}", (high, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
    )
    axes.set_xlim(0, max(axes.get_xlim()[1], high * 1.15))


def _joint_lines(axes: Axes, group: Group) -> None:
    for method in group.methods:
        number = method.stat(lambda run: group.means(run)["all"]) if method.joint else None
        if number is not None:
            axes.axhline(
                100 * number.mean, color="black", linestyle="--", linewidth=1.2, label=drawable(method.label)
            )


def class_heat_maps(group: Group) -> Figure | None:
    """IoU of every class after every step, one panel per method."""
    methods = [method for method in group.methods if method.step is not None and method.class_names]
    if not methods:
        return None
    names = max((method.class_names for method in methods), key=len)
    columns = [1 if method.joint else group.num_steps for method in methods]
    rows = list(_wrapped(columns, 22))
    width = max(sum(columns[place] for place in row) for row in rows)
    cell = 0.24 if len(names) <= _NUMBERED else 0.125
    height = len(rows) * (cell * len(names) + 0.9)
    figure = _figure(min(max(2.6 + 0.5 * width, 9.0), 14.0), height + 0.3)
    for part, row in zip(_subfigures(figure, len(rows)), rows, strict=True):
        ratios = [columns[place] for place in row]
        spare = width - sum(ratios)  # an empty panel keeps the columns equally wide in all rows
        panels = part.subplots(
            1, len(row) + (spare > 0), width_ratios=[*ratios, spare][: len(row) + (spare > 0)], squeeze=False
        )[0]
        for axes in panels[len(row) :]:
            axes.set_axis_off()
        for position, (axes, place) in enumerate(zip(panels, row, strict=False)):
            values = _ious(methods[place], names, columns[place])
            image = _heat(
                axes, 100 * values, names if position == 0 else None, cmap="viridis", vmin=0, vmax=100
            )
            # About as many characters as the panel is wide, so that neighbouring titles do not overlap.
            label = textwrap.fill(drawable(methods[place].label), max(9, 7 * columns[place]))
            axes.set_title(label, fontsize=9)
            axes.set_xlabel("step")
            _mark_new(axes, methods[place], names)
        part.colorbar(image, ax=list(panels), label="IoU (%)", shrink=min(1.0, 3 / height), pad=0.01)
    return figure


def _ious(method: Method, names: Sequence[str], columns: int) -> Array:
    """IoU, classes × steps, mean over seeds; NaN if there is none."""
    values = np.full((len(names), columns), np.nan)
    for row, name in enumerate(names):
        for step in range(columns):
            found = method.stat(lambda run, name=name, step=step: run.iou(name, step))  # type: ignore[misc]
            if found is not None:
                values[row, step] = found.mean
    return values


def _mark_new(axes: Axes, method: Method, names: Sequence[str]) -> None:
    """Draw a line below the classes of each step."""
    known = [method.introduced(name) if name in method.class_names else None for name in names]
    for row in range(1, len(names)):
        if None not in (known[row - 1], known[row]) and known[row - 1] != known[row]:
            axes.axhline(row - 0.5, color="white", linewidth=1.5)


def forgetting_map(group: Group) -> Figure | None:
    """Forgetting per method and class: IoU after the step that introduced it minus IoU after the last step.

    Cells of classes whose IoU after their own step is below ``_LEARNT`` are hatched.
    """
    methods = [method for method in group.methods if not method.joint and method.class_names]
    names = max((method.class_names for method in methods), key=len, default=[])
    values = np.array([_forgotten(method, names) for method in methods]).reshape(len(methods), len(names))
    known = np.isfinite(values)
    if not known.any():
        return None
    names = [names[place] for place in np.flatnonzero(known.any(axis=0))]
    methods = [methods[place] for place in np.flatnonzero(known.any(axis=1))]
    values = values[known.any(axis=1)][:, known.any(axis=0)]
    never = np.array([[_never_learnt(method, name) for name in names] for method in methods])
    rows_of = -(-len(names) // _NUMBERED)
    columns = -(-len(names) // rows_of)
    figure = _figure(min(3.4 + 0.42 * columns, 16.0), 0.4 + rows_of * (1.5 + 0.3 * len(methods)))
    panels = figure.subplots(rows_of, 1, squeeze=False)[:, 0]
    colours = _around_zero(values[~never])
    for axes, start in zip(panels, range(0, len(names), columns), strict=True):
        part = np.full((len(methods), columns), np.nan)
        hatched = never[:, start : start + columns]
        part[:, : hatched.shape[1]] = np.where(hatched, np.nan, values[:, start : start + columns])
        image = _heat(axes, part, [method.label for method in methods], **colours)
        for row, column in np.argwhere(hatched):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **_HATCHED))
        part_names = [drawable(name) for name in names[start : start + columns]]
        axes.set_xticks(range(hatched.shape[1]), part_names, rotation=90, fontsize=8)
        axes.set_xlim(-0.5, hatched.shape[1] - 0.5 if rows_of == 1 else columns - 0.5)
    bar = figure.colorbar(image, ax=list(panels), pad=0.01, shrink=1 / rows_of)
    bar.set_label("IoU lost since its step (points)", fontsize=9)
    _cell_legend(figure, values, never)
    return figure


def _forgotten(method: Method, names: Sequence[str]) -> list[float]:
    """Forgetting in points, mean over seeds; NaN if there is none."""
    runs = method.latest()
    found = [stat(run.forgetting(name) for run in runs if name in run.introduced) for name in names]
    return [math.nan if number is None else 100 * number.mean for number in found]


def _never_learnt(method: Method, name: str) -> bool:
    """Whether the mean IoU of a class after the step that introduced it is below ``_LEARNT``."""
    runs = [run for run in method.latest() if name in run.introduced]
    found = stat(run.iou(name, run.introduced[name]) for run in runs)
    return found is not None and found.mean < _LEARNT


def _around_zero(values: Array) -> dict[str, Any]:
    """Diverging colour map cut to the range of the values; white is 0, the same scale on both sides."""
    known = values[np.isfinite(values)]
    low = min(0.0, 5 * math.floor(known.min(initial=0.0) / 5))
    high = max(5.0, 5 * math.ceil(known.max(initial=0.0) / 5))
    bound = max(-low, high)
    whole = matplotlib.colormaps["PuOr_r"]
    shades = whole(np.linspace((low / bound + 1) / 2, (high / bound + 1) / 2, 256))
    return {"cmap": ListedColormap(shades), "vmin": low, "vmax": high}


def _cell_legend(figure: Figure, values: Array, never: Array) -> None:
    """Legend for cells without a number, if there are any."""
    handles = []
    if never.any():
        handles.append(Patch(label=f"never learnt: IoU below {_LEARNT:.0%} after its step", **_HATCHED))
    if (np.isnan(values) & ~never).any():
        handles.append(Patch(label="no result", facecolor=_NO_RESULT))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=9)


def confusion(method: Method) -> Array | None:
    """Image of the confusion matrix after the last step, counts summed over seeds."""
    step = method.step
    read = [
        found for run in method.latest() if step is not None and (found := run.confusion(step)) is not None
    ]
    if not read:
        return None
    names = read[0][1]
    summed = np.sum([counts for counts, other in read if other == names], axis=0)
    return confusion_image(summed, names, method.label)


def total_losses(group: Group) -> Figure | None:
    """Total loss of every run, one panel per step."""
    runs = (run for method in group.methods for run in method.runs)
    steps = sorted({step for run in runs for step, read in run.histories.items() if read.entries})
    if not steps:
        return None
    look = styles(group)
    rows = [steps[place : place + 4] for place in range(0, len(steps), 4)]
    figure = _figure(_WIDTH, 0.4 + 2.8 * len(rows))
    panels = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, step in zip(panels.flat, steps, strict=False):
        for method in group.methods:
            for place, run in enumerate(run for run in method.runs if step in run.histories):
                entries = run.histories[step].entries
                x, y = [r.iteration for r in entries], [r.losses.get("total", math.nan) for r in entries]
                style = {**look[method.label], "marker": "", "linewidth": 1.4, "alpha": 0.85}
                axes.plot(*_smooth(x, y), label=drawable(method.label) if place == 0 else None, **style)
        axes.set_title(f"step {step}")
        axes.set_xlabel("iteration")
        _log_if_far(axes)
        _tidy(axes)
    for axes in panels.flat[len(steps) :]:
        axes.set_axis_off()
    panels[0, 0].set_ylabel("total loss")
    _legend(figure, list(panels.flat), list(look))
    return figure


def loss_terms(run: Run) -> Figure | None:
    """Loss terms and learning rate of a run, one column per step."""
    steps = [step for step, history in run.histories.items() if history.entries]
    if not steps:
        return None
    figure = _figure(min(max(5.0, 3.1 * len(steps)), 20.0), 4.6)
    panels = figure.subplots(2, len(steps), squeeze=False, height_ratios=[3, 1], sharex="col")
    names = sorted({name for step in steps for entry in run.histories[step].entries for name in entry.losses})
    for column, step in enumerate(steps):
        entries = run.histories[step].entries
        x = [entry.iteration for entry in entries]
        for place, name in enumerate(names):
            y = [entry.losses.get(name, math.nan) for entry in entries]
            if not all(map(math.isnan, y)):
                colour = "black" if name == "total" else _COLOURS[place % len(_COLOURS)]
                dashes = "-" if place < len(_COLOURS) else "--"
                panels[0, column].plot(
                    *_smooth(x, y), label=drawable(name), color=colour, linestyle=dashes, linewidth=1.3
                )
        panels[1, column].plot(x, [entry.lr for entry in entries], color="0.35", linewidth=1.3)
        _log_if_far(panels[0, column])
        panels[0, column].set_title(f"step {step}")
        panels[1, column].set_xlabel("iteration")
    for axes in panels.flat:
        _tidy(axes)
    panels[0, 0].set_ylabel("loss")
    panels[1, 0].set_ylabel("learning rate")
    _legend(figure, panels[0], names)
    return figure


def cost(lines: Sequence[Line]) -> Figure | None:
    """Wall time of training and peak memory per method."""
    shown = [line for line in lines if line.seconds is not None or line.memory is not None]
    if not shown:
        return None
    figure = _figure(_WIDTH, 1.3 + 0.34 * len(shown))
    left, right = figure.subplots(1, 2, sharey=True)
    longest = max((line.seconds.mean for line in shown if line.seconds is not None), default=0)
    units = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
    unit, scale = next((unit for unit in units if longest >= 2 * unit[1]), units[-1])
    _bars(left, shown, lambda line: line.seconds, scale, f"wall time of training ({unit})")
    _bars(right, shown, lambda line: line.memory, 1024.0, "peak memory (GiB)")
    left.set_yticks(range(len(shown)), [drawable(line.method.label) for line in shown])
    left.invert_yaxis()
    return figure


def _bars(
    axes: Axes, lines: Sequence[Line], number: Callable[[Line], Stat | None], scale: float, title: str
) -> None:
    for place, line in enumerate(lines):
        found = number(line)
        if found is not None:
            error = None if found.std is None else found.std / scale
            axes.barh(place, found.mean / scale, xerr=error, color=_COLOURS[0], height=0.62)
            axes.annotate(
                f"{found.mean / scale:.3g}",
                (0, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color="white",
                fontsize=8,
            )
    axes.set_xlabel(title)
    _tidy(axes)
    axes.grid(visible=False, axis="y")


def sample_images(group: Group, index: int) -> Figure | None:
    """One sample image: input and truth in the first column, then one column per method, one row per step.

    More than ``BESIDE`` methods are split into several bands, each with input and truth.
    """
    having = [(method, run) for method in group.methods for run in method.runs[:1] if index in run.samples]
    if not having:
        return None
    steps = sorted({int(k[4:]) for _, run in having for k in run.samples[index] if k.startswith("step")})
    steps = _thinned(steps, _STEPS_SHOWN) or [0]
    shape = np.divide(*_pixels(next(iter(having[0][1].samples[index].values()))).shape[:2])
    most = math.ceil(len(having) / math.ceil(len(having) / BESIDE))  # fewest bands, equally long
    bands = [having[place : place + most] for place in range(0, len(having), most)]
    columns, rows = 1 + max(map(len, bands)), max(2, len(steps))
    cell = min(2.2, (_WIDTH - 0.3) / columns)
    figure = _figure(cell * columns + 0.3, ((cell * shape + 0.1) * rows + 0.5) * len(bands))
    for part, band in zip(_subfigures(figure, len(bands)), bands, strict=True):
        panels = part.subplots(rows, columns, squeeze=False)
        _sample_band(panels, band, index, steps, shape)
    return figure


def _sample_band(
    panels: Array, having: Sequence[tuple[Method, Run]], index: int, steps: Sequence[int], shape: float
) -> None:
    """Fill one band of ``sample_images``."""
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_box_aspect(shape)  # empty panels too, else their titles are not aligned
        axes.spines[:].set_visible(False)
    first = having[0][1].samples[index]
    for axes, key in zip(panels[:, 0], ("input", "truth"), strict=False):
        _show(axes, first.get(key))
        axes.set_title(key, fontsize=9)
    for column, (method, run) in zip(panels.T[1:], having, strict=False):
        column[0].set_title(drawable(method.label), fontsize=9)
        for axes, step in zip(column, steps, strict=False):
            # Joint training has one step; its prediction is in the row of the last step.
            key = f"step{step}" if not method.joint else "step0" if step == steps[-1] else ""
            _show(axes, run.samples[index].get(key))
    for axes, step in zip(panels[:, 1], steps, strict=False):
        axes.set_ylabel(f"step {step}", fontsize=9)


def _show(axes: Axes, path: Path | None) -> None:
    if path is not None:
        axes.imshow(_pixels(path), interpolation="antialiased")


def _pixels(path: Path) -> Array:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); remove it") from error


def _heat(
    axes: Axes, values: Array, names: Sequence[str] | None, *, cmap: str | Colormap, vmin: float, vmax: float
) -> Any:
    """Draw a heat map, with numbers in its cells up to ``_NUMBERED`` rows; NaN cells are grey."""
    known = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
    colours = known.with_extremes(bad=_NO_RESULT)
    image = axes.imshow(values, cmap=colours, vmin=vmin, vmax=vmax, aspect="auto", interpolation="nearest")
    many = values.shape[0] > _NUMBERED
    shown = [drawable(name) for name in names or ()]
    axes.set_yticks(range(len(shown)), shown, fontsize=5.5 if many else 8)
    axes.set_xticks(range(values.shape[1]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if not many and values.shape[1] <= _NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                text = axes.text(column, row, str(round(value)), ha="center", va="center", fontsize=6.5)
                text.set_color("white" if dark else "black")
    return image


def _log_if_far(axes: Axes) -> None:
    """Use a logarithmic scale if a few values, e.g. of a run that diverges, would flatten all others."""
    values = np.array([value for line in axes.lines for value in np.asarray(line.get_ydata(), dtype=float)])
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if sizes.size and sizes.max() > _FAR * (usual := float(np.median(sizes))):
        axes.set_yscale("symlog", linthresh=usual, linscale=2)  # linear between plus and minus the median
        ticks = SymmetricalLogLocator(base=10, linthresh=usual)
        ticks.set_params(numticks=6)
        axes.yaxis.set_major_locator(ticks)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # not as powers of ten


def _smooth(x: Sequence[float], y: Sequence[float]) -> tuple[Array, Array]:
    """Means of consecutive points, at most about ``_SMOOTHED`` of them."""
    size = max(1, len(x) // _SMOOTHED)
    cut = [slice(place, place + size) for place in range(0, len(x), size)]
    return np.array([np.mean(x[part]) for part in cut]), np.array([np.mean(y[part]) for part in cut])


def _thinned(items: Sequence[int], most: int) -> list[int]:
    """At most ``most`` items, evenly spaced, with the first and the last."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round()
    return [items[int(place)] for place in places]


def _wrapped(widths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of ``widths`` in rows whose widths add up to at most ``most``."""
    row: list[int] = []
    for place, width in enumerate(widths):
        if row and sum(widths[other] for other in row) + width > most:
            yield row
            row = []
        row.append(place)
    yield row


def _subfigures(figure: Figure, rows: int) -> Sequence[Any]:
    return [figure] if rows == 1 else figure.subfigures(rows, 1, squeeze=False)[:, 0].tolist()


def _legend(figure: Figure, panels: Sequence[Axes], labels: Sequence[str]) -> None:
    """One legend for all panels, below them, in the order of ``labels``."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    shown = [label for label in map(drawable, labels) if label in handles]
    # About 14 characters per inch; handles are long enough to show dashes.
    room = int(14 * figure.get_figwidth() / (8 + max(map(len, shown), default=0)))
    figure.legend(
        [handles[label] for label in shown],
        shown,
        loc="outside lower center",
        ncols=max(1, min(8, room)),
        handlelength=3.2,
        frameon=False,
        fontsize=9,
    )


def _tidy(axes: Axes) -> None:
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.title.set_fontsize(10)
