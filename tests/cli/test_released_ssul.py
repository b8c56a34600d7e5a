"""SSUL-M as released, through the real command: what its checkpoints bring along, and its batches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from command import MOBILENET, Launch

from dataset import open_dataset
from dataset.image_labels import scan_image_labels
from dataset.protocols import task_indices
from tasks import get_task


def test_two_steps_a_test_and_predictions(cli: Launch, tiny_data: Path, tmp_path: Path) -> None:
    common = (*MOBILENET, "--task", "15-5", "--overlap", "--lr", "0.01")
    common = (*common, "--logdir", tmp_path, "--name", "run")
    ssul = (*common, "--method", "SSUL-M", "--memory", "6", "--fidelity", "released", "--keep", "last")
    trained = cli(*ssul, "--step", "all")
    assert trained.code == 0, trained.err[-3000:]
    for words in ("head=aspp (preset)", "augmentation=scale_crop (preset)", "min_lr=1e-06 (preset)"):
        assert words in trained.out

    masks = open_dataset("shapes", tiny_data, "train").masks
    presence = scan_image_labels(masks, progress=False)
    run_dir = tmp_path / "15-5-shapes_run"
    for step in (0, 1):
        path = run_dir / f"15-5-shapes_run_{step}.pth"
        content = torch.load(path, weights_only=True)
        images = task_indices(get_task("shapes", "15-5"), step, "overlapped", presence)
        assert content["batches_per_epoch"] == len(images) // 4, "as many as without exemplars"
        beside = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert beside["manifest"]["head"] == content["manifest"]["head"] == "aspp"
    # The rate of the background's head, 1e-4 of 0.01, does not fall.
    assert min(group["lr"] for group in content["optimizer_state"]["param_groups"]) == 1e-6

    tested = cli(*ssul, "--step", "1", "--test")
    assert tested.code == 0, tested.err[-3000:]
    results = json.loads((run_dir / "results_1.json").read_text(encoding="utf-8"))
    assert re.findall(r"mIoU.*", tested.out) and f"{100 * results['miou_all']:.2f}" in tested.out

    pictures = tiny_data / "JPEGImages"
    predicted = cli("--predict", pictures, "--ckpt", path, "--out", tmp_path / "out")
    assert predicted.code == 0, predicted.err[-3000:]
    assert len(list((tmp_path / "out" / "predictions").iterdir())) == len(list(pictures.iterdir()))
