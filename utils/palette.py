"""The colours of classes in masks and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np


def palette(num_classes: int = 256) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Colours of PASCAL VOC, for any number of classes: num_classes×3, uint8; 0 is black.

    VOC's rule: the bits of the class id go in turn to red, green and blue, from the highest bit down.
    """
    ids = np.arange(num_classes, dtype=np.int64)
    colours = np.zeros((num_classes, 3), dtype=np.int64)
    for level in range(8):
        for channel in range(3):
            colours[:, channel] |= (ids >> (3 * level + channel) & 1) << (7 - level)
    return colours.astype(np.uint8)
