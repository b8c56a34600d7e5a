import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import open_dataset
from dataset.base import SegmentationDataset
from utils.errors import DataError, UserError
from utils.palette import palette

TRAIN, VAL = ["2007_01", "2007_04"], ["2007_02", "2007_03"]


def make_voc(root: Path, *, lists: tuple[str, ...] = ("train_aug", "val")) -> Path:
    """A tiny VOC with every mask value 1 + its number; two training and two validation images."""
    for folder in ("JPEGImages", "SegmentationClassAug", "splits"):
        (root / folder).mkdir(parents=True)
    for number, stem in enumerate(sorted(TRAIN + VAL)):
        Image.fromarray(np.full((20, 30, 3), 10 * number, np.uint8)).save(root / f"JPEGImages/{stem}.jpg")
        mask = np.full((20, 30), number + 1, np.uint8)
        mask[0] = 255
        indexed = Image.fromarray(mask)
        indexed.putpalette(palette().flatten().tolist())
        indexed.save(root / f"SegmentationClassAug/{stem}.png")
    for name in lists:
        stems = TRAIN if name == "train_aug" else VAL
        lines = (f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png\n" for s in stems)
        (root / f"splits/{name}.txt").write_text("".join(lines))
    return root


def stems(dataset: SegmentationDataset) -> list[str]:
    assert [p.stem for p in dataset.images] == [p.stem for p in dataset.masks]
    return [p.stem for p in dataset.images]


@pytest.mark.parametrize("place", ["PascalVOC12", ".", "VOCdevkit/VOC2012"])
def test_three_layouts(tmp_path: Path, place: str) -> None:
    make_voc(tmp_path / place)
    train, val = (open_dataset("voc", tmp_path, split) for split in ("train", "val"))
    assert stems(train) == TRAIN and stems(val) == VAL
    assert len(train) == 2 and train.num_classes == 21 and train.class_names[15] == "person"
    assert train.ignore_at_eval == frozenset()
    image, mask = train.read(1)
    assert image.shape == (3, 20, 30) and image.dtype == torch.uint8 and abs(int(image[0, 5, 5]) - 30) <= 2
    assert mask.shape == (1, 20, 30) and mask.unique().tolist() == [4, 255]


def test_training_list_is_derived_from_the_validation_list(tmp_path: Path) -> None:
    make_voc(tmp_path, lists=("val",))
    assert stems(open_dataset("voc", tmp_path, "train")) == TRAIN


def test_validation_list_is_derived_from_the_training_list(tmp_path: Path) -> None:
    make_voc(tmp_path, lists=("train_aug",))
    assert stems(open_dataset("voc", tmp_path, "val")) == VAL


def test_lists_are_derived_from_image_sets(tmp_path: Path) -> None:
    make_voc(tmp_path, lists=())
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_02\n2007_03\n\n")
    # VOC's own train.txt lists the 1,464 images of 2012 only; the augmented set is everything but val.
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_01\n")
    assert stems(open_dataset("voc", tmp_path, "train")) == TRAIN
    assert stems(open_dataset("voc", tmp_path, "val")) == VAL


def test_no_list_at_all(tmp_path: Path) -> None:
    make_voc(tmp_path, lists=())
    with pytest.raises(UserError, match=r"no lists of training and validation.*download_voc\.sh"):
        open_dataset("voc", tmp_path, "train")


def test_broken_and_empty_lists(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "splits/val.txt").write_text("a b c\n")
    with pytest.raises(DataError, match=r"val\.txt:1: expected"):
        open_dataset("voc", tmp_path, "val")
    (tmp_path / "splits/val.txt").write_text("\n")
    with pytest.raises(UserError, match="val list is empty"):
        open_dataset("voc", tmp_path, "val")


@pytest.mark.parametrize(
    "text",
    [
        "{0}\r\n{1}\r\n",
        "\ufeff{0}\n{1}\n",
        "\ufeff2007_02\r\n2007_03\r\n",
        "\n{0}  \t\n\n{1}\n\n  \n",
    ],
    ids=["Windows", "byte-order mark", "mark and bare names", "blanks"],
)
def test_lists_as_editors_write_them(tmp_path: Path, text: str) -> None:
    make_voc(tmp_path)
    lines = [f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png" for s in VAL]
    (tmp_path / "splits/val.txt").write_bytes(text.format(*lines).encode())
    val = open_dataset("voc", tmp_path, "val")
    assert stems(val) == VAL and all(path.is_file() for path in (*val.images, *val.masks))
    assert stems(open_dataset("voc", tmp_path, "train")) == TRAIN


def test_list_in_utf16(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "splits/val.txt").write_bytes("2007_02\r\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"val\.txt: not UTF-8 text but UTF-16 .*; save it as UTF-8"):
        open_dataset("voc", tmp_path, "val")


@pytest.mark.parametrize(
    "again",
    ["/JPEGImages/2007_02.jpg /SegmentationClassAug/2007_02.png", "2007_02", "JPEGImages//2007_02.jpg x.png"],
)
def test_an_image_listed_twice_is_refused_with_both_lines(tmp_path: Path, again: str) -> None:
    make_voc(tmp_path)
    path = tmp_path / "splits/val.txt"
    path.write_text(path.read_text() + f"\n{again}\n")
    with pytest.raises(
        DataError, match=r"val\.txt:4: /?JPEGImages//?2007_02\.jpg is already listed in line 1"
    ) as error:
        open_dataset("voc", tmp_path, "val")
    assert "\n" not in str(error.value)


def test_real_lists_have_no_image_twice(shared: Path, tmp_path: Path) -> None:
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / folder).mkdir()
    (tmp_path / "splits").symlink_to(shared / "voc_masks/splits")
    assert [len(open_dataset("voc", tmp_path, split)) for split in ("train", "val")] == [10_582, 1_449]


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"looked for JPEGImages/ and SegmentationClassAug/ .*download_voc\.sh"
    ):
        open_dataset("voc", tmp_path, "train")
    with pytest.raises(UserError, match=r"nowhere: no such folder.*download_voc\.sh"):
        open_dataset("voc", tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="unknown, choose from"):
        open_dataset("vok", tmp_path, "train")


def test_unknown_id_and_missing_file_are_named(tmp_path: Path) -> None:
    make_voc(tmp_path)
    path = tmp_path / "SegmentationClassAug/2007_01.png"
    mask = np.zeros((20, 30), np.uint8)
    mask[3, 4], mask[0] = 21, 255
    Image.fromarray(mask).save(path)
    dataset = open_dataset("voc", tmp_path, "train")
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*class id 21 is unknown.*0 to 20"):
        dataset.read(0)
    (tmp_path / "JPEGImages/2007_04.jpg").unlink()
    with pytest.raises(DataError, match=r"2007_04\.jpg: the image is missing"):
        dataset.read(1)


@pytest.mark.parametrize("last_id", [0, 20])
def test_every_known_id_is_accepted(tmp_path: Path, last_id: int) -> None:
    make_voc(tmp_path)
    mask = np.full((20, 30), last_id, np.uint8)
    Image.fromarray(mask).save(tmp_path / "SegmentationClassAug/2007_01.png")
    assert int(open_dataset("voc", tmp_path, "train").read(0)[1].max()) == last_id


def test_palette_is_that_of_voc() -> None:
    colours = [tuple(colour) for colour in palette().tolist()]
    assert len(set(colours)) == 256
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {i: colours[i] for i in known} == known


def test_real_subset(shared: Path) -> None:
    train, val = (open_dataset("voc", shared / "voc_subset", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (528, 256)
    image, mask = val.read(7)
    assert image.shape[1:] == mask.shape[1:]


def test_published_lists_are_derived(shared: Path, tmp_path: Path) -> None:
    """The training list derived from the 12,031 real names and the validation list is the published one."""
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "SegmentationClassAug").symlink_to(shared / "voc_masks/SegmentationClassAug")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/val.txt").write_text((shared / "voc_masks/splits/val.txt").read_text())
    published = (shared / "voc_masks/splits/train_aug.txt").read_text().split()[1::2]
    derived = open_dataset("voc", tmp_path, "train")
    assert len(derived) == 10_582
    assert [f"/SegmentationClassAug/{p.name}" for p in derived.masks] == published
