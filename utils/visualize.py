"""Images of masks (colours, overlays, predictions beside the labels) and of confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw

from utils.drawing import drawable, font, new_figure, render
from utils.files import atomic_write
from utils.labels import VOID
from utils.lazy import torch
from utils.palette import palette

Array = np.ndarray[Any, np.dtype[Any]]
SAMPLE_SIDE = 320  # longer side of sample images, in pixels
_OPACITY = 0.6  # of the colours over an image
_NUMBERED = 40  # largest number of classes for which cells of a confusion matrix show numbers


def colorize(mask: Array | torch.Tensor) -> Array:
    """Colours of a mask: H×W class ids (255 void, shown in VOC's cream) → H×W×3, uint8."""
    ids = np.asarray(mask)
    return palette(max(256, int(ids.max(initial=0)) + 1))[ids]


def overlay(image: Array | torch.Tensor, mask: Array | torch.Tensor) -> Array:
    """Blend the colours of a mask's classes into an image, except where it is background or void.

    Args:
        image: H×W×3 or 3×H×W, uint8.
        mask: H×W, class ids.

    Returns:
        H×W×3, uint8.
    """
    pixels, ids = _channels_last(image), np.asarray(mask)
    mixed = np.rint((1 - _OPACITY) * pixels + _OPACITY * colorize(ids)).astype(np.uint8)
    unchanged = (ids == 0) | (ids == VOID)
    return np.where(unchanged[..., None], pixels, mixed)


def prediction_grid(
    images: Sequence[Array | torch.Tensor],
    targets: Sequence[Array | torch.Tensor],
    predictions: Sequence[Array | torch.Tensor],
    class_names: Mapping[int, str],
    *,
    old_predictions: Sequence[Array | torch.Tensor] | None = None,
    path: Path | None = None,
) -> Array:
    """A grid with one row per image: image, labels, old model's prediction, prediction; a legend below.

    Args:
        images: each H×W×3 or 3×H×W, uint8; sizes may differ.
        targets: each H×W, class ids, 255 void.
        predictions: each H×W, class ids.
        class_names: by class id.
        old_predictions: each H×W, of the previous step's model; None: no such column.
        path: also write the grid there, as PNG.

    Returns:
        The grid, height×width×3, uint8.

    Raises:
        UserError: ``path`` cannot be written.
    """
    old = {} if old_predictions is None else {"old model's prediction": old_predictions}
    masks = {"labels": targets, **old, "prediction": predictions}
    if not images or any(len(column) != len(images) for column in masks.values()):
        raise ValueError("prediction_grid needs as many labels and predictions as images, and at least one")
    figure = _grid_figure([_channels_last(image) for image in images], masks, class_names)
    image = render(figure)
    if path is not None:
        with atomic_write(path, "free some space or choose another --logdir") as file:
            image.save(file, "png")
    return np.asarray(image)


def confusion_image(confusion: Array | torch.Tensor, class_names: Sequence[str], title: str = "") -> Array:
    """An image of a confusion matrix, in percent of each row (true class).

    Pillow draws it in a tenth of matplotlib's time, which every step of a run would spend.

    Args:
        confusion: C×C counts, rows are labels, columns predictions.
        class_names: C names.
        title: a line above it.

    Returns:
        height×width×3, uint8; with up to 40 classes cells of half a percent and more show their numbers.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    numbered = len(class_names) <= _NUMBERED
    cell, size = (30, 12) if numbered else (12, 9)  # pixels: of a cell, and the height of the names
    side = cell * len(class_names)
    cells = Image.fromarray(colormaps["Blues"](shares / 100, bytes=True)[..., :3].copy())
    cells = cells.resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(cells)
    for row, column in np.argwhere(shares >= 0.5) if numbered else ():
        share, centre = shares[row, column], (cell * (column + 0.5), cell * (row + 0.5))
        draw.text(centre, f"{share:.0f}", "white" if share > 55 else "black", font("0", 11)[1], "mm")

    unit = "% of the true class's pixels"
    above, below, beside = (
        _line(text, side)
        for text in (title, f"predicted, {'in' if numbered else 'dark: 100'} {unit}", "true")
    )
    names = _column(class_names, cell, size)
    left, top = beside.height + names.width, above.height
    width = left + max(side, above.width, below.width) + size
    canvas = Image.new("RGB", (width, top + side + names.width + below.height), "white")
    canvas.paste(above, (left, 0))
    canvas.paste(cells, (left, top))
    canvas.paste(beside.transpose(Image.Transpose.ROTATE_90), (0, top))
    canvas.paste(names, (beside.height, top))
    canvas.paste(names.transpose(Image.Transpose.ROTATE_90), (left, top + side))
    canvas.paste(below, (left, top + side + names.width))
    ImageDraw.Draw(canvas).rectangle((left - 1, top - 1, left + side, top + side), outline="gray")
    return np.asarray(canvas)


def _line(text: str, length: int) -> Image.Image:
    """A line of text in the middle of a length in pixels, which it may exceed."""
    shown, drawn = font(text, 13)
    line = Image.new("RGB", (max(length, math.ceil(drawn.getlength(shown))), 24), "white")
    ImageDraw.Draw(line).text((line.width / 2, 12), shown, "black", drawn, "mm")
    return line


def _column(names: Sequence[str], height: int, size: int) -> Image.Image:
    """Names below each other, each of a height in pixels, which end at the right."""
    fonts = [font(name, size) for name in names]
    width = max(math.ceil(drawn.getlength(shown)) for shown, drawn in fonts) + size // 2
    column = Image.new("RGB", (width, height * len(names)), "white")
    draw = ImageDraw.Draw(column)
    for place, (shown, drawn) in enumerate(fonts):
        draw.text((width - size // 3, height * (place + 0.5)), shown, "black", drawn, "rm")
    return column


def write_samples(
    folder: Path,
    images: Sequence[Array | torch.Tensor],
    targets: Sequence[Array | torch.Tensor],
    predictions: Sequence[Array | torch.Tensor],
    step: int,
) -> None:
    """Write sample images of a step, for reports that compare steps and methods.

    ``<i>_input.png``, ``<i>_truth.png`` and ``<i>_step<step>.png``, masks as overlays, the longer side at
    most ``SAMPLE_SIDE`` pixels.

    Args:
        folder: made if missing.
        images: each H×W×3 or 3×H×W, uint8.
        targets: each H×W, class ids, 255 void.
        predictions: each H×W, class ids, of the model after this step.
        step: number of the step.

    Raises:
        UserError: a file cannot be written.
    """
    for index, (image, target, prediction) in enumerate(zip(images, targets, predictions, strict=True)):
        shown = {
            f"{index}_input.png": _channels_last(image),
            f"{index}_truth.png": overlay(image, target),
            f"{index}_step{step}.png": overlay(image, prediction),
        }
        for name, pixels in shown.items():
            sample = Image.fromarray(pixels)
            sample.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
            with atomic_write(folder / name, "free some space or choose another --logdir") as file:
                sample.save(file, format="png")


def _grid_figure(
    images: Sequence[Array], masks: Mapping[str, Sequence[Array | torch.Tensor]], names: Mapping[int, str]
) -> Figure:
    present = set[int]()
    for column in masks.values():
        for mask in column:
            present.update(np.unique(np.asarray(mask)).tolist())
    shown = sorted(present - {0, VOID})
    width, cell = 1 + len(masks), 3.0
    heights = [min(cell * image.shape[0] / image.shape[1], 1.5 * cell) for image in images]
    per_row = max(1, int(width * cell / 1.9))
    legend_height = 0.15 + 0.24 * math.ceil(len(shown) / per_row)
    figure = new_figure(width * cell, sum(heights) + 0.3 + legend_height)
    grid = figure.add_gridspec(len(images) + 1, width, height_ratios=[*heights, legend_height])
    for row, image in enumerate(images):
        cells = [image, *(overlay(image, column[row]) for column in masks.values())]
        for place, (title, content) in enumerate(zip(["image", *masks], cells, strict=True)):
            axes = figure.add_subplot(grid[row, place])
            axes.imshow(content, interpolation="antialiased")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=11)
    legend = figure.add_subplot(grid[len(images), :])
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


def _channels_last(image: Array | torch.Tensor) -> Array:
    """H×W×3 or 3×H×W, uint8 → H×W×3."""
    pixels = np.asarray(image)
    # 3×H×3 is ambiguous: a tensor has its channels first, an array last.
    is_tensor = not isinstance(image, np.ndarray)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and (is_tensor or pixels.shape[2] != 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image must be H×W×3 or 3×H×W in uint8, not {pixels.dtype} {pixels.shape}")
    return pixels
