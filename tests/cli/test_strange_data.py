"""Own data with names and sizes that nobody thought of, through the real commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from command import SMALL, launch
from PIL import Image
from tensorboard_events import values

import report
import run
from inference import tsne

NAMES = ["background", "Ba$$in", "a b+c|d", "a b c d", "猫", "_<i>_"]
SIZES = [(80, 64), (1, 1), (1, 40), (40, 1), (7, 5), (33, 31)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 + 6 images of 1×1 pixels and more."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    for split, number in (("train", 12), ("val", 6)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(number):
            width, height = SIZES[index % len(SIZES)]
            ids = rng.integers(0, len(NAMES), (height, width), dtype=np.uint8)
            Image.fromarray(ids).save(root / "masks" / split / f"{index}.png")
            picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / "images" / split / f"{index}.png")
    return root


def words(data: Path, logs: Path, *more: str) -> list[str]:
    options = ["--dataset", "folder", "--data_root", str(data), "--task", "2-3", "--overlap", "--whole_val"]
    small_scales = ["--test_scales", "0.25", "1"]
    return [*SMALL, *options, *small_scales, "--logdir", str(logs), "--name", "FT", "--method", "FT", *more]


def test_names_and_sizes_that_nobody_thought_of(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(data, tmp_path / "logs", "--step", "0", "1", "--sample_num", "6")
    done = launch(*command)
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert "Glyph" not in done.out + done.err and "illegal" not in done.out + done.err
    assert done.out.count("no installed font") <= 1
    (folder,) = (tmp_path / "logs").iterdir()
    for step in (0, 1):
        assert (folder / f"predictions_{step}.png").is_file()
    results = json.loads((folder / "results_1.json").read_text(encoding="utf-8"))
    assert list(results["class_iou"]) == NAMES
    assert sum(results["class_pixels"].values()) == sum(width * height for width, height in SIZES)
    with (folder / "confusion_1.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file))[1:] == NAMES
    tags = {value.tag for _, value in values(folder / "task") if value.tag.startswith("iou/")}
    assert tags == {"iou/background", "iou/Ba__in", "iou/a_b_c_d", "iou/a_b_c_d_3", "iou/猫", "iou/__i__"}

    # The rest in this process: every start of torch takes seconds.
    assert run.main(command) == 0
    assert capsys.readouterr().out.count("is done") == 2
    assert report.main([str(tmp_path / "logs"), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "_&lt;i&gt;_" in page and "_<i>_" not in page
    with (tmp_path / "report" / "classes.csv").open(encoding="utf-8") as file:
        assert {row[1] for row in csv.reader(file)} == {"class", *NAMES}
    predicted = ["--predict", str(data / "images"), "--out", str(tmp_path / "out"), "--where_to_sim", "CPU"]
    checkpoint = str(folder / f"{folder.name}_1.pth")
    assert run.main([*predicted, "--ckpt", checkpoint, "--test_scales", "0.25", "1"]) == 0
    assert len([*(tmp_path / "out" / "predictions").rglob("*.png")]) == 18


def test_segformer_evaluates_images_of_one_pixel_too(data: Path, tmp_path: Path) -> None:
    command = words(data, tmp_path, "--step", "0", "--model", "segformer_b0")
    assert run.main(command) == 0
    assert tsne.main(["--ckpt", str(next(tmp_path.rglob("*.pth"))), "--out", str(tmp_path / "a.png")]) == 0
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        assert {row[3] for row in csv.reader(file)} == {"class_name", *NAMES[:3]}


@pytest.mark.parametrize("end", [KeyError("drawing"), KeyboardInterrupt()])
def test_results_outlive_pictures_that_cannot_be_drawn(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise end

    monkeypatch.setattr("session.evaluation.prediction_grid", fails)
    command = [*SMALL, "--dataset", "folder", "--data_root", str(data), "--task", "2-3", "--overlap"]
    command += ["--logdir", str(tmp_path), "--sample_num", "1", "--step", "0"]
    if isinstance(end, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            run.main(command)
    else:
        assert run.main(command) == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (folder / "results_0.json").is_file()
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert ("the images of step 0 could not be drawn (KeyError: 'drawing')" in log) == (
        not isinstance(end, KeyboardInterrupt)
    )
    assert run.main(command) == 0
    assert "step 0 is done" in (folder / "train.log").read_text(encoding="utf-8")
