import hashlib
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataset.shapes as shapes_module
from dataset import open_dataset
from dataset.drawing import SHAPE_CLASSES, draw_sample
from dataset.shapes import ShapesConfig, make_shapes
from utils.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "data/make_shapes.py"
SMALL = ShapesConfig(train=5, val=2, size=48, seed=1)


def digest(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def test_layout_and_reading(shapes_root: Path) -> None:
    train, val = (open_dataset("shapes", shapes_root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (48, 16) and train.num_classes == 21 and train.name == "shapes"
    assert [p.stem for p in open_dataset("shapes", shapes_root.parent, "train").images] == [
        p.stem for p in train.images
    ]
    with Image.open(train.masks[0]) as mask:
        assert mask.mode == "P"
    seen = np.zeros(256, bool)
    for i in range(len(train)):
        image, target = train.read(i)
        assert image.shape == (3, 64, 64) and target.shape == (1, 64, 64)
        values = target.unique().tolist()
        assert 1 <= len(set(values) - {0, 255}) <= 4 and 255 in values and 0 in values
        seen[values] = True
    assert seen[:21].all() and seen[255]


def test_every_thing_has_its_own_name() -> None:
    assert len(SHAPE_CLASSES) == len(set(SHAPE_CLASSES)) == 21 and SHAPE_CLASSES[0] == "background"


def test_things_stand_out_from_the_clutter() -> None:
    """Mean saturation inside objects against outside, in one image of each class."""
    for number in range(20):
        image, mask = draw_sample(96, (0, 0, number))
        spread = np.ptp(image.astype(int), axis=2)
        thing = (mask > 0) & (mask < 255)
        assert spread[thing].mean() > 1.5 * spread[mask == 0].mean()


def test_seed_decides(tmp_path: Path) -> None:
    make_shapes(tmp_path / "a", SMALL, num_workers=2)
    make_shapes(tmp_path / "b", SMALL, num_workers=1)
    make_shapes(tmp_path / "c", ShapesConfig(5, 2, 48, seed=2))
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b
    assert not any(a[name] == c[name] for name in a if name.endswith(".jpg"))
    # The first images do not depend on the number of images.
    make_shapes(tmp_path / "d", ShapesConfig(6, 3, 48, seed=1))
    d = digest(tmp_path / "d")
    assert all(a[name] == d[name] for name in a if name.endswith((".jpg", ".png")))


def test_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(shapes_module, "_stem", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        make_shapes(tmp_path / "a", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder(tmp_path: Path) -> None:
    out = tmp_path / "a"
    out.mkdir()  # an empty one is used
    make_shapes(out, SMALL)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    make_shapes(out, SMALL)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(UserError, match="exists and is not this data set"):
        make_shapes(out, ShapesConfig(5, 2, 48, seed=9))


def test_missing_data_names_the_script(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python data/make_shapes\.py --out"):
        open_dataset("shapes", tmp_path, "train")
    with pytest.raises(UserError, match=r"python data/make_shapes\.py --out"):
        open_dataset("shapes", tmp_path / "nowhere", "train")


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", "s", "--train", "3", "--val", "2", "--size", "32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 training and 2 validation images" in done.stdout
    assert len(open_dataset("shapes", tmp_path / "s", "val")) == 2


def test_command_with_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", "--out", str(tmp_path / "s"), "--size", "8"])
    assert script["main"]() == 2
    message = capsys.readouterr().err
    assert message.startswith("make_shapes.py: error: ") and message.count("\n") == 1
    assert not (tmp_path / "s").exists()
