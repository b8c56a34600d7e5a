"""``--check_data`` through the real command: sound data, every fault, published lists, own lists."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command import launch
from PIL import Image

CLASSES = ("background", "cat", "dog", "cow")


def make_folder(root: Path, train: int = 12, val: int = 3) -> Path:
    """Own data: image i shows class 1 + i % 3."""
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 12), (i, 9 * i, 99)).save(root / f"images/{split}/{i:02}.jpg")
            mask = np.full((12, 16), 1 + i % 3, np.uint8)
            mask[:4] = 0
            Image.fromarray(mask).save(root / f"masks/{split}/{i:02}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def test_sound_data_with_and_without_a_task(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    plain = launch("--check_data", "--dataset", "folder", "--data_root", root)
    assert plain.code == 0, plain.err
    assert "train: 12 images and 12 masks of 12 listed" in plain.out
    assert "val: 3 images and 3 masks of 3 listed" in plain.out
    assert re.search(r"^ +2 dog +4 +1$", plain.out, re.M)
    assert "step 0: 4 classes, 12 images" in plain.out
    assert plain.out.endswith("the data is in order\n")

    cut = launch("--check_data", "--dataset", "folder", "--data_root", root, "--task", "1-1", "--overlap")
    assert cut.code == 0, cut.err
    assert "task 1-1, overlapped:" in cut.out
    assert "step 2: 1 classes, 4 images; no published list is known" in cut.out


def test_own_lists(tmp_path: Path) -> None:
    common = ("--check_data", "--dataset", "folder", "--data_root", make_folder(tmp_path / "data"))
    for step in range(3):
        np.save(tmp_path / f"train-{step}.npy", np.arange(2 + step))
    outcome = launch(*common, "--task", "1-1", "--splits_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "step 2: 1 classes, 4 images; no published list is known" in outcome.out
    (tmp_path / "train-1.npy").unlink()
    missing = launch(*common, "--task", "1-1", "--splits_dir", tmp_path)
    assert missing.code == 2
    assert "train-1.npy is missing" in missing.last_error


def test_every_fault_in_one_report(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    images, masks = root / "images/train", root / "masks/train"
    (images / "00.jpg").unlink()
    (masks / "01.png").unlink()
    (images / "02.jpg").write_bytes((images / "02.jpg").read_bytes()[:-30])
    (masks / "03.png").write_bytes((masks / "03.png").read_bytes()[:50])
    Image.new("RGB", (16, 12), (1, 2, 3)).save(masks / "04.png")
    Image.new("L", (16, 12), 4).save(masks / "05.png")
    Image.new("L", (12, 16), 1).save(masks / "06.png")
    (root / "images/val/00.jpg").write_text("no picture")
    outcome = launch("--check_data", "--dataset", "folder", "--data_root", root)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "train: 11 images and 11 masks of 12 listed" in outcome.out
    for line in (
        r"train: fault: 1 missing images: \S*00\.jpg$",
        r"train: fault: 1 missing masks: \S*01\.png$",
        r"train: fault: 1 unreadable images: \S*02\.jpg \(.*\)$",
        r"train: fault: 1 unreadable masks: \S*03\.png \(.*\)$",
        r"train: fault: 2 wrongly coded masks: \S*04\.png \(PNG, RGB; .*\), "
        r"\S*05\.png \(unknown class id 4; 0 to 3 or 255\)$",
        r"train: fault: 1 images of another size than their masks: \S*06\.jpg \(16×12, its mask 12×16\)$",
        r"val: fault: 1 unreadable images: \S*00\.jpg \(cannot identify image file.*\)$",
        r"^the data is not in order; see the lines with 'fault'$",
    ):
        assert re.search(line, outcome.out, re.M), (line, outcome.out)


def test_a_missing_split_is_a_fault_and_a_missing_data_set_one_line(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "masks/val").rename(tmp_path / "elsewhere")
    outcome = launch("--check_data", "--dataset", "folder", "--data_root", root)
    assert outcome.code == 2
    assert "train: 12 images and 12 masks of 12 listed" in outcome.out
    assert re.search(r"^fault: \S*masks/val: no such folder", outcome.out, re.M)
    for dataset in ("voc", "ade"):
        nothing = launch("--check_data", "--dataset", dataset, "--data_root", tmp_path / "none")
        assert nothing.code == 2
        assert f"data/download_{dataset}.sh" in nothing.last_error


# Data sets of the published size: every mask has the classes of the real one, on 64 pixels.


def class_lists(path: Path) -> list[list[int]]:
    """Class ids of every image; a line is the image's name and the ids."""
    return [[int(word) for word in line.split()[1:]] for line in path.read_text().splitlines()]


class Stamps:
    """Masks with given classes; equal ones are one file with many names, as writing 22,000 takes long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.picture = folder / "picture.jpg"
        Image.new("RGB", (8, 8), (90, 120, 150)).save(self.picture)

    def mask(self, classes: Sequence[int]) -> Path:
        path = self.folder / f"classes-{'-'.join(map(str, classes))}.png"
        if not path.exists():
            pixels = np.zeros(64, np.uint8)
            pixels[: len(classes)] = classes
            Image.fromarray(pixels.reshape(8, 8)).save(path)
        return path

    def put(self, classes: Sequence[int], image: Path, mask: Path) -> None:
        os.link(self.picture, image)
        os.link(self.mask(classes), mask)


@pytest.fixture(scope="module")
def voc(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    stamps = Stamps(root / "stamps")
    for folder in ("JPEGImages", "SegmentationClassAug", "splits"):
        (root / folder).mkdir()
    for split, lists in (("train_aug", "voc_train"), ("val", "voc_val")):
        lines = (shared / "voc_masks/splits" / f"{split}.txt").read_text()
        (root / "splits" / f"{split}.txt").write_text(lines)
        classes = class_lists(shared / "splits" / f"{lists}_classes.txt")
        for line, ids in zip(lines.splitlines(), classes, strict=True):
            image, mask = line.split()
            stamps.put(ids, root / image[1:], root / mask[1:])
    return root


@pytest.fixture(scope="module")
def ade(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ade")
    stamps = Stamps(root / "stamps")
    for split, lists in (("training", "ade_train"), ("validation", "ade_val")):
        folders = [root / "ADEChallengeData2016" / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            folder.mkdir(parents=True)
        for i, ids in enumerate(class_lists(shared / "splits" / f"{lists}_classes.txt"), start=1):
            names = (folders[0] / f"ADE_{split}_{i:08}.jpg", folders[1] / f"ADE_{split}_{i:08}.png")
            stamps.put(ids, *names)
    return root


def test_published_lists_of_voc(voc: Path) -> None:
    outcome = launch("--check_data", "--dataset", "voc", "--data_root", voc, "--task", "15-1", "--overlap")
    assert outcome.code == 0, outcome.err
    assert "train: 10582 images and 10582 masks of 10582 listed" in outcome.out
    assert "val: 1449 images and 1449 masks of 1449 listed" in outcome.out
    assert outcome.out.count("equal to the published list") == 6


def test_published_lists_of_ade(ade: Path) -> None:
    outcome = launch("--check_data", "--dataset", "ade", "--data_root", ade, "--task", "100-50")
    assert outcome.code == 0, outcome.err
    assert "train: 20210 images and 20210 masks of 20210 listed" in outcome.out
    assert "val: 2000 images and 2000 masks of 2000 listed" in outcome.out
    assert outcome.out.count("equal to the published list") == 2
    assert re.search(r"^ +1 wall +11\d\d\d ", outcome.out, re.M)
