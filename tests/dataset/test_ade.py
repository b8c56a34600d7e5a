from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import open_dataset
from utils.errors import DataError, UserError


def make_ade(root: Path) -> Path:
    for split, count in (("training", 3), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in reversed(range(count)):
            stem = f"ADE_{split}_{number:08d}"
            Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(root / f"images/{split}/{stem}.jpg")
            mask = np.full((16, 24), 150 - number, np.uint8)
            Image.fromarray(mask).save(root / f"annotations/{split}/{stem}.png")
    return root


@pytest.mark.parametrize("place", ["ADEChallengeData2016", "."])
def test_layouts_and_order(tmp_path: Path, place: str) -> None:
    make_ade(tmp_path / place)
    train, val = (open_dataset("ade", tmp_path, split) for split in ("train", "val"))
    assert [p.name for p in train.images] == [f"ADE_training_{i:08d}.jpg" for i in range(3)]
    assert [int(train.read(i)[1].max()) for i in range(3)] == [150, 149, 148]
    assert len(val) == 2 and val.num_classes == 151 and val.ignore_at_eval == {0}


def test_built_in_names(tmp_path: Path) -> None:
    names = open_dataset("ade", make_ade(tmp_path), "val").class_names
    assert len(names) == 151 and len(set(names)) == 151
    known = {
        0: "other",
        1: "wall",
        2: "building",
        3: "sky",
        13: "person",
        21: "car",
        101: "poster",
        150: "flag",
    }
    assert {i: names[i] for i in known} == known


def test_names_of_the_release(tmp_path: Path) -> None:
    make_ade(tmp_path)
    rows = [f"{i}\t0.1\t10\t1\t0\tthing{i}, stuff{i}" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text(
        "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n"
    )
    assert open_dataset("ade", tmp_path, "val").class_names[150] == "thing150"
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows[:20]))
    with pytest.raises(DataError, match=r"objectInfo150\.txt: expected 150"):
        open_dataset("ade", tmp_path, "val")


def test_id_above_150(tmp_path: Path) -> None:
    make_ade(tmp_path)
    Image.fromarray(np.full((16, 24), 151, np.uint8)).save(
        tmp_path / "annotations/validation/ADE_validation_00000000.png"
    )
    with pytest.raises(DataError, match=r"ADE_validation_00000000\.png: class id 151 is unknown"):
        open_dataset("ade", tmp_path, "val").read(0)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"looked for images/training/ .*download_ade\.sh"):
        open_dataset("ade", tmp_path, "train")
    make_ade(tmp_path)
    (tmp_path / "annotations/training/ADE_training_00000001.png").unlink()
    with pytest.raises(DataError, match=r"ADE_training_00000001\.jpg: no mask"):
        open_dataset("ade", tmp_path, "train")
