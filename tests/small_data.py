"""Generated data sets in the layouts of ADE20K and of own data, small enough to train on in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_pair(image: Path, mask: Path, classes: Sequence[int], size: int, seed: int) -> None:
    """A noisy image and a mask: the background (0) above, then one stripe per class."""
    rng = np.random.default_rng(seed)
    ids = np.repeat([0, *classes], -(-size // (1 + len(classes))))[:size]
    labels = np.repeat(ids[:, None], size, axis=1).astype(np.uint8)
    colours = np.random.default_rng(0).integers(0, 255, (256, 3))[labels]
    picture = (colours + rng.integers(-20, 20, (size, size, 3))).clip(0, 255).astype(np.uint8)
    Image.fromarray(picture).save(image, quality=90)
    Image.fromarray(labels).save(mask)


def make_folders(
    root: Path, names: Sequence[str], splits: dict[str, list[list[int]]], size: int = 64
) -> Path:
    """``<root>/<name>/<split>/`` for the two names, images and masks, with the classes of each image."""
    for split, images in splits.items():
        folders = [root / name / split for name in names]
        for folder in folders:
            folder.mkdir(parents=True)
        for i, classes in enumerate(images):
            stem = f"{split}_{i:08}"
            write_pair(folders[0] / f"{stem}.jpg", folders[1] / f"{stem}.png", classes, size, seed=i)
    return root


def make_ade(root: Path) -> Path:
    """ADE20K's layout: 12 images with classes up to 100, 12 with later ones, and 6 to test with both."""
    early = [[1 + 8 * i, 2 + 8 * i] for i in range(12)]
    late = [[101 + 4 * i, 102 + 4 * i] for i in range(12)]
    val = [[1 + 8 * i, 101 + 8 * i] for i in range(6)]
    splits = {"training": early + late, "validation": val}
    make_folders(root / "ADEChallengeData2016", ("images", "annotations"), splits)
    return root


def make_own(root: Path) -> Path:
    """Own data of 12 classes below ``root``, without ``classes.txt``: 26 images to train on, 6 to test."""
    train = [[1 + i % 12, 1 + (5 * i + 3) % 12] for i in range(26)]
    val = [[1 + 2 * i, 2 + 2 * i] for i in range(6)]
    return make_folders(root, ("images", "masks"), {"train": train, "val": val})
