"""``--check_data`` on a valid data set and on one with each kind of fault."""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import check
from dataset.base import SegmentationDataset
from dataset.check import SplitReport, check_data, check_split, check_task, print_class_table
from dataset.protocols import task_indices
from tasks import Task, get_task

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
CLASSES = ("background", "cat", "dog", "cow")
HEIGHT, WIDTH = 12, 16


def make_folder(root: Path, train: int = 6, val: int = 2) -> Path:
    """Own data of three classes: image i shows class 1 + i % 3."""
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            picture = np.random.default_rng(i).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / "images" / split / f"{i}.jpg")
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[2:5] = 1 + i % 3
            mask[0, 0] = 255
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def open_split(root: Path, count: int = 6) -> SegmentationDataset:
    """The training split as listed, whether or not its files are there."""
    images = [root / "images" / "train" / f"{i}.jpg" for i in range(count)]
    masks = [root / "masks" / "train" / f"{i}.png" for i in range(count)]
    return SegmentationDataset("folder", "train", root, images, masks, CLASSES)


def options(root: Path, **changes) -> Namespace:
    task = get_task("folder", "1-1", num_classes=len(CLASSES))
    defaults = {
        "dataset": "folder", "data_root": root, "task_": task, "protocol": "disjoint", "splits_dir": None,
        "partition_seed": 0,
    }  # fmt: skip
    return Namespace(**{**defaults, **changes})


def test_sound_data(tmp_path, capsys):
    root = make_folder(tmp_path)
    assert check_data(options(root)) == 0
    out = capsys.readouterr().out
    assert "train: 6 images and 6 masks of 6 listed" in out
    assert "val: 2 images and 2 masks of 2 listed" in out
    assert re.search(r"^ +1 cat +2 +1$", out, re.M) and re.search(r"^ +3 cow +2 +0$", out, re.M)
    assert "step 0: 2 classes, 2 images; no published list is known" in out
    assert out.endswith("the data is in order\n")
    assert "fault" not in out and "note" not in out and "warning" not in out


def remove_image(root: Path) -> None:
    (root / "images/train/1.jpg").unlink()


def remove_mask(root: Path) -> None:
    (root / "masks/train/1.png").unlink()


def cut_image(root: Path) -> None:
    path = root / "images/train/1.jpg"
    path.write_bytes(path.read_bytes()[:-20])


def text_image(root: Path) -> None:
    (root / "images/train/1.jpg").write_text("no picture")


def cut_mask(root: Path) -> None:
    path = root / "masks/train/1.png"
    path.write_bytes(path.read_bytes()[:60])


def flip_mask(root: Path) -> None:
    path = root / "masks/train/1.png"
    data = path.read_bytes()
    where = data.index(b"IDAT") + 8
    path.write_bytes(data[:where] + bytes([data[where] ^ 0xFF]) + data[where + 1 :])


def colour_mask(root: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).save(root / "masks/train/1.png")


def jpeg_mask(root: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 1).save(root / "masks/train/1.png", format="jpeg")


def unknown_id(root: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 4).save(root / "masks/train/1.png")


def wide_mask(root: Path) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH), 257, np.uint16)).save(root / "masks/train/1.png")


def float_mask(root: Path) -> None:
    picture = Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32))
    picture.save(root / "masks/train/1.png", format="tiff")


def float_image(root: Path) -> None:
    picture = Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32))
    picture.save(root / "images/train/1.jpg", format="tiff")


def wrong_size(root: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT + 1), 1).save(root / "masks/train/1.png")


