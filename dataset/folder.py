"""A user's own data: ``images/{train,val}``, ``masks/{train,val}`` and ``classes.txt``."""

from __future__ import annotations

from pathlib import Path

from dataset.base import MAX_CLASSES, SegmentationDataset, pair_by_stem
from utils.errors import DataError, UserError
from utils.files import read_text


def open_folder(data_root: Path, split: str, *, unpaired: bool = False) -> SegmentationDataset:
    """A user's data below ``data_root``: images and PNG masks of the same name, sorted by name.

    Line i of ``classes.txt`` (from 0) names class id i; the first line is the background.
    ``unpaired`` as in :func:`dataset.open_dataset`.

    Raises:
        UserError: a folder or ``classes.txt`` is missing.
        DataError: an image has no mask or a mask no image, or ``classes.txt`` is invalid.
    """
    if not (data_root / "images").is_dir():
        raise UserError(
            "no data: looked for images/{train,val}, masks/{train,val} and classes.txt in "
            f"{data_root}; docs/own_data.md shows the layout"
        )
    folders = data_root / "images" / split, data_root / "masks" / split
    images, masks = pair_by_stem(*folders, unpaired=unpaired)
    return SegmentationDataset(
        "folder", split, data_root, images, masks, read_class_names(data_root / "classes.txt")
    )


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names, one per line, background first.

    Raises:
        UserError: the file is missing.
        DataError: not UTF-8, fewer than 2 or more than 255 names, an empty line, or a name twice.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: missing; write one class name per line, the background first (docs/own_data.md)"
        )
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not 2 <= len(names) <= MAX_CLASSES:
        raise DataError(f"{path}: {len(names)} classes, expected 2 to {MAX_CLASSES}, the background first")
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            fault = f"{name!r} is named twice" if name else "the line is empty"
            raise DataError(f"{path}:{number + 1}: {fault}; every line names one class")
    return tuple(names)
