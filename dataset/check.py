"""``--check_data``: checks the files of a data set and compares a task's image lists with the published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataset import open_dataset
from dataset.base import SegmentationDataset
from dataset.decoding import StoredImage, load_image, read_mask
from dataset.image_labels import map_in_threads
from dataset.protocols import (
    Protocol,
    list_digest,
    load_step_list,
    named_classes,
    published_list,
    task_indices,
    why_empty,
)
from tasks import Task
from utils.errors import DataError, UserError
from utils.labels import VOID

PUBLISHED_SIZE = {"voc": 10582, "ade": 20210}  # training images

_NAMED = 3  # number of files named per kind of fault
_QUARTER_TURNS = (5, 6, 7, 8)  # camera orientations
_MUCH_VOID = 0.95  # fraction of the pixels
# Pillow's errors for a damaged file.
_DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass
class SplitReport:
    """Results of the check of one split.

    Attributes:
        images: image files that exist.
        masks: mask files that exist.
        faults: kind of fault -> ``file (detail)`` in list order.
        image_labels: class ids of every mask, without background and void; empty for an invalid mask.
        pixels: number of pixels per value in the valid masks; int64, shape (256,).
        as_stored: images with a camera orientation (EXIF) that is not applied.
        turned: images with one that is applied, because only then they have the size of their masks.
        wide: images with more than 8 bits per channel.
    """

    images: int = 0
    masks: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    image_labels: list[frozenset[int]] = field(default_factory=list)
    pixels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    as_stored: int = 0
    turned: int = 0
    wide: int = 0

    def add(self, other: SplitReport) -> None:
        """Add the results of further images."""
        for name in ("images", "masks", "image_labels", "pixels", "as_stored", "turned", "wide"):
            total = getattr(self, name)
            total += getattr(other, name)  # in place for the list and the array
            setattr(self, name, total)
        for kind, files in other.faults.items():
            self.faults.setdefault(kind, []).extend(files)

    def fault(self, kind: str, file: str) -> None:
        """Add a fault, with the file and a detail."""
        self.faults.setdefault(kind, []).append(file)

    def fault_lines(self) -> Iterator[str]:
        """One line per kind of fault, with its first files."""
        for kind, files in self.faults.items():
            more = ", ..." if len(files) > _NAMED else ""
            yield f"fault: {len(files)} {kind}: {', '.join(files[:_NAMED])}{more}"

    @property
    def shows_nothing(self) -> bool:
        """Whether there are valid masks, but none contains a class."""
        return bool(self.pixels.any()) and not any(self.image_labels)

    def notes(self) -> Iterator[str]:
        """Notes and warnings: how images are read, and the fractions of class, background and void pixels."""
        if turning := self.as_stored + self.turned:
            yield (
                f"note: {turning} images have a camera orientation (EXIF): {self.as_stored} are read as "
                f"stored, {self.turned} turned to fit their masks; --predict reads all as stored"
            )
        if self.wide:
            yield f"note: {self.wide} images have more than 8 bits per channel: the highest 8 are read"
        total = int(self.pixels.sum())
        if self.shows_nothing or not total:
            return
        void, background = int(self.pixels[VOID]), int(self.pixels[0])
        shares = [f"{count / total:.2%}" for count in (total - void - background, background, void)]
        yield "pixels: {} show a class, {} are background, {} void".format(*shares)
        if void > _MUCH_VOID * total:
            yield (
                f"warning: nearly all pixels are void ({VOID}) and ignored; are the masks complete, and "
                "is 255 not one of their classes?"
            )


def check_data(opts: Any) -> int:
    """Check both splits of ``opts.dataset`` and the lists of ``opts.task_``; print a report.

    Returns:
        0: no faults; 2: a file is missing or invalid, or a list differs from the published one.

    Raises:
        UserError: neither split can be opened, or a list of ``--splits_dir`` is invalid.
    """
    reports: dict[str, SplitReport] = {}
    unopened: list[UserError] = []
    for split in ("train", "val"):
        try:
            dataset = open_dataset(opts.dataset, opts.data_root, split, unpaired=True)
        except UserError as error:
            unopened.append(error)
            continue
        reports[split] = report = check_split(dataset)
        print(f"{split}: {report.images} images and {report.masks} masks of {len(dataset.images)} listed")
        for line in (*report.fault_lines(), *report.notes()):
            print(f"{split}: {line}")
        class_names = dataset.class_names
    if not reports:
        raise unopened[0]
    faults = [f"fault: {reason}" for reason in unopened]
    faults += [
        f"{split}: {_nothing_shown(report, len(class_names))}"
        for split, report in reports.items()
        if report.shows_nothing
    ]
    for line in faults:
        print(line)
    print_class_table(class_names, reports)
    valid = not faults and not any(report.faults for report in reports.values())
    if "train" in reports:
        valid &= check_task(
            opts.task_,
            opts.protocol,
            reports["train"].image_labels,
            splits_dir=opts.splits_dir,
            partition_seed=opts.partition_seed,
            class_names=class_names,
        )
    print("the data is in order" if valid else "the data is not in order; see the lines with 'fault'")
    return 0 if valid else 2


def _nothing_shown(report: SplitReport, num_classes: int) -> str:
    values = ", ".join(str(value) for value in np.flatnonzero(report.pixels))
    return (
        f"fault: no mask contains a class: the masks have values {values} only, and 0 is background, {VOID} "
        f"void; give every class its id, 1 to {num_classes - 1}"
    )


def check_split(dataset: SegmentationDataset, *, progress: bool = True) -> SplitReport:
    """Decode every image and mask of a split, in parallel."""
    report = SplitReport()
    check = partial(check_pair, num_classes=dataset.num_classes)
    for pair in map_in_threads(
        check, dataset.images, dataset.masks, desc="checking", unit="image", progress=progress
    ):
        report.add(pair)
    return report


def check_pair(image: Path, mask: Path, num_classes: int) -> SplitReport:
    """Decode an image and its mask; reports exactly the faults at which training would stop."""
    pair = SplitReport(int(image.is_file()), int(mask.is_file()))
    stored = _check_image(image, pair) if pair.images else None
    mask_size = _check_mask(mask, pair, num_classes) if pair.masks else None
    pair.image_labels = pair.image_labels or [frozenset()]
    if not pair.images:
        pair.fault("missing images", str(image))
    if not pair.masks:
        pair.fault("missing masks", str(mask))
    if stored is None:
        return pair
    pair.wide, turned = int(stored.bits > 8), False
    if mask_size is not None and mask_size != (size := stored.image.size):
        turned = stored.orientation in _QUARTER_TURNS and mask_size == size[::-1]
        if not turned:
            detail = f"{image} ({size[0]}×{size[1]}, its mask {mask_size[0]}×{mask_size[1]})"
            pair.fault("images of another size than their masks", detail)
    pair.turned, pair.as_stored = int(turned), int(stored.orientation != 1 and not turned)
    return pair


def _check_image(path: Path, pair: SplitReport) -> StoredImage | None:
    try:
        return load_image(path, path.read_bytes())
    except DataError as error:
        pair.fault("images without a defined black and white", _named(path, error))
    except _DAMAGE as error:
        pair.fault("unreadable images", _named(path, error))
    return None


def _check_mask(path: Path, pair: SplitReport, num_classes: int) -> tuple[int, int] | None:
    """Size of the mask (width, height), or None."""
    try:
        mask = read_mask(path)
    except DataError as error:
        return _check_unread_mask(path, pair, error)
    pixels = np.bincount(mask.numpy().reshape(-1), minlength=256)
    values = np.flatnonzero(pixels)
    unknown = values[(values >= num_classes) & (values != VOID)]
    if unknown.size:
        ids = ", ".join(str(c) for c in unknown[:5])
        detail = f"unknown class id {ids}; 0 to {num_classes - 1} or {VOID}"
        pair.fault("wrongly coded masks", f"{path} ({detail})")
    else:
        pair.image_labels, pair.pixels = [frozenset(values.tolist()) - {0, VOID}], pixels
    return mask.shape[2], mask.shape[1]


def _check_unread_mask(path: Path, pair: SplitReport, reason: DataError) -> tuple[int, int] | None:
    """Size of a mask that training would not read, or None if it is no image."""
    try:
        with Image.open(path) as mask:
            mask.verify()
        with Image.open(path) as mask:
            mask.load()
    except _DAMAGE as error:
        pair.fault("unreadable masks", _named(path, error))
        return None
    detail = f"{mask.format}, {mask.mode}; {_reason(path, reason)}"
    pair.fault("wrongly coded masks", f"{path} ({detail})")
    return mask.size


def _named(path: Path, error: BaseException) -> str:
    return f"{path} ({_reason(path, error)})"


def _reason(path: Path, error: BaseException) -> str:
    words = " ".join(str(error).removeprefix(f"{path}: ").split())
    return words if isinstance(error, DataError) else words[:80]


def print_class_table(class_names: tuple[str, ...], reports: dict[str, SplitReport]) -> None:
    """Print the number of images with each class, one column per split."""
    print(f"{'id':>4} {'class':<24}" + "".join(f"{split:>8}" for split in reports))
    for c, name in enumerate(class_names):
        if c != 0:
            counts = (sum(c in ids for ids in report.image_labels) for report in reports.values())
            print(f"{c:>4} {name:<24}" + "".join(f"{count:>8}" for count in counts))


def check_task(
    task: Task,
    protocol: Protocol,
    image_labels: list[frozenset[int]],
    *,
    splits_dir: Path | None = None,
    partition_seed: int = 0,
    class_names: tuple[str, ...] = (),
) -> bool:
    """Print the number of images per step, the comparison with the published list, and missing classes.

    Returns:
        False if a step has no image, or if the training set has the published size but a list differs.
    """
    print(f"task {task.name}, {protocol}:")
    size = PUBLISHED_SIZE.get(task.dataset, len(image_labels))
    valid, differs = True, False
    for step in range(task.num_steps):
        if splits_dir is None:
            indices = task_indices(task, step, protocol, image_labels, partition_seed=partition_seed)
        else:
            indices = load_step_list(splits_dir, step, len(image_labels))
        published = published_list(task, step, protocol)
        if not indices:
            reason = why_empty(task, step, protocol, image_labels, class_names)
            valid, verdict = False, f"fault: the step has no training image: {reason}"
        elif published is None:
            verdict = "no published list is known"
        elif (len(indices), list_digest(indices)) == published:
            verdict = "equal to the published list"
        else:
            differs = True
            verdict = f"differs from the published list of {published[0]} images"
        print(f"  step {step}: {len(task.new_classes(step))} classes, {len(indices)} images; {verdict}")
        shown = frozenset().union(*(image_labels[i] for i in indices))
        if indices and (missing := [c for c in task.new_classes(step) if c != 0 and c not in shown]):
            print(f"  step {step}: warning: no image of it shows {named_classes(missing, class_names)}")
    if differs and len(image_labels) == size and splits_dir is None:
        print("fault: the training set has the published size, but its masks or their order differ")
        return False
    if differs:
        print("warning: results on other lists cannot be compared with published ones", end="")
        print(f" (training set: {len(image_labels)} images, published: {size})")
    return valid
