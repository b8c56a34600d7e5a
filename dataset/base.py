"""A data set on disk: images and masks in list order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dataset.decoding import read_image, read_mask
from utils.errors import DataError, UserError
from utils.files import is_utf8, printable
from utils.labels import VOID
from utils.lazy import tv_tensors

MAX_CLASSES = 255  # ids 0..254

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class SegmentationDataset:
    """Images with one mask each, in the order of the published lists.

    Masks contain dataset class ids: 0 is background (ADE20K: "other"), 255 is void.

    Attributes:
        name: ``voc``, ``ade``, ``folder`` or ``shapes``.
        split: ``train`` or ``val``.
        root: folder of the data set.
        images: image files.
        masks: mask files; ``masks[i]`` belongs to ``images[i]``.
        class_names: name of each dataset class id.
        ignore_at_eval: ids that are ignored in evaluation (ADE20K: ``{0}``).
    """

    name: str
    split: str
    root: Path
    images: list[Path] = field(repr=False)
    masks: list[Path] = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    ignore_at_eval: frozenset[int] = frozenset()

    @property
    def num_classes(self) -> int:
        """Number of dataset class ids, background included."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image (uint8, 3×H×W, RGB) and mask (uint8, 1×H×W, dataset class ids).

        Raises:
            DataError: a file is missing or damaged, the sizes differ, or the mask has an unknown class id.
        """
        mask = self.read_mask(index)
        image = read_image(self.images[index], size=(mask.shape[-2], mask.shape[-1]))
        return tv_tensors.Image(image), mask

    def read_mask(self, index: int) -> tv_tensors.Mask:
        """The mask (uint8, 1×H×W, dataset class ids). Raises DataError like :meth:`read`."""
        path = self.masks[index]
        mask = read_mask(path)
        # In uint8, +1 wraps void to 0, so one maximum finds ids between the classes and void.
        if int((mask + 1).max()) > self.num_classes:
            bad = int(mask[mask != VOID].max())
            raise DataError(
                f"{path}: class id {bad} is unknown, {self.name} has ids 0 to {self.num_classes - 1} "
                "and 255 for void; correct the mask"
            )
        return tv_tensors.Mask(mask)


def files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder with one of the suffixes, sorted by name, by their stems.

    Raises:
        UserError: the folder is missing.
        DataError: two files differ only in the suffix, or a name is not UTF-8.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check --data_root")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if not is_utf8(path):
            raise DataError(
                f"{printable(path)}: the file name is not UTF-8, which lists, logs and results need; "
                "rename it (convmv renames whole folders)"
            )
        if path.stem in files:
            raise DataError(f"{path}: {files[path.stem].name} has the same name; remove one of them")
        files[path.stem] = path
    return files


def pair_by_stem(
    image_folder: Path, mask_folder: Path, *, unpaired: bool = False
) -> tuple[list[Path], list[Path]]:
    """Images and PNG masks of two folders, paired by stem, sorted by name.

    ``unpaired``: include unpaired files, with the expected path of the missing one.

    Raises:
        UserError: a folder is missing or empty.
        DataError: an image has no mask or a mask no image.
    """
    images, masks = files_by_stem(image_folder, IMAGE_SUFFIXES), files_by_stem(mask_folder, (".png",))
    if not images:
        raise UserError(f"{image_folder}: contains no image ({', '.join(IMAGE_SUFFIXES)}); check --data_root")
    unmatched = [(images[s], "mask", mask_folder) for s in images.keys() - masks.keys()]
    unmatched += [(masks[s], "image", image_folder) for s in masks.keys() - images.keys()]
    if unmatched and not unpaired:
        path, what, where = min(unmatched)
        raise DataError(
            f"{path}: no {what} of that name in {where} ({len(unmatched)} such files); add or remove it"
        )
    stems = sorted(images.keys() | masks.keys(), key=lambda stem: (images.get(stem) or masks[stem]).name)
    return (
        [images.get(stem, image_folder / f"{stem}.jpg") for stem in stems],
        [masks.get(stem, mask_folder / f"{stem}.png") for stem in stems],
    )
