"""Data sets, image lists of a step, labels, transforms and loaders."""

from __future__ import annotations

from pathlib import Path

from dataset.ade import ade_class_names, open_ade
from dataset.base import SegmentationDataset
from dataset.drawing import SHAPE_CLASSES
from dataset.folder import open_folder, read_class_names
from dataset.shapes import open_shapes
from dataset.voc import VOC_CLASSES, open_voc
from utils.errors import UserError

# VOC's layout has list files; in the other layout, files of two folders are paired by name.
_LISTED = {"voc": open_voc, "shapes": open_shapes}
_PAIRED = {"ade": open_ade, "folder": open_folder}


def open_dataset(
    name: str, data_root: str | Path, split: str, *, unpaired: bool = False
) -> SegmentationDataset:
    """Open one split of a data set on disk, without reading images.

    Args:
        name: ``voc``, ``ade``, ``folder`` or ``shapes``.
        data_root: folder of ``--data_root``.
        split: ``train`` or ``val``.
        unpaired: include images without mask and masks without image (reported by ``--check_data``).

    Raises:
        UserError: the data are not in the folder; names the expected files and their source.
        DataError: a list file or ``classes.txt`` is invalid, or an image has no mask or a mask no image.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, not {split!r}")
    known = _LISTED.keys() | _PAIRED.keys()
    if name not in known:
        raise UserError(f"--dataset {name}: unknown, choose from {', '.join(sorted(known))}")
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"--data_root {root}: no such folder; {_remedy(name, root)}")
    if name in _PAIRED:
        return _PAIRED[name](root, split, unpaired=unpaired)
    return _LISTED[name](root, split)


def class_names(name: str, data_root: str | Path) -> tuple[str, ...]:
    """Name of each dataset class id, without opening the data set.

    Raises:
        UserError: ``classes.txt`` of a user's data is missing or invalid.
    """
    root = Path(data_root)
    if name == "folder":
        return read_class_names(root / "classes.txt")
    return {"voc": VOC_CLASSES, "shapes": SHAPE_CLASSES}.get(name) or ade_class_names(root)


def _remedy(name: str, root: Path) -> str:
    return {
        "voc": "download the data with data/download_voc.sh",
        "ade": "download the data with data/download_ade.sh",
        "shapes": f"generate the data with `python data/make_shapes.py --out {root}`",
    }.get(name, "docs/own_data.md shows the layout")