FAULTS = {
    remove_image: r"fault: 1 missing images: \S*images/train/1\.jpg$",
    remove_mask: r"fault: 1 missing masks: \S*masks/train/1\.png$",
    cut_image: r"fault: 1 unreadable images: \S*images/train/1\.jpg \(.*truncated.*\)$",
    text_image: r"fault: 1 unreadable images: \S*images/train/1\.jpg \(cannot identify image file.*\)$",
    cut_mask: r"fault: 1 unreadable masks: \S*masks/train/1\.png \(.*\)$",
    flip_mask: r"fault: 1 unreadable masks: \S*masks/train/1\.png \(.*\)$",
    colour_mask: r"fault: 1 wrongly coded masks: \S*1\.png \(PNG, RGB; the mask contains colours, not class",
    jpeg_mask: r"fault: 1 wrongly coded masks: \S*1\.png \(JPEG, L; the mask is not a PNG file; save it as",
    unknown_id: r"fault: 1 wrongly coded masks: \S*1\.png \(unknown class id 4; 0 to 3 or 255\)$",
    wide_mask: r"fault: 1 wrongly coded masks: \S*1\.png \(PNG, I\S*; class index 257 found; masks contain",
    float_mask: r"fault: 1 wrongly coded masks: \S*1\.png \(TIFF, F; the mask is not a PNG file; save it",
    float_image: r"fault: 1 images without a defined black and white: \S*1\.jpg \(the image's pixels are",
    wrong_size: r"fault: 1 images of another size than their masks: \S*1\.jpg \(16×12, its mask 16×13\)$",
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_every_fault_has_its_line(tmp_path, damage):
    root = make_folder(tmp_path)
    damage(root)
    report = check_split(open_split(root), progress=False)
    (line,) = report.fault_lines()
    assert re.search(FAULTS[damage], line), line
    assert "\n" not in line
    assert report.images == 6 - (damage is remove_image)
    assert report.masks == 6 - (damage is remove_mask)
    assert report.image_labels[0] == {1} and report.image_labels[2] == {3}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_every_fault_makes_the_exit_code_2(tmp_path, capsys, damage):
    root = make_folder(tmp_path)
    damage(root)
    assert check_data(options(root)) == 2
    out = capsys.readouterr().out
    assert "fault: " in out and out.endswith("the data is not in order; see the lines with 'fault'\n")


def test_many_faults_name_the_first_files(tmp_path):
    root = make_folder(tmp_path)
    for i in range(1, 6):
        (root / "masks" / "train" / f"{i}.png").write_bytes(b"")
    (line,) = check_split(open_split(root), progress=False).fault_lines()
    assert line.startswith("fault: 5 unreadable masks: ") and line.endswith(", ...")
    assert "1.png" in line and "3.png" in line and "4.png" not in line


def test_image_turned_by_the_camera_fits_its_mask(tmp_path):
    root = make_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "images/train/0.jpg", exif=exif)
    assert not check_split(open_split(root), progress=False).faults
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "images/train/0.jpg")
    assert "images of another size than their masks" in check_split(open_split(root), progress=False).faults


def test_step_without_images_is_a_fault(tmp_path, capsys):
    root = make_folder(tmp_path, train=2)
    assert check_data(options(root)) == 2
    assert "step 2: 1 classes, 0 images; fault: the step has no training image" in capsys.readouterr().out


def test_why_a_step_without_images_has_none(tmp_path, capsys):
    root = make_folder(tmp_path)
    for i in range(6):  # the second class never comes without the third
        mask = np.ones((HEIGHT, WIDTH), np.uint8)
        mask[2:5], mask[6:8] = (2, 3) if i % 2 else (1, 1)
        Image.fromarray(mask).save(root / "masks" / "train" / f"{i}.png")
    assert check_data(options(root)) == 2
    out = capsys.readouterr().out
    assert "every image with its classes also shows one of a later step, which disjoint leaves out" in out
    assert check_data(options(root, protocol="overlapped")) == 0
    assert "step 1: 1 classes, 3 images; no published" in capsys.readouterr().out


def test_a_class_that_no_image_of_its_step_shows(tmp_path, capsys):
    root = make_folder(tmp_path)
    for i in (1, 4):
        Image.new("L", (WIDTH, HEIGHT)).save(root / "masks" / "train" / f"{i}.png")
    task = get_task("folder", "2-1", num_classes=len(CLASSES))
    assert check_data(options(root, task_=task)) == 0
    assert "  step 0: warning: no image of it shows 2 dog\n" in capsys.readouterr().out


def test_masks_of_background_and_void_alone_are_nothing_to_learn(tmp_path, capsys):
    root = make_folder(tmp_path)
    for path in (root / "masks" / "train").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    assert check_data(options(root)) == 2
    out = capsys.readouterr().out
    assert (
        "train: fault: no mask contains a class: the masks have values 0, 255 only, and 0 is "
        "background, 255 void; give every class its id, 1 to 3\n"
    ) in out
    assert (
        "step 0: 2 classes, 0 images; fault: the step has no training image: no training mask shows 1 cat"
        in out
    )


def test_nearly_all_void(tmp_path, capsys):
    root = make_folder(tmp_path)
    assert check_data(options(root)) == 0
    out = capsys.readouterr().out
    assert (
        "train: pixels: 25.00% show a class, 74.48% are background, 0.52% void\n" in out
        and "warning" not in out
    )
    for i, path in enumerate(sorted((root / "masks" / "train").iterdir())):
        mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
        mask[0, :3] = 1 + i % 3
        Image.fromarray(mask).save(path)
    assert check_data(options(root)) == 0
    out = capsys.readouterr().out
    assert "train: pixels: 1.56% show a class, 0.00% are background, 98.44% void\n" in out
    assert "train: warning: nearly all pixels are void (255) and ignored" in out


