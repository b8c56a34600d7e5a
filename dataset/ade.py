"""ADE20K, the 150 classes of the Scene Parsing challenge."""

from __future__ import annotations

from pathlib import Path

from dataset.base import SegmentationDataset, pair_by_stem
from utils.errors import DataError, UserError
from utils.files import read_text

NUM_CLASSES = 151  # "other" and 150 classes
_FOLDER = "ADEChallengeData2016"
_SPLITS = {"train": "training", "val": "validation"}


def open_ade(data_root: Path, split: str, *, unpaired: bool = False) -> SegmentationDataset:
    """ADE20K in ``<data_root>/ADEChallengeData2016`` or ``<data_root>``, files sorted by name.

    Id 0 is "other": background in training, ignored in evaluation.
    ``unpaired`` as in :func:`dataset.open_dataset`.

    Raises:
        UserError: the data are in neither folder.
        DataError: an image has no mask or a mask no image.
    """
    for root in (data_root / _FOLDER, data_root):
        folders = root / "images" / _SPLITS[split], root / "annotations" / _SPLITS[split]
        if all(folder.is_dir() for folder in folders):
            images, masks = pair_by_stem(*folders, unpaired=unpaired)
            return SegmentationDataset("ade", split, root, images, masks, _class_names(root), frozenset({0}))
    raise UserError(
        f"no ADE20K data: looked for images/{_SPLITS[split]}/ and annotations/{_SPLITS[split]}/ in "
        f"{data_root / _FOLDER} or {data_root}; download it with data/download_ade.sh or correct --data_root"
    )


def ade_class_names(data_root: Path) -> tuple[str, ...]:
    """Names of ids 0..150, from the release below ``data_root`` or built in."""
    root = data_root / _FOLDER
    return _class_names(root if root.is_dir() else data_root)


def _class_names(root: Path) -> tuple[str, ...]:
    """Names of ids 0..150: from the release's ``objectInfo150.txt`` (tabs, name last) or built in."""
    info = root / "objectInfo150.txt"
    if info.is_file():
        rows = read_text(info).splitlines()[1:]
        names = [row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip()]
    else:
        info = Path(__file__).with_name("ade_names.txt")
        names = info.read_text(encoding="utf-8").split("\n")[:-1]
    if len(names) != NUM_CLASSES - 1:
        raise DataError(f"{info}: expected {NUM_CLASSES - 1} class names, found {len(names)}; replace it")
    return ("other", *names)
