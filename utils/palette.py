"""Colours of classes in masks and images."""

from __future__ import annotations

from typing import Any

import numpy as np


def palette(num_classes: int = 256) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Colour map of PASCAL VOC for any number of classes: num_classes×3, uint8; class 0 is black.

    The bits of the class id are assigned in turn to red, green and blue, to their highest bits first.
    """
    ids = np.arange(num_classes, dtype=np.int64)
    colours = np.zeros((num_classes, 3), dtype=np.int64)
    for level in range(8):
        for channel in range(3):
            colours[:, channel] |= (ids >> (3 * level + channel) & 1) << (7 - level)
    return colours.astype(np.uint8)
