"""ADE20K through the real command: "other" is the background of training and no class of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from command import SMALL, launch
from PIL import Image
from small_data import make_ade

from dataset import open_dataset


def test_a_published_task(tmp_path: Path) -> None:
    root = make_ade(tmp_path / "data")
    common = [
        *("--dataset", "ade", "--data_root", root, "--task", "100-50", *SMALL, "--lr", "0.01"),
        *("--logdir", tmp_path / "logs", "--name", "MIB", "--method", "MIB"),
    ]
    trained = launch(*common, "--step", "0", "1")
    assert trained.code == 0, trained.err
    run_dir = tmp_path / "logs" / "100-50-ade_MIB"
    assert "step 0 of task 100-50: 12 training images, 6 for the final evaluation, 101 classes" in trained.out
    assert "step 1 of task 100-50: 12 training images, 6 for the final evaluation, 151 classes" in trained.out

    state = torch.load(run_dir / "100-50-ade_MIB_1.pth", weights_only=True)["model_state"]
    outputs = [len(state[key]) for key in sorted(state) if key.startswith("cls.") and key.endswith("weight")]
    assert outputs == [101, 50], "an output for other and one for each of the 150 classes"

    names = open_dataset("ade", root, "val").class_names
    pixels = np.bincount(masks_of(root).ravel(), minlength=151)
    assert pixels[0] > 0
    for step, seen in ((0, 101), (1, 151)):
        results = json.loads((run_dir / f"results_{step}.json").read_text(encoding="utf-8"))
        assert list(results["class_iou"]) == list(names[1:seen]), "all classes seen, and no other"
        assert list(results["class_pixels"].values()) == pixels[1:seen].tolist()
    assert results["miou_old"] == results["miou_old_no_background"]

    tested = launch(*common, "--step", "1", "--test")
    assert tested.code == 0, tested.err
    assert json.loads((run_dir / "results_1.json").read_text(encoding="utf-8")) == results


def masks_of(root: Path) -> np.ndarray:
    folder = root / "ADEChallengeData2016" / "annotations" / "validation"
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
