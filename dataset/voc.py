"""Pascal VOC 2012 with the augmented training masks, and its layout on disk."""

from __future__ import annotations

import os
from pathlib import Path

from dataset.base import SegmentationDataset, files_by_stem
from utils.errors import DataError, UserError
from utils.files import read_text

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

IMAGES, MASKS = "JPEGImages", "SegmentationClassAug"
# List files below the root: `image mask` lines, in ImageSets names only. The first existing file is read.
_LISTS = {
    "train": (
        "splits/train_aug.txt",
        "ImageSets/Segmentation/train_aug.txt",
        "ImageSets/Segmentation/trainaug.txt",
    ),
    "val": ("splits/val.txt", "ImageSets/Segmentation/val.txt"),
}


def open_voc(data_root: Path, split: str) -> SegmentationDataset:
    """VOC in ``<data_root>/PascalVOC12``, ``<data_root>`` or ``<data_root>/VOCdevkit/VOC2012``.

    Raises:
        UserError: the data are in none of the three.
        DataError: a list file is invalid or names an image twice.
    """
    remedy = "download it with data/download_voc.sh or correct --data_root"
    root = find_root(data_root, ("PascalVOC12", ".", "VOCdevkit/VOC2012"), "VOC", remedy)
    return open_voc_layout("voc", root, split, VOC_CLASSES)


def find_root(data_root: Path, places: tuple[str, ...], what: str, remedy: str) -> Path:
    """The first of the places below ``data_root`` with VOC's two folders; raises UserError if none."""
    for place in places:
        root = data_root / place
        if (root / IMAGES).is_dir() and (root / MASKS).is_dir():
            return root
    looked = " or ".join(str(data_root / place) for place in places)
    raise UserError(f"no {what} data: looked for {IMAGES}/ and {MASKS}/ in {looked}; {remedy}")


def open_voc_layout(name: str, root: Path, split: str, class_names: tuple[str, ...]) -> SegmentationDataset:
    """A data set in VOC's layout, with lists from files or, if missing, derived from the masks.

    A missing training list is all masks that are not in the validation list, sorted by name (for VOC exactly
    the published list); a missing validation list is all masks that are not in the training list.
    """
    pairs = _read_list(root, split)
    if pairs is None:
        pairs = _derive_list(root, split)
    if not pairs:
        raise UserError(f"{root}: the {split} list is empty; remove the list file to derive it")
    images, masks = zip(*pairs, strict=True)
    return SegmentationDataset(name, split, root, list(images), list(masks), class_names)


def _read_list(root: Path, split: str) -> list[tuple[Path, Path]] | None:
    path = next((root / name for name in _LISTS[split] if (root / name).is_file()), None)
    if path is None:
        return None
    pairs: list[tuple[Path, Path]] = []
    lines: dict[str, int] = {}  # image -> number of its line
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) == 1:  # a name, as in ImageSets
            fields = [f"{IMAGES}/{fields[0]}.jpg", f"{MASKS}/{fields[0]}.png"]
        elif len(fields) > 2:
            raise DataError(f"{path}:{number}: expected `/{IMAGES}/x.jpg /{MASKS}/x.png`, found {line!r}")
        image, mask = (root / field.lstrip("/") for field in fields)
        if (first := lines.setdefault(os.path.normpath(image), number)) != number:
            raise DataError(
                f"{path}:{number}: {fields[0]} is already listed in line {first}; remove one of the two lines"
            )
        pairs.append((image, mask))
    return pairs


def _derive_list(root: Path, split: str) -> list[tuple[Path, Path]]:
    other = _read_list(root, "val" if split == "train" else "train")
    if other is None:
        raise UserError(
            f"{root}: no lists of training and validation images, there is neither {_LISTS['train'][0]} nor "
            f"{_LISTS['val'][0]} nor ImageSets/Segmentation/val.txt; run data/download_voc.sh"
        )
    taken = {mask.stem for _, mask in other}
    stems = [stem for stem in files_by_stem(root / MASKS, (".png",)) if stem not in taken]
    return [(root / IMAGES / f"{stem}.jpg", root / MASKS / f"{stem}.png") for stem in stems]
