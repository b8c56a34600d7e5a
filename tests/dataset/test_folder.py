from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import open_dataset
from utils.errors import DataError, UserError


def make_folder(root: Path, classes: str = "background\ncat\ndog\n") -> Path:
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number, suffix in enumerate(("png", "jpg", "JPEG")):
            image = Image.fromarray(np.full((8, 12, 3), 100, np.uint8))
            image.save(root / f"images/{split}/p{number}.{suffix}")
            Image.fromarray(np.full((8, 12), number, np.uint8)).save(root / f"masks/{split}/p{number}.png")
        (root / f"images/{split}/.DS_Store").write_text("")
        (root / f"images/{split}/notes.txt").write_text("")
    (root / "classes.txt").write_text(classes)
    return root


def test_pairs_in_order_of_names(tmp_path: Path) -> None:
    dataset = open_dataset("folder", make_folder(tmp_path), "val")
    assert [p.name for p in dataset.images] == ["p0.png", "p1.jpg", "p2.JPEG"]
    assert [int(dataset.read(i)[1].max()) for i in range(3)] == [0, 1, 2]
    assert dataset.class_names == ("background", "cat", "dog") and dataset.num_classes == 3


def test_id_beyond_classes(tmp_path: Path) -> None:
    dataset = open_dataset("folder", make_folder(tmp_path, "background\ncat\n"), "train")
    with pytest.raises(DataError, match=r"p2\.png: class id 2 is unknown, folder has ids 0 to 1"):
        dataset.read(2)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("background\n", "1 classes, expected 2 to 255"),
        ("background\n\ncat\n", r"classes\.txt:2: the line is empty"),
        ("background\ncat\ncat\n", r"classes\.txt:3: 'cat' is named twice"),
        ("\n".join(f"c{i}" for i in range(256)), "256 classes, expected 2 to 255"),
    ],
)
def test_faulty_class_list(tmp_path: Path, classes: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset("folder", make_folder(tmp_path, classes), "train")


def test_bom_and_blanks_in_class_list(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfbackground \r\ncat\r\n\r\n")
    assert open_dataset("folder", tmp_path, "train").class_names == ("background", "cat")


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"looked for images/\{train,val\}.*docs/own_data\.md"):
        open_dataset("folder", tmp_path, "train")
    make_folder(tmp_path)
    (tmp_path / "masks/train/p1.png").unlink()
    with pytest.raises(DataError, match=r"p1\.jpg: no mask of that name .*1 such files"):
        open_dataset("folder", tmp_path, "train")
    (tmp_path / "images/val/p1.jpg").unlink()
    with pytest.raises(DataError, match=r"p1\.png: no image of that name"):
        open_dataset("folder", tmp_path, "val")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "masks/val/p1.png").unlink()
    with pytest.raises(UserError, match=r"classes\.txt: missing"):
        open_dataset("folder", tmp_path, "val")


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    make_folder(tmp_path)
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "images/train/p0.jpg")
    with pytest.raises(DataError, match=r"p0\.png: p0\.jpg has the same name"):
        open_dataset("folder", tmp_path, "train")
