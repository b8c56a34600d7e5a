"""Pictures of masks: colours, overlays, predictions beside the truth, the confusion matrix."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from utils.drawing import drawable
from utils.files import atomic_write
from utils.labels import VOID
from utils.palette import palette

Array = np.ndarray[Any, np.dtype[Any]]
SAMPLE_SIDE = 320
_OPACITY = 0.6  # of the colours over a picture
_NUMBERED = 40  # classes of a confusion matrix up to which its cells hold numbers


def colorize(mask: Array | Tensor) -> Array:
    """Mask H×W of class ids (255 void, in VOC's cream) to a picture H×W×3, uint8."""
    ids = np.asarray(mask)
    return palette(max(256, int(ids.max(initial=0)) + 1))[ids]


def overlay(image: Array | Tensor, mask: Array | Tensor) -> Array:
    """Colour the classes of a mask over a picture; background and void leave the picture as it is.

    Args:
        image: H×W×3 or 3×H×W, uint8.
        mask: H×W, class ids.

    Returns:
        H×W×3, uint8.
    """
    picture, ids = _picture(image), np.asarray(mask)
    mixed = np.rint((1 - _OPACITY) * picture + _OPACITY * colorize(ids)).astype(np.uint8)
    bare = (ids == 0) | (ids == VOID)
    return np.where(bare[..., None], picture, mixed)


def prediction_grid(
    images: Sequence[Array | Tensor],
    targets: Sequence[Array | Tensor],
    predictions: Sequence[Array | Tensor],
    class_names: Mapping[int, str],
    *,
    old_predictions: Sequence[Array | Tensor] | None = None,
    path: Path | None = None,
) -> Array:
    """Pictures in rows: image, labels, old model's prediction, prediction; below, the classes' colours.

    Args:
        images: each H×W×3 or 3×H×W, uint8; sizes may differ.
        targets: each H×W, class ids, 255 void.
        predictions: each H×W, class ids.
        class_names: by class id.
        old_predictions: each H×W, of the model before this step, for a column before the predictions.
        path: also write the picture there, as PNG.

    Returns:
        The picture, height×width×3, uint8.

    Raises:
        UserError: ``path`` cannot be written.
    """
    old = {} if old_predictions is None else {"old model's prediction": old_predictions}
    masks = {"labels": targets, **old, "prediction": predictions}
    if not images or any(len(column) != len(images) for column in masks.values()):
        raise ValueError("prediction_grid needs as many labels and predictions as images, and at least one")
    figure = _grid_figure([_picture(image) for image in images], masks, class_names)
    return _render(figure, path)


def confusion_figure(confusion: Array | Tensor, class_names: Sequence[str]) -> Figure:
    """Confusion matrix as a matplotlib figure, each row (true class) in percent of its pixels.

    Args:
        confusion: C×C counts, rows are labels, columns predictions.
        class_names: C names.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names, classes = [drawable(name) for name in class_names], len(class_names)
    # 151 names need about 0.11 inch each to be read; few classes get room for a number in every cell.
    side = 2.4 + (0.3 * classes if classes <= _NUMBERED else 0.115 * classes)
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="% of the true class's pixels", fraction=0.04, pad=0.02)
    size = 8 if classes <= _NUMBERED else 5.5
    axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    axes.tick_params(length=2 if classes <= _NUMBERED else 0, pad=2)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes <= _NUMBERED:
        _number_cells(axes, shares)
    return figure


def _number_cells(axes: Axes, shares: Array) -> None:
    """Percentages of half a percent and more, in the cells of a confusion matrix."""
    for row, column in zip(*np.nonzero(shares >= 0.5), strict=True):
        share = shares[row, column]
        colour = "white" if share > 55 else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=colour)


def write_samples(
    folder: Path,
    images: Sequence[Array | Tensor],
    targets: Sequence[Array | Tensor],
    predictions: Sequence[Array | Tensor],
    step: int,
) -> list[Path]:
    """Write the same pictures after every step, for reports that set steps and methods side by side.

    ``<i>_input.png``, ``<i>_truth.png`` and ``<i>_step<step>.png``, masks as colours over the picture, the
    longer side at most ``SAMPLE_SIDE`` pixels.

    Args:
        folder: made if missing.
        images: each H×W×3 or 3×H×W, uint8.
        targets: each H×W, class ids, 255 void.
        predictions: each H×W, class ids, of the model after this step.
        step: number of the step.

    Returns:
        The paths of the files.

    Raises:
        UserError: a file cannot be written.
    """
    written = []
    for index, (image, target, prediction) in enumerate(zip(images, targets, predictions, strict=True)):
        shown = {
            f"{index}_input.png": _picture(image),
            f"{index}_truth.png": overlay(image, target),
            f"{index}_step{step}.png": overlay(image, prediction),
        }
        for name, pixels in shown.items():
            picture = Image.fromarray(pixels)
            picture.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
            with atomic_write(folder / name, "free some space or choose another --logdir") as file:
                picture.save(file, format="png")
            written.append(folder / name)
    return written


def _grid_figure(
    pictures: Sequence[Array], masks: Mapping[str, Sequence[Array | Tensor]], names: Mapping[int, str]
) -> Figure:
    present = set[int]()
    for column in masks.values():
        for mask in column:
            present.update(np.unique(np.asarray(mask)).tolist())
    shown = sorted(present - {0, VOID})
    width, cell = 1 + len(masks), 3.0
    heights = [min(cell * picture.shape[0] / picture.shape[1], 1.5 * cell) for picture in pictures]
    per_row = max(1, int(width * cell / 1.9))
    legend_height = 0.15 + 0.24 * math.ceil(len(shown) / per_row)
    figure = _figure(width * cell, sum(heights) + 0.3 + legend_height)
    grid = figure.add_gridspec(len(pictures) + 1, width, height_ratios=[*heights, legend_height])
    for row, picture in enumerate(pictures):
        cells = [picture, *(overlay(picture, column[row]) for column in masks.values())]
        for place, (title, content) in enumerate(zip(["image", *masks], cells, strict=True)):
            axes = figure.add_subplot(grid[row, place])
            axes.imshow(content, interpolation="antialiased")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=11)
    legend = figure.add_subplot(grid[len(pictures), :])
    legend.set_axis_off()
    colours = palette(max([VOID, *shown]) + 1) / 255
    legend.legend(
        handles=[
            Patch(facecolor=tuple(colours[c]), edgecolor="0.4", label=drawable(names.get(c, f"class {c}")))
            for c in shown
        ],
        loc="center",
        ncols=per_row,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
    )
    return figure


def _picture(image: Array | Tensor) -> Array:
    picture = np.asarray(image)
    # Three rows of pixels look like channels: a tensor has its channels first, an array last.
    if picture.ndim == 3 and picture.shape[0] == 3 and (isinstance(image, Tensor) or picture.shape[2] != 3):
        picture = picture.transpose(1, 2, 0)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"an image must be H×W×3 or 3×H×W in uint8, not {picture.dtype} {picture.shape}")
    return picture


def _figure(width: float, height: float) -> Figure:
    """A figure that pyplot does not keep: nothing to close, no display needed."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _render(figure: Figure, path: Path | None) -> Array:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    if path is not None:
        with atomic_write(path, "free some space or choose another --logdir") as file:
            file.write(buffer.getvalue())
    with Image.open(buffer) as picture:
        return np.asarray(picture.convert("RGB"))
