"""Draws a legend of class names below an image with Pillow, so that the image's pixels stay unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from utils.drawing import font
from utils.labels import VOID
from utils.palette import palette

Array = np.ndarray[Any, np.dtype[Any]]
_SMALLEST_FONT = 12  # pixels
_WIDTH_OF_FONT = 45  # image width in font heights
_NARROWEST = 240  # pixels; least width of the result


def with_legend(image: Array, mask: Array, class_names: Sequence[str]) -> Array:
    """Draw a legend of the classes that occur in a mask below an image.

    The background, which overlays leave uncoloured, has an empty box. The result is wider than the image if a
    name needs the space.

    Args:
        image: H×W×3, uint8.
        mask: H×W, class ids; 255 is void and not listed.
        class_names: by class id.

    Returns:
        (H + legend)×(W or more)×3, uint8.
    """
    height, width = image.shape[:2]
    size = max(_SMALLEST_FONT, width // _WIDTH_OF_FONT)
    shown = [int(c) for c in np.unique(mask) if c != VOID]
    names = {c: font(class_names[c], size) for c in shown}
    lengths = [round(2.5 * size + drawn.getlength(name)) for name, drawn in names.values()]
    canvas_width = max(width, _NARROWEST, *(size + length for length in lengths))
    places, lines = _flow(lengths, canvas_width, size)
    line_height = round(1.6 * size)
    canvas = Image.new("RGB", (canvas_width, height + size + lines * line_height), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    colours = palette().tolist()
    for c, (left, line) in zip(shown, places, strict=True):
        middle = height + size // 2 + line * line_height + line_height // 2
        box = (left, middle - size // 2, left + size, middle + size // 2)
        draw.rectangle(
            box, fill=tuple(colours[c]) if c else "white", outline=(110, 110, 110), width=1 + size // 24
        )
        place = (left + round(1.4 * size), middle)
        draw.text(place, names[c][0], "black", names[c][1], "lm")
    return np.asarray(canvas)


def _flow(lengths: Sequence[int], width: int, margin: int) -> tuple[list[tuple[int, int]], int]:
    """Left edge and line of each entry (filled from left to right), and the number of lines."""
    places: list[tuple[int, int]] = []
    left, line = margin // 2, 0
    for length in lengths:
        if left + length > width and left > margin // 2:
            left, line = margin // 2, line + 1
        places.append((left, line))
        left += length
    return places, line + 1
