"""``--check_data``: is the data set whole, and are the image lists of a task the published ones?"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset import open_dataset
from dataset.base import SegmentationDataset
from dataset.splits import (
    VOID,
    Protocol,
    default_workers,
    list_digest,
    load_step_list,
    mask_values,
    published_list,
    task_indices,
)
from tasks import Task
from utils.errors import DataError, UserError

PUBLISHED_SIZE = {"voc": 10582, "ade": 20210}  # training images

_NAMED = 3  # files that a line about a fault names
_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)
# What Pillow raises for a damaged file.
_DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass
class SplitReport:
    """What is in one split.

    Attributes:
        images: image files that exist.
        masks: mask files that exist.
        faults: kind of fault -> ``file (detail)`` in list order.
        presence: class ids of every mask, without background and void; empty for a faulty mask.
    """

    images: int = 0
    masks: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    presence: list[frozenset[int]] = field(default_factory=list)

    def fault_lines(self) -> Iterator[str]:
        """One line per kind of fault, with the first few files."""
        for kind, files in self.faults.items():
            more = ", ..." if len(files) > _NAMED else ""
            yield f"fault: {len(files)} {kind}: {', '.join(files[:_NAMED])}{more}"


def check_data(opts: Any) -> int:
    """Check both splits of ``opts.dataset`` and the lists of ``opts.task_``; print a report.

    Returns:
        0: nothing is wrong; 2: a file is missing or faulty, or a list differs that should be published.

    Raises:
        UserError: neither split can be opened, or a list of ``--splits_dir`` is faulty.
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
        for line in report.fault_lines():
            print(f"{split}: {line}")
        class_names = dataset.class_names
    if not reports:
        raise unopened[0]
    for reason in unopened:
        print(f"fault: {reason}")
    sound = not unopened and not any(report.faults for report in reports.values())
    print_class_table(class_names, reports)
    if "train" in reports:
        sound &= check_task(opts.task_, opts.protocol, reports["train"].presence, splits_dir=opts.splits_dir)
    print("the data is in order" if sound else "the data is not in order; see the lines with 'fault'")
    return 0 if sound else 2


def check_split(
    dataset: SegmentationDataset, *, workers: int | None = None, progress: bool = True
) -> SplitReport:
    """Decode every image and mask of a split, in parallel.

    Args:
        dataset: images and masks on disk.
        workers: threads (decoding does not hold the interpreter's lock); default one per core at hand.
        progress: show a progress bar.
    """
    report = SplitReport()
    pool = ThreadPoolExecutor(workers or default_workers())
    try:
        pairs = pool.map(check_pair, dataset.images, dataset.masks, repeat(dataset.num_classes))
        bar = tqdm(pairs, total=len(dataset.images), desc="checking", unit="image", disable=not progress)
        for pair in bar:
            report.images += pair.image_exists
            report.masks += pair.mask_exists
            report.presence.append(pair.classes)
            for kind, file in pair.faults:
                report.faults.setdefault(kind, []).append(file)
    finally:
        pool.shutdown(cancel_futures=True)
    return report


@dataclass
class Pair:
    """What is there and what is wrong: (kind of fault, file with detail)."""

    image_exists: bool
    mask_exists: bool
    classes: frozenset[int] = frozenset()
    faults: list[tuple[str, str]] = field(default_factory=list)


def check_pair(image: Path, mask: Path, num_classes: int) -> Pair:
    """Decode one image and its mask; faulty exactly where training would stop at the pair."""
    pair = Pair(image.is_file(), mask.is_file())
    image_sizes = _check_image(image, pair) if pair.image_exists else None
    mask_size = _check_mask(mask, pair, num_classes) if pair.mask_exists else None
    if not pair.image_exists:
        pair.faults.append(("missing images", str(image)))
    if not pair.mask_exists:
        pair.faults.append(("missing masks", str(mask)))
    if image_sizes and mask_size and mask_size not in image_sizes:
        (width, height), (mask_width, mask_height) = image_sizes[0], mask_size
        detail = f"{image} ({width}×{height}, its mask {mask_width}×{mask_height})"
        pair.faults.append(("images of another size than their masks", detail))
    return pair


def _check_image(path: Path, pair: Pair) -> list[tuple[int, int]] | None:
    """(width, height) as stored and, where the camera's orientation turns the image, as seen."""
    try:
        with Image.open(path) as image:
            image.verify()  # a PNG's checksums; other formats show their damage in load()
        with Image.open(path) as image:
            image.load()
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
    except _DAMAGE as error:
        pair.faults.append(("unreadable images", _named(path, error)))
        return None
    return [(width, height), (height, width)] if turned else [(width, height)]


def _check_mask(path: Path, pair: Pair, num_classes: int) -> tuple[int, int] | None:
    """(width, height)."""
    try:
        with Image.open(path) as mask:
            mask.verify()
        with Image.open(path) as mask:
            mask.load()
            size, kind = mask.size, f"{mask.format}, {mask.mode}"
    except _DAMAGE as error:
        pair.faults.append(("unreadable masks", _named(path, error)))
        return None
    try:
        values = np.flatnonzero(mask_values(path))
    except DataError:
        pair.faults.append(
            ("wrongly coded masks", f"{path} ({kind}; a PNG with one class id per pixel is needed)")
        )
        return size
    unknown = values[(values >= num_classes) & (values != VOID)]
    if unknown.size:
        ids = ", ".join(str(c) for c in unknown[:5])
        pair.faults.append(
            ("wrongly coded masks", f"{path} (unknown class id {ids}; 0 to {num_classes - 1} or {VOID})")
        )
        return size
    pair.classes = frozenset(values.tolist()) - {0, VOID}
    return size


def _named(path: Path, error: BaseException) -> str:
    return f"{path} ({' '.join(str(error).split())[:80]})"


def print_class_table(class_names: tuple[str, ...], reports: dict[str, SplitReport]) -> None:
    """Number of images that show each class, one column per split."""
    print(f"{'id':>4} {'class':<24}" + "".join(f"{split:>8}" for split in reports))
    for c, name in enumerate(class_names):
        if c != 0:
            counts = (sum(c in ids for ids in report.presence) for report in reports.values())
            print(f"{c:>4} {name:<24}" + "".join(f"{count:>8}" for count in counts))


def check_task(
    task: Task, protocol: Protocol, presence: list[frozenset[int]], *, splits_dir: Path | None = None
) -> bool:
    """Print the images of every step and whether the list is the published one.

    Returns:
        False where a step has no image, or where the training set has the published size but a list differs.
    """
    print(f"task {task.name}, {protocol}:")
    size = PUBLISHED_SIZE.get(task.dataset, len(presence))
    sound, differs = True, False
    for step in range(task.num_steps):
        if splits_dir is None:
            indices = task_indices(task.dataset, task, step, protocol, presence)
        else:
            indices = load_step_list(splits_dir, step, len(presence))
        published = published_list(task, step, protocol)
        if not indices:
            sound, verdict = False, "fault: the step has nothing to train on"
        elif published is None:
            verdict = "no published list is known"
        elif (len(indices), list_digest(indices)) == published:
            verdict = "equal to the published list"
        else:
            differs = True
            verdict = f"differs from the published list of {published[0]} images"
        print(f"  step {step}: {len(task.new_classes(step))} classes, {len(indices)} images; {verdict}")
    if differs and len(presence) == size and splits_dir is None:
        print("fault: the training set has the published size, but its masks or their order differ")
        return False
    if differs:
        print("warning: results on other lists cannot be compared with published ones", end="")
        print(f" (training set: {len(presence)} images, published: {size})")
    return sound