def test_turned_and_wide_images_are_counted(tmp_path, capsys):
    root = make_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "images/train/0.jpg", exif=exif)
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images/train/1.jpg", exif=exif)
    exif[0x0112] = 3
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images/train/2.jpg", exif=exif)
    wide = Image.fromarray(np.full((HEIGHT, WIDTH), 60_000, np.uint16))
    wide.save(root / "images/train/3.jpg", format="png")
    assert check_data(options(root)) == 0
    out = capsys.readouterr().out
    assert (
        "train: note: 3 images have a camera orientation (EXIF): 2 are read as stored, 1 turned to fit "
        "their masks; --predict reads all as stored\n"
    ) in out
    assert "train: note: 1 images have more than 8 bits per channel: the highest 8 are read\n" in out
    assert "val: note" not in out


def test_own_lists(tmp_path, capsys):
    root = make_folder(tmp_path / "data")
    for step in range(3):
        np.save(tmp_path / f"train-{step}.npy", np.arange(step + 1))
    assert check_data(options(root, splits_dir=tmp_path)) == 0
    assert "step 2: 1 classes, 3 images" in capsys.readouterr().out


def test_progress_is_shown(tmp_path, capsys):
    check_split(open_split(make_folder(tmp_path)))
    assert "6/6" in capsys.readouterr().err


def test_published_lists(voc_train_labels, capsys, tmp_path):
    image_labels, task = voc_train_labels, get_task("voc", "15-1")
    assert check_task(task, "overlapped", image_labels)
    assert capsys.readouterr().out.count("equal to the published list") == 6

    changed = list(image_labels)
    changed[task_indices(task, 3, "overlapped", image_labels)[0]] = frozenset({1})
    assert not check_task(task, "overlapped", changed)
    out = capsys.readouterr().out
    assert "step 3: 1 classes, 490 images; differs from the published list of 491 images" in out
    assert "fault: the training set has the published size, but its masks or their order differ" in out

    for step in range(6):
        indices = task_indices(task, step, "overlapped", image_labels)
        np.save(tmp_path / f"train-{step}.npy", indices[:100] if step == 5 else indices)
    assert check_task(task, "overlapped", image_labels, splits_dir=tmp_path)
    out = capsys.readouterr().out
    assert out.count("equal to the published list") == 5
    assert "step 5: 1 classes, 100 images; differs from the published list of" in out
    assert "warning: results on other lists cannot be compared with published ones" in out

    assert check_task(task, "overlapped", image_labels[:5000])
    out = capsys.readouterr().out
    assert "warning: results on other lists cannot be compared" in out
    assert "(training set: 5000 images, published: 10582)" in out


def test_data_of_the_published_size_with_other_lists_is_not_in_order(shapes_root, monkeypatch, capsys):
    found = options(shapes_root, dataset="voc", task_=get_task("voc", "15-1"), protocol="overlapped")
    assert check_data(found) == 0
    monkeypatch.setitem(check.PUBLISHED_SIZE, "voc", 48)
    assert check_data(found) == 2
    assert "fault: the training set has the published size, but its masks or" in capsys.readouterr().out


@pytest.mark.skipif(not (SHARED / "voc_subset").is_dir(), reason="shared/voc_subset is not there")
def test_real_photos(tmp_path, capsys):
    found = options(
        SHARED / "voc_subset", dataset="voc", task_=get_task("voc", "15-5"), protocol="overlapped"
    )
    assert check_data(found) == 0
    assert "train: 528 images and 528 masks of 528 listed" in capsys.readouterr().out

    real, broken = SHARED / "voc_subset" / "PascalVOC12", tmp_path / "PascalVOC12"
    for split in ("train_aug", "val"):
        lines = (real / "splits" / f"{split}.txt").read_text().splitlines()[:40]
        for name in (name[1:] for line in lines for name in line.split()):
            (broken / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(real / name, broken / name)
        (broken / "splits").mkdir(exist_ok=True)
        (broken / "splits" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    photo = min((broken / "JPEGImages").iterdir())
    photo.write_bytes(photo.read_bytes()[:1000])
    assert (
        check_data(options(tmp_path, dataset="voc", task_=get_task("voc", "15-5"), protocol="overlapped"))
        == 2
    )
    assert re.search(rf"fault: 1 unreadable images: \S*{photo.name}", capsys.readouterr().out)


def test_class_table_lists_every_class(capsys):
    report = SplitReport(image_labels=[frozenset({1, 2}), frozenset({2})])
    print_class_table(CLASSES, {"train": report})
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["cat", "1"], ["dog", "2"], ["cow", "0"],
    ]  # fmt: skip


def test_published_sizes_are_those_of_the_offline_lists():
    whole = Task("offline", "voc", get_task("voc", "offline").steps)
    published = check.published_list(whole, 0, "disjoint")
    assert published is not None and published[0] == check.PUBLISHED_SIZE["voc"]
